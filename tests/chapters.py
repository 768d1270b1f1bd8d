"The chapters and who imports whom, read from the files without importing anything."
import ast
import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "qualivision"
PARTS = {"tour": 0, "ground": 9, "road": 57, "experiments": 68, "official": 88, "compression": 89, "commands": 99}     # each with its last number
MAY = {"ground": {"ground"}, "road": {"ground", "road"}, "experiments": {"ground", "road", "experiments"},
       "official": {"ground", "road", "official"}, "compression": {"ground", "road", "official", "compression"},
       "commands": set(PARTS), "tour": set(PARTS)}       # what a part may import
FOLDERS = {"pretraining": "experiments", "experiments": "experiments", "official": "official", "compression": "compression", "commands": "commands"}


class Chapter(NamedTuple):
    "A numbered notebook and the module that it writes, if it writes one."
    notebook: Path          # absolute
    number: float           # the leading digits of its name; a letter adds a hundredth: 38a is 38.01
    module: str | None      # qualivision.data.video

    @property
    def part(self) -> str: return next(name for name, last in PARTS.items() if int(self.number) <= last)


class Import(NamedTuple):
    "One import of something in the package."
    module: str             # the full name of the module that it reaches
    line: int
    star: bool = False
    whole: bool = False     # of a package, not of a module in it


def code_cells(notebook: Path) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


@cache
def chapters() -> list[Chapter]:
    "All numbered notebooks, in reading order."
    found = []
    for path in sorted((ROOT/"nbs").rglob("*.ipynb")):
        number = re.match(r"(\d+)([a-z]?)_", path.name)
        if not number or ".ipynb_checkpoints" in path.parts: continue
        named = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(code_cells(path)), re.M)
        place = int(number[1]) + ("_abcdefghi".index(number[2] or "_")) / 100
        found.append(Chapter(path, place, f"{PACKAGE}.{named[1]}" if named else None))
    return sorted(found, key=lambda c: (c.number, c.notebook))


@cache
def modules() -> dict[str, Path]:
    "Every module of the package as it lies on disk: {full name: file}, the __init__ files under their package's name."
    found = {}
    for path in sorted((ROOT/PACKAGE).rglob("*.py")):
        if path.name == "_modidx.py": continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_package(name: str) -> bool: return name in modules() and modules()[name].name == "__init__.py"


def imports_in(source: str, inside: str | None = None) -> list[Import]:
    """What some code imports from the package, at the top or within a function; `inside` is the module that relative imports start from.

    `import qualivision` for its version or its folder takes no chapter's names and does not count."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for name in (a.name for a in node.names):
                if name.split(".")[0] == PACKAGE and name != PACKAGE: found.append(Import(name, node.lineno, whole=is_package(name)))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                if inside is None: raise ValueError(f"line {node.lineno}: a relative import outside of the package")
                above = inside.split(".")[:len(inside.split(".")) - node.level]
                base = ".".join([*above, *([node.module] if node.module else [])])
            if base.split(".")[0] != PACKAGE: continue
            for a in node.names:
                if base == PACKAGE and a.name == "__version__": continue
                deeper = f"{base}.{a.name}"
                reached = deeper if deeper in modules() else base
                found.append(Import(reached, node.lineno, star=a.name == "*", whole=is_package(reached)))
    return found


@cache
def imports_of(module: str) -> list[Import]: return imports_in(modules()[module].read_text(encoding="utf-8"), module)


def reached_from(module: str) -> set[str]:
    "The module and all that it imports, directly and through others; empty __init__ files do not count."
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name in seen: continue
        seen.add(name)
        todo += [i.module for i in imports_of(name)]
    return {name for name in seen if not is_package(name)}
