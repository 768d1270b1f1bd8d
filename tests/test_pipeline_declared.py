"""What each dvc.yaml declares is what its stages use: the modules that a stage imports, and the sections of params.yaml that it reads.

A dependency that is missing gives an old result after a change; one too many runs an hour again for nothing. A folder stands for its
modules where a stage uses nearly all of them, so that a list stays short enough to be read."""
import ast
import itertools
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from chapters import PACKAGE, ROOT, is_package, modules, reached_from

if not (ROOT/"dvc.yaml").exists() or not (ROOT/"params.yaml").exists():
    pytest.skip("there is no dvc.yaml or params.yaml yet", allow_module_level=True)

PARAMS = yaml.safe_load((ROOT/"params.yaml").read_text())
PROFILES = ("embedded", "paper")
PIPELINE = f"{PACKAGE}.pipeline"
STAGES_OF = ("pipeline", "pretraining", "experiments")      # the folders of the package whose modules can be stages
WHOLE = 2 / 3       # of the modules of a folder: a stage that uses so many depends on the folder


class Stage(NamedTuple):
    "One stage as DVC runs it; of a matrix, one of its items."
    name: str       # train@dover; experiments/NAME in a pipeline file of a folder
    folder: Path    # that its paths start from, relative to the repository
    body: dict      # cmd, deps, params, outs


def filled(value, item: dict):
    "A stage's body with `${item.KEY}` in place; other templates stay."
    if isinstance(value, dict): return {filled(k, item): filled(v, item) for k, v in value.items()}
    if isinstance(value, list): return [filled(v, item) for v in value]
    if not isinstance(value, str): return value
    return re.sub(r"\$\{\s*item\.(\w+)\s*\}", lambda m: str(item[m[1]]), value)


def listed(values) -> list:
    "The values of one key of a matrix: a list, or `${a.b}`, a list in params.yaml."
    if isinstance(values, list): return values
    at = PARAMS
    for part in values.strip("${} ").split("."): at = at[part]
    return at


def pipeline_files() -> list[Path]:
    "Every dvc.yaml of the repository."
    apart = {"dvcstore", "node_modules", "cache", "runs", "work"}
    found = []
    for at, folders, files in os.walk(ROOT):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in apart]
        found += [Path(at)/"dvc.yaml"] * ("dvc.yaml" in files)
    return sorted(found)


def stages() -> list[Stage]:
    "All stages of all pipeline files."
    found = []
    for file in pipeline_files():
        above = file.parent.relative_to(ROOT)
        for name, body in (yaml.safe_load(file.read_text(encoding="utf-8")).get("stages") or {}).items():
            assert "foreach" not in body, f"{name}: write foreach as a matrix"
            matrix = body.get("matrix", {})
            folder = Path(os.path.normpath(above/body.get("wdir", ".")))
            for values in itertools.product(*map(listed, matrix.values())):
                called = "@".join([(above/name).as_posix(), *(["-".join(map(str, values))] if matrix else [])])
                found.append(Stage(called, folder, filled(body, dict(zip(matrix, values)))))
    return found


ALL = stages()
EACH = pytest.mark.parametrize("stage", ALL, ids=[s.name for s in ALL])


def ran_by(stage: Stage) -> tuple[str, list[str]]:
    "The module that a stage runs, and its arguments."
    cmd = stage.body["cmd"]
    pattern = rf"python -m ({PACKAGE}\.(?:{'|'.join(STAGES_OF)})\.\w+)((?: [\w.=-]+)*)"
    ran = re.fullmatch(pattern, cmd if isinstance(cmd, str) else " && ".join(cmd))
    assert ran, f"{stage.name} runs `{cmd}`: a stage is `python -m {PIPELINE}.NAME ARGUMENTS`"
    return ran[1], ran[2].split()


def module_of(stage: Stage) -> str: return ran_by(stage)[0]


def paths(entries) -> list[str]:
    "The paths of deps or outs, which are names, or {name: options}."
    return [next(iter(e)) if isinstance(e, dict) else e for e in entries or ()]


def from_root(stage: Stage, kind: str) -> list[str]:
    "The stage's deps or outs as paths from the top of the repository; those with a template in them as they are."
    return [p if "${" in p else os.path.normpath(stage.folder/p) for p in paths(stage.body.get(kind))]


