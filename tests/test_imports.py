"""The import rule (a notebook imports only from smaller numbers, and only from the parts that its part may use), and every module
alone in a fresh process."""
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from chapters import FOLDERS, MAY, PACKAGE, ROOT, chapters, code_cells, imports_in, imports_of, is_package, modules

WRITTEN = {c.module: c for c in chapters() if c.module}
CODE = sorted(m for m in modules() if not is_package(m))

# what takes seconds to import and is therefore imported inside the functions that use it
HEAVY = ("sentence_transformers", "transformers", "accelerate", "sklearn", "seaborn", "scipy.stats", "dvclive", "wandb", "tensorboard")


def python_of(cell: str) -> str:
    "A notebook cell without IPython's magics and shell lines, which ast cannot read."
    if cell.lstrip().startswith("%%"): return ""
    return "\n".join(" " * (len(line) - len(line.lstrip())) + "pass" if line.lstrip()[:1] in ("%", "!") else line
                     for line in cell.splitlines())


def test_numbers_are_unique():
    twice = [n for n, k in Counter(c.number for c in chapters()).items() if k > 1]
    assert not twice, f"two notebooks carry the number {twice}"


def test_one_notebook_per_module():
    assert sorted(WRITTEN) == CODE, "each module comes from one notebook, and each notebook's module is there (nbdev_export)"


def refused(chapter, module: str) -> str:
    "Why a chapter must not import this module; empty where it may. The tour, which comes first, uses everything."
    other = WRITTEN[module]
    if other.part not in MAY[chapter.part]: return f"{module} belongs to the part {other.part}, which {chapter.part} must not import"
    later = chapter.part != "tour" and other.number >= chapter.number and module != chapter.module
    return f"{module} ({other.number}) is a later chapter than {chapter.number}" if later else ""


def test_folders_belong_to_their_part():
    "A module of pretraining/, experiments/, official/, compression/ or commands/ has a number of that part, and no other module has."
    for module, chapter in WRITTEN.items():
        folder = module.split(".")[1]
        if folder in FOLDERS: assert chapter.part == FOLDERS[folder], chapter.notebook.name
        elif module != f"{PACKAGE}.cli": assert chapter.part in ("ground", "road"), chapter.notebook.name


def test_the_rule_knows_the_parts():
    "Held against imports that must not be: of the road, of an experiment, of a later chapter."
    road, experiment, first = (WRITTEN[f"{PACKAGE}.{m}"] for m in ("inference.score", "experiments.scratch", "quality"))
    for module in ("pretraining.tasks", "experiments.scratch", "official.dover"): assert refused(road, f"{PACKAGE}.{module}")
    assert refused(experiment, f"{PACKAGE}.official.dover") and refused(first, f"{PACKAGE}.files")
    tour = next(c for c in chapters() if c.part == "tour")
    for module in WRITTEN: assert not refused(tour, module) and not refused(WRITTEN[f"{PACKAGE}.cli"], module)
    assert not refused(road, f"{PACKAGE}.models.text") and not refused(experiment, f"{PACKAGE}.models.text")


@pytest.mark.parametrize("module", CODE)
def test_module_imports_from_smaller_numbers(module):
    for i in imports_of(module):
        assert not i.star, f"{module}:{i.line}: import * hides where a name comes from"
        assert not i.whole, f"{module}:{i.line}: names come from a module, not from the package {i.module}"
        assert i.module in WRITTEN, f"{module}:{i.line}: {i.module} is not a module of this package"
        assert i.module != f"{PACKAGE}.toy", f"{module}:{i.line}: toys are for what chapters show and for tests"
        assert i.module != module and not refused(WRITTEN[module], i.module), f"{module}:{i.line}: {refused(WRITTEN[module], i.module)}"


