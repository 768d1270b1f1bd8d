"What must hold of the files themselves: exports are fresh, notebooks clean and small, no machine's paths, nothing hidden, nothing heavy."
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from chapters import PACKAGE, ROOT, chapters, modules

NOTEBOOK_BYTES = 150_000        # a committed notebook, outputs included
WORDS = 28_000                  # of Part I
CELL_LINES = 40                 # of an exported cell, blank and comment lines not counted
LINE_LENGTH = 100               # of code in notebooks: what a cell shows without scrolling
FUNCTION_LINES = 60
COMPLEXITY = 12                 # of a function, by ruff's C901
ARGUMENTS = 10                  # of a constructor that is not a dataclass's
MODULE_LINES = 450              # of a file of the package
FILE_BYTES = 1_000_000          # any other file that git tracks, outside of the embedded remote
STORE = "dvcstore"
SHIPPED = ("data.dvc", "pretrained.dvc")    # the .dvc files whose data travel in dvcstore/: embedded set and pretrained bodies, nothing of others

# an absolute path into somebody's machine; the words alone, and paths that merely end like this, are fine
MACHINE_PATH = re.compile(r"(?<![\w.~$}-])/(?:(?:work|root|tmp)\b|(?:home|Users)/\w)|\bfile:///|\b[A-Z]:\\\\?Users\b")
OUTSIDE = re.compile(r"\.\./shared\b")


def git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def in_git() -> list[Path]:
    "The files that git tracks or would add."
    if not (ROOT/".git").exists(): pytest.skip("not a git checkout")
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return [ROOT/n for n in sorted(set(names)) if n and (ROOT/n).is_file()]


def outside_store() -> list[Path]: return [p for p in in_git() if p.relative_to(ROOT).parts[0] != STORE]


def texts() -> dict[str, str]:
    "The text files among them: {name: text}."
    found = {}
    for path in outside_store():
        try: found[path.relative_to(ROOT).as_posix()] = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError: continue     # a picture, an array
    return found


def lines_with(pattern: re.Pattern, but=()) -> list[str]:
    "Where a pattern occurs in a text file, as `name:line: the match`."
    return [f"{name}:{n}: {hit[0]}" for name, text in texts().items() if name not in but
            for n, line in enumerate(text.splitlines(), 1) if (hit := pattern.search(line))]


def run(*command, cwd: Path) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# ---- notebooks and what is generated from them ---------------------------------------------------------------------