def deps_of(module: str) -> list[str]:
    "The part of a stage's deps that lies in the package, from its imports: files, and folders that are used nearly whole."
    used, folders = reached_from(module), defaultdict(list)
    for name, file in modules().items():
        if not is_package(name): folders[file.parent.relative_to(ROOT).as_posix()].append(name)
    deps = []
    for folder, names in folders.items():
        mine = [n for n in names if n in used]
        own = folder == PACKAGE or folder.split("/")[1] in STAGES_OF and module.startswith(folder.replace("/", ".") + ".")
        if not own and len(mine) >= WHOLE * len(names): deps.append(folder)
        else: deps += [modules()[n].relative_to(ROOT).as_posix() for n in mine]
    return sorted(deps)


def keys_declared(stage: Stage) -> list[str]:
    "The keys of params.yaml that a stage declares."
    keys = []
    for entry in stage.body.get("params") or ():
        for file, named in (entry.items() if isinstance(entry, dict) else [("params.yaml", [entry])]):
            assert os.path.normpath(stage.folder/file) == "params.yaml", f"{stage.name}: parameters from {file}; run values live in params.yaml alone"
            assert named, f"{stage.name}: all of params.yaml; name the sections"
            keys += named
    return keys


def sections_declared(stage: Stage) -> dict[str, set[str]]:
    "{section: the profiles under which it is declared}, `*` for the one that is chosen, `-` for a section outside of the profiles."
    found: dict[str, set[str]] = {}
    for key in keys_declared(stage):
        key = re.sub(r"\$\{\s*profile\s*\}", "*", key)
        first, _, rest = key.partition(".")
        if first == "profile": continue
        section = rest.split(".")[0] if first in (*PROFILES, "*") else first
        assert section, f"{stage.name}: all of `{first}`; name the sections"
        found.setdefault(section, set()).add(first if first in (*PROFILES, "*") else "-")
    return found


def tree(module: str) -> ast.Module: return ast.parse(modules()[module].read_text(encoding="utf-8"))


def model_names() -> list[str]:
    "The models of the pipeline: the matrix of its train stage."
    return [ran_by(s)[1][0] for s in ALL if s.name.startswith("train@")]


def sections_of(stage: Stage) -> tuple[str, ...]:
    """The literal SECTIONS of a stage's module; MODEL is the model that the stage runs for, MODELS are all of the pipeline.

    A module of several stages has a dict of them: argument → sections, the first without an argument."""
    module, arguments = ran_by(stage)
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["SECTIONS"]:
            meant = {"MODEL": arguments[:1], "MODELS": model_names()}
            listed = ast.literal_eval(node.value)
            if isinstance(listed, dict): listed = listed[arguments[0] if arguments else next(iter(listed))]
            return tuple(name for section in listed for name in meant.get(section, [section]))
    raise AssertionError(f"{module} has no SECTIONS = (...): the sections of params.yaml that it reads")


def taken_by_name(module: str) -> bool:
    "Whether a module takes a section whose name it was given: p[model]."
    return any(isinstance(n, ast.Subscript) and isinstance(n.value, ast.Name) and n.value.id == "p" and isinstance(n.slice, ast.Name)
               for n in ast.walk(tree(module)))