@pytest.mark.parametrize("chapter", chapters(), ids=lambda c: c.notebook.stem)
def test_notebook_imports_from_smaller_numbers(chapter):
    "Also the cells that are not exported: whoever reads in order meets nothing that comes later."
    for cell in code_cells(chapter.notebook):
        for i in imports_in(python_of(cell)):
            at = f"{chapter.notebook.name}: `{cell.splitlines()[i.line - 1].strip()}`"
            assert not i.star and not i.whole, f"{at}: name the module and what you take from it"
            assert i.module in WRITTEN, f"{at}: {i.module} is not a module of this package"
            assert not refused(chapter, i.module), f"{at}: {refused(chapter, i.module)}"


def test_package_is_light():
    "`import qualivision` alone costs nothing: no torch, no numpy."
    code = f"import {PACKAGE}, sys; print(sorted({{'torch', 'numpy', 'pandas'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


# One process imports the libraries that many modules need, then forks for each module: every child has seen no other module of
# the package, and all of them together cost one import of torch. None of HEAVY is among these libraries.
ONE_BY_ONE = """
import importlib, json, os, sys, traceback
names, heavy = json.loads(sys.argv[1])
import av, fastcore.all, matplotlib.pyplot, numpy, pandas, PIL.Image, safetensors.torch, torch, torch.nn.functional, typer, yaml
assert not set(heavy) & set(sys.modules)
for name in names:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        answer = {"module": name}
        try:
            answer["file"] = importlib.import_module(name).__file__
            answer["heavy"] = [h for h in heavy if h in sys.modules]
        except BaseException:
            answer["error"] = traceback.format_exc()
        print(json.dumps(answer), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]: print(json.dumps({"module": name, "error": "the process died"}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, dict]:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ONE_BY_ONE, json.dumps([CODE, HEAVY])], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {a["module"]: a for a in answers}


@pytest.mark.parametrize("module", CODE)
def test_module_imports_alone(module, imported):
    answer = imported[module]
    assert "error" not in answer, f"import {module} in a fresh process:\n{answer['error']}"
    assert answer["file"] == str(modules()[module]), "the import came from another checkout"
    assert not answer["heavy"], f"import {module} pulls in {answer['heavy']}: import them inside the functions that use them"


# what a score does not need, also once it is made
UNUSED = (*HEAVY, "pandas", "pyarrow", "scipy", "matplotlib", "huggingface_hub", "rich", "IPython", "PIL", "requests", "urllib3", "onnxruntime")
SCORE = """
import json, sys
sys.argv = ["qualivision", "score", "clip.mp4", "--prompt", "a red boat", "--checkpoint", "weights", "--json"]
from qualivision.cli import main
try: main()
except SystemExit as e: print(json.dumps({"status": e.code, "found": [m for m in json.loads(%r) if m in sys.modules]}), file=sys.stderr)
"""


def test_scoring_a_video_is_light(tmp_path):
    "All of `qualivision score`: what takes seconds to import is not imported, and nothing is left in the current folder."
    import tiny
    from qualivision.toy import toy_clip
    tiny.checkpoint(tmp_path/"weights")
    toy_clip(tmp_path/"clip.mp4", (200, 60, 40))
    env = {**os.environ, "QUALIVISION_CACHE": str(tmp_path/"kept")}
    for kept in (0, 1):
        assert len(list(tmp_path.rglob("*.f32"))) == kept
        code = SCORE % json.dumps(UNUSED)
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
        answer = json.loads(done.stderr.splitlines()[-1])
        assert answer == {"status": 0, "found": []} and json.loads(done.stdout)[0]["error"] is None, done.stdout + done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "kept", "weights"]


PARTS_APART = """
import json, sys
import qualivision.inference.score
print(json.dumps(sorted(m for m in sys.modules if m.split(".")[0] == "qualivision" and m.split(".")[1:2] and m.split(".")[1] in sys.argv[1:])))
"""


def test_scoring_needs_no_training_and_no_other_part():
    "`import qualivision.inference.score`, in a clean process, loads the road up to there and nothing beside it."
    others = ("training", "pretraining", "experiments", "official", "compression", "pipeline", "commands", "cli")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PARTS_APART, *others], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