@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "The notebooks and settings alone, in an empty folder."
    to = tmp_path_factory.mktemp("export")
    shutil.copy(ROOT/"settings.ini", to)
    shutil.copytree(ROOT/"nbs", to/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return to


def test_export_is_fresh(copy):
    "qualivision/ is what nbdev_export writes today: nothing forgotten, nothing edited by hand."
    run("-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=copy)

    def python(at): return {p.relative_to(at).as_posix(): p.read_text(encoding="utf-8") for p in sorted((at/PACKAGE).rglob("*.py"))}
    fresh, here = python(copy), python(ROOT)
    assert sorted(fresh) == sorted(here), "nbdev_export writes other files than there are"
    assert not [name for name in fresh if fresh[name] != here[name]], "edited by hand, or not exported: run nbdev_export"


def test_notebooks_are_clean(copy):
    "nbdev_clean changes nothing: no execution counts, no editors' metadata."
    before = {p: p.read_bytes() for p in sorted((copy/"nbs").rglob("*.ipynb"))}
    run("-c", "from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=copy)
    dirty = [p.relative_to(copy).as_posix() for p, was in before.items() if p.read_bytes() != was]
    assert not dirty, f"run nbdev_clean: {dirty}"


def test_notebooks_are_small():
    large = {p.name: p.stat().st_size for p in (ROOT/"nbs").rglob("*.ipynb")
             if ".ipynb_checkpoints" not in p.parts and p.stat().st_size > NOTEBOOK_BYTES}
    assert not large, f"over {NOTEBOOK_BYTES:,} bytes: {large}"


def test_notebooks_hold_no_errors():
    "An error that is shown on purpose is caught and printed; a cell that stopped with a traceback is left over."
    stopped = []
    for path in sorted((ROOT/"nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if any(o["output_type"] == "error" for o in cell.get("outputs", ())): stopped.append(f"{path.name}: {''.join(cell['source'])[:60]!r}")
    assert not stopped, stopped


def prose() -> dict[Path, str]:
    "The Markdown of each chapter, and of the files at the top."
    found = {p: p.read_text(encoding="utf-8") for p in ROOT.glob("*.md")}
    for path in sorted((ROOT/"nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found[path] = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return found


def wrong_link(path: Path, shown: str, target: str) -> str:
    "What is wrong with a link to a file: it is not there, or it is another chapter than the words say."
    file = path.parent/target.split("#")[0]
    if not file.exists(): return f"{path.name}: [{shown}]({target}) is not there"
    said, number = re.search(r"chapter (\d+[a-z]?)", shown, re.I), re.match(r"(\d+[a-z]?)_", file.name)
    return f"{path.name}: [{shown}] leads to {file.name}" if said and number and said[1].lstrip("0") != number[1].lstrip("0") else ""


def test_links_lead_where_they_say():
    here = ROOT/"nbs"/"data"/"10_sampling.ipynb"
    assert wrong_link(here, "chapter 10", "10_video.ipynb") and wrong_link(here, "Chapter 10", "09_video.ipynb")
    assert not wrong_link(here, "Chapter 9", "../data/09_video.ipynb#decord")
    links = [(path, *link) for path, text in prose().items() for link in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text)]
    wrong = [w for path, shown, to in links if not re.match(r"\w+:|#", to) and (w := wrong_link(path, shown, to))]
    assert len(links) > 200 and not wrong, wrong


# ---- the size of things ---------------------------------------------------------------------------------------------

def test_part_one_can_be_read_in_a_day():
    """The tour, the ground floor, the road and the index: words between blanks in Markdown, tables and code blocks counted. A chapter
    with a letter (38a) is a side room: one can pass by."""
    read = [c.notebook for c in chapters() if c.part in ("tour", "ground", "road") and c.number == int(c.number)] + [ROOT/"nbs"/"index.ipynb"]
    text = prose()
    words = {path.name: len(text[path].split()) for path in read}
    assert len(words) > 50 and sum(words.values()) <= WORDS, f"{sum(words.values())} words; the longest: {sorted(words, key=words.get)[-5:]}"


class Cell(NamedTuple):
    "One code cell of a chapter."
    at: str                 # data/09_video.ipynb, cell 5c70a17e
    source: str

    @property
    def exported(self) -> bool: return re.match(r"#\|\s*export", self.source) is not None

    @property
    def functions(self) -> list[ast.FunctionDef]:
        "Those it defines; a cell with a magic or a shell line defines none."
        if re.search(r"^\s*[%!]", self.source, re.M): return []
        return [n for n in ast.walk(ast.parse(self.source)) if isinstance(n, ast.FunctionDef)]


@cache
def code_cells() -> list[Cell]:
    found = []
    for path in sorted((ROOT/"nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "code": continue
            found.append(Cell(f"{path.relative_to(ROOT/'nbs').as_posix()}, cell {cell['id']}", "".join(cell["source"])))
    return found


def test_cells_are_short():
    def count(cell): return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in cell.source.splitlines())
    long = {c.at: n for c in code_cells() if c.exported and (n := count(c)) > CELL_LINES}
    assert not long, f"over {CELL_LINES} lines: {long}"


def test_code_lines_are_short():
    long = {c.at: n for c in code_cells() if (n := sum(len(line) > LINE_LENGTH for line in c.source.splitlines()))}
    assert not long, f"lines of over {LINE_LENGTH} characters: {long}"


def test_functions_are_short():
    long = {f"{c.at}: {f.name}": n for c in code_cells() for f in c.functions if (n := f.end_lineno - f.lineno + 1) > FUNCTION_LINES}
    assert not long, f"over {FUNCTION_LINES} lines: {long}"


def test_constructors_take_few_arguments():
    def count(f): return len(f.args.posonlyargs) + len(f.args.args) + len(f.args.kwonlyargs) - 1       # without self
    many = {c.at: n for c in code_cells() for f in c.functions if f.name == "__init__" and (n := count(f)) > ARGUMENTS}
    assert not many, f"over {ARGUMENTS} arguments: {many}"


def test_functions_are_simple():
    "A plain list of refusals is a table of checks; other branches are functions with a name."
    run("-m", "ruff", "check", "--isolated", "--select", "C901", "--config", f"lint.mccabe.max-complexity={COMPLEXITY}", "nbs", cwd=ROOT)


def test_modules_are_short():
    long = {name: n for name, file in modules().items() if (n := len(file.read_text(encoding="utf-8").splitlines())) > MODULE_LINES}
    assert not long, f"over {MODULE_LINES} lines: {long}"


# ---- the README ------------------------------------------------------------------------------------------------------

README = ("generate README.md again: jupyter execute --inplace nbs/index.ipynb, nbdev_clean, "
          "then jupyter nbconvert --to markdown --stdout --no-input "
          "--RegexRemovePreprocessor.patterns=\"['^#\\|\\s*hide']\" nbs/index.ipynb | sed 's#](\\.\\./#](#g' > README.md")


def test_readme_is_the_index():
    "README.md is nbs/index.ipynb in markdown, byte for byte, with links that start one folder higher."
    index = ROOT/"nbs"/"index.ipynb"
    if not index.exists(): pytest.skip("there is no nbs/index.ipynb yet")
    hide = "--RegexRemovePreprocessor.patterns=['^#\\|\\s*hide']"
    made = run("-m", "nbconvert", "--to", "markdown", "--stdout", "--no-input", hide, index, cwd=ROOT).stdout
    assert (ROOT/"README.md").read_text(encoding="utf-8") == made.replace("](../", "]("), README


def links(text: str) -> list[str]:
    "The files that a page in markdown links to or shows."
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", link)]


@pytest.mark.parametrize("page", ["README.md", "results/README.md", "nbs/index.ipynb"])
def test_links_lead_to_files(page):
    "From where the page lies: README.md on a forge, the index in JupyterLab."
    file = ROOT/page
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        shown = [o["data"].get("text/markdown", "") for c in cells for o in c.get("outputs", ()) if "data" in o]
        text = "\n".join("".join(part) for part in [*(c["source"] for c in cells if c["cell_type"] == "markdown"), *shown])
    lost = [link for link in links(text) if not (file.parent/link.split("#")[0]).exists()]
    assert links(text) and not lost, f"{page} links to {lost}"


def test_contents_list_every_chapter():
    "In the order of the numbers within each folder, under today's titles."
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^- \[(\d\d[a-z]? · .+)\]\((nbs/\S+\.ipynb)\)$", readme, re.M))
    def entry(path):
        title = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).splitlines()[0].removeprefix("# ")
        return f"{path.name.split('_')[0]} · {title}", path.relative_to(ROOT).as_posix()
    chapters = dict(entry(p) for p in (ROOT/"nbs").rglob("[0-9]*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    assert listed == chapters, README


# ---- the code -------------------------------------------------------------------------------------------------------

def test_ruff():
    run("-m", "ruff", "check", ".", cwd=ROOT)


def catches_too_much(handler: ast.ExceptHandler) -> bool:
    "Bare, or Exception; BaseException is fine where it cleans up and raises again."
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {k.id for k in kinds if isinstance(k, ast.Name)}
    raises_again = isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None
    return handler.type is None or "Exception" in names or ("BaseException" in names and not raises_again)


@pytest.mark.parametrize("module", sorted(modules()))
def test_nothing_fails_silently(module):
    "No blind except, no partial load without a report, nothing left to be written."
    source = modules()[module].read_text(encoding="utf-8")
    tree = ast.parse(source)
    place = [f for f in tree.body if module == f"{PACKAGE}.quality" and getattr(f, "name", "") == "caught"]     # the one that may
    allowed = [h for f in place for h in ast.walk(f) if isinstance(h, ast.ExceptHandler)]
    for node in ast.walk(tree):
        at = f"{module}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler) and node not in allowed:
            assert not catches_too_much(node), f"{at}: except catches everything"
        if isinstance(node, ast.Name): assert node.id != "NotImplementedError", f"{at}: not written yet"
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            loose = [k for k in node.keywords if k.arg == "strict" and isinstance(k.value, ast.Constant) and k.value.value is False]
            if called == "load_state_dict": loose += [a for a in node.args[1:2] if isinstance(a, ast.Constant) and a.value is False]
            assert not loose or called == "zip", f"{at}: {called}(strict=False): load_strict says what is missing"
    later = re.search(r"\b(?:TODO|FIXME|XXX|HACK)\b", source)
    assert not later, f"{module}: {later[0]}"


# ---- the repository -------------------------------------------------------------------------------------------------

def test_no_machine_paths():
    ignore_files = [p.relative_to(ROOT).as_posix() for p in outside_store() if p.name in (".gitignore", ".dvcignore")]    # / is the root there
    assert not (found := lines_with(MACHINE_PATH, but=ignore_files)), found


def test_nothing_points_outside():
    assert not (found := lines_with(OUTSIDE)), found


def test_nothing_is_left_to_be_written():
    later = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME)\b")       # in two parts, so that this file passes itself
    assert not (found := lines_with(later, but=["tests/test_hygiene.py"])), found


def test_tracked_files_are_small():
    large = {p.relative_to(ROOT).as_posix(): size for p in outside_store() if (size := p.stat().st_size) > FILE_BYTES}
    assert not large, f"over {FILE_BYTES:,} bytes, what dvc is for: {large}"


def test_nothing_generated_is_tracked():
    if not (ROOT/".git").exists(): pytest.skip("not a git checkout")
    ignored = git("ls-files", "--cached", "--ignored", "--exclude-standard").split()
    assert not ignored, f"tracked and ignored at once: {ignored}"


def test_a_checkout_has_the_same_bytes_everywhere():
    "With git's autocrlf, Windows' default, code would get other line ends: another code hash, and every stage would count as changed."
    if not (ROOT/".git").exists(): pytest.skip("not a git checkout")
    names = git("ls-files", "-z", "--", f"{PACKAGE}/*.py", "nbs", "*.yaml", "run.sh", "results/*.csv").split("\0")
    differ = [n for n in filter(None, names)
              if subprocess.run(["git", "-c", "core.autocrlf=true", "cat-file", "--filters", f":{n}"], cwd=ROOT, capture_output=True).stdout
              != subprocess.run(["git", "cat-file", "blob", f":{n}"], cwd=ROOT, capture_output=True).stdout]
    assert names and not differ, f"{len(differ)} files, such as {differ[:3]}: .gitattributes must set text=auto eol=lf"


def test_scripts_are_executable():
    for name in ("run.sh", ".ci/run"): assert os.access(ROOT/name, os.X_OK), f"chmod +x {name}"


def test_torch_is_not_pinned():
    "The constraints leave torch and all that only torch brings alone: a user's own stays."
    pins = [line.split("==")[0].lower() for line in (ROOT/"constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    assert not [p for p in pins if p in ("torch", "triton", PACKAGE) or p.startswith(("nvidia", "-e"))]
    assert all("==" in line for line in (ROOT/"constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")), "a pin names one version"
    assert pins == sorted(pins) and len(set(pins)) == len(pins)


def test_pins_run_on_the_oldest_python():
    "No pin asks for a later Python than settings.ini does: 3.11 means 3.11.0, not this machine's."
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    oldest, pins = settings["DEFAULT"]["min_python"] + ".0", set((ROOT/"constraints.txt").read_text().splitlines())
    newer = [f"{d.name}: {asked}" for d in distributions() if f"{d.name}=={d.version}" in pins
             and (asked := d.metadata["Requires-Python"]) and oldest not in SpecifierSet(asked)]
    assert not newer, newer


def objects(out: dict) -> set[str]:
    "The names in the store of what one `outs` entry refers to: itself, and for a folder all its files."
    md5 = out["md5"]
    named = {f"files/md5/{md5[:2]}/{md5[2:]}"}
    if md5.endswith(".dir"):
        listing = ROOT/STORE/"files"/"md5"/md5[:2]/md5[2:]
        assert listing.is_file(), f"{STORE}/ lacks the listing of {out['path']}: dvc push {out['path']}"
        named |= {f"files/md5/{f['md5'][:2]}/{f['md5'][2:]}" for f in json.loads(listing.read_text())}
    return named


def test_store_holds_what_is_shipped_and_nothing_else():
    missing = [name for name in SHIPPED if not (ROOT/name).is_file()]
    if missing: pytest.skip(f"there is no {', '.join(missing)} yet")
    referred = set().union(*(objects(out) for name in SHIPPED for out in yaml.safe_load((ROOT/name).read_text())["outs"]))
    there = {p.relative_to(ROOT/STORE).as_posix() for p in (ROOT/STORE).rglob("*") if p.is_file()}
    assert not (referred - there), f"{len(referred - there)} objects lack in {STORE}/: dvc push"
    assert not (there - referred), f"{STORE}/ holds {len(there - referred)} objects that nothing shipped refers to: {sorted(there - referred)[:3]}"
    tracked = {p.relative_to(ROOT/STORE).as_posix() for p in in_git() if p.relative_to(ROOT).parts[0] == STORE}
    assert tracked == there, "git does not track all of the store"


def test_store_is_unharmed():
    "Every object is what its name says: dvc pull would not notice."
    if not (ROOT/STORE).is_dir(): pytest.skip(f"there is no {STORE}/ yet")
    wrong = [p.relative_to(ROOT).as_posix() for p in (ROOT/STORE).rglob("*") if p.is_file()
             and hashlib.md5(p.read_bytes()).hexdigest() != p.parent.name + p.stem]
    assert not wrong, f"not what their names say: {wrong[:3]} ({len(wrong)})"