def words(module: str) -> set[str]:
    "The names by which a module could take a section out of its parameters: attributes, keys, arguments; not SECTIONS itself."
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute): found.add(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant): found.add(node.slice.value)
        elif isinstance(node, ast.Call):
            found |= {k.arg for k in node.keywords} | {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


def test_the_stages():
    order = ["prepare", "train@dover", "train@vjepa2", "evaluate@dover", "evaluate@vjepa2", "compare", "report"]
    main = [s for s in ALL if "/" not in s.name]
    assert [s.name for s in main] == order
    assert [ran_by(s) for s in main] == [(f"{PIPELINE}.{name}", model) for name, *model in (o.split("@") for o in order)]


def test_each_module_that_runs_is_a_stage():
    ran = {module_of(s) for s in ALL}
    there = {m for m in modules() if m.startswith(tuple(f"{PACKAGE}.{folder}." for folder in STAGES_OF))}
    runnable = {m for m in there if '__name__ == "__main__"' in modules()[m].read_text(encoding="utf-8")}
    assert ran == runnable, "the modules that can be run and the stages of the dvc.yaml files are the same"


@EACH
def test_modules(stage):
    "Declared = imported, through others and inside functions too."
    declared = sorted(d for d in from_root(stage, "deps") if d.split("/")[0] == PACKAGE)
    needed = deps_of(module_of(stage))
    assert declared == needed, f"{stage.name} needs under deps:\n" + "\n".join(f"      - {d}" for d in needed)


def test_the_road_does_not_lead_into_experiments():
    "Pretraining and experiments are built on Part I, and no stage of the pipeline needs them."
    for stage in ALL:
        part = module_of(stage).split(".")[1]
        closed = {"pretraining", "experiments", "official"} - {part} - ({"pretraining"} if part == "experiments" else set())
        assert not (wrong := [d for d in deps_of(module_of(stage)) if d.split("/")[1] in closed]), f"{stage.name}: {wrong}"


@EACH
def test_sections(stage):
    "Declared = SECTIONS, under every profile."
    declared, sections = sections_declared(stage), sections_of(stage)
    assert set(declared) == set(sections), f"{stage.name}: dvc.yaml declares {sorted(declared)}, the module reads {sorted(sections)}"
    for name, under in declared.items():
        assert under in ({"*"}, {"-"}, set(PROFILES)), f"{stage.name}: {name} is declared under {sorted(under)} only; {PROFILES} or ${{profile}}"
    if any("-" not in under for under in declared.values()):
        assert "profile" in keys_declared(stage), f"{stage.name} reads sections of a profile and does not declare `profile`"


@EACH
def test_sections_are_used(stage):
    "SECTIONS says neither more nor less than the module takes out of its parameters."
    module = module_of(stage)
    taken = words(module) | ({*model_names(), *ran_by(stage)[1]} if taken_by_name(module) else set())
    unused = [s for s in sections_of(stage) if s not in taken]
    assert not unused, f"{module}: {unused} in SECTIONS, and nothing in the module takes it"


@EACH
def test_sections_exist(stage):
    "Every key that is declared is there, in each profile."
    for key in keys_declared(stage):
        for profile in PROFILES:
            at = PARAMS
            for part in re.sub(r"\$\{\s*profile\s*\}", profile, key).split("."):
                assert isinstance(at, dict) and part in at, f"{stage.name}: params.yaml has no {key} ({profile})"
                at = at[part]


def test_every_section_is_read_by_a_stage():
    read = set().union(*(sections_declared(s) for s in ALL)) | {"profile"}
    there = {s for profile in PROFILES for s in PARAMS[profile]} | {k for k in PARAMS if k not in PROFILES}
    assert there == read, f"in params.yaml and read by no stage: {sorted(there - read)}"


def test_profiles_have_the_same_sections():
    assert PARAMS["profile"] in PROFILES
    assert sorted(PARAMS["embedded"]) == sorted(PARAMS["paper"])


def test_only_the_edges_read_parameter_files():
    "Constructors take values: outside of the stages and the command line nothing opens params.yaml."
    edges, readers = tuple(f"{PACKAGE}.{folder}" for folder in (*STAGES_OF, "cli", "commands")), []
    for module in modules():
        docs = {id(n.body[0].value) for n in ast.walk(tree(module)) if isinstance(n, (ast.Module, ast.FunctionDef, ast.ClassDef))
                and n.body and isinstance(n.body[0], ast.Expr)}
        named = [n for n in ast.walk(tree(module)) if isinstance(n, ast.Constant) and n.value == "params.yaml" and id(n) not in docs]
        if named and not module.startswith(edges): readers.append(module)
    assert not readers, readers


@EACH
def test_every_dep_comes_from_somewhere(stage):
    "A dep is a file of the repository, data that a .dvc file tracks, or another stage's out."
    made = {p.rstrip("/") for s in ALL for kind in ("outs", "metrics", "plots") for p in from_root(s, kind)}
    made |= {o["path"] for f in ROOT.glob("*.dvc") if f.is_file() for o in yaml.safe_load(f.read_text())["outs"]}
    for dep in from_root(stage, "deps"):
        if "${" in dep or dep.startswith("datasets/"): continue        # where a user's own data lie
        known = any(dep.rstrip("/") == m or dep.startswith(m + "/") or m.startswith(dep.rstrip("/") + "/") for m in made)
        assert known or (ROOT/dep).exists(), f"{stage.name}: {dep} is neither there nor made by a stage"
