"""What dvc.yaml declares is what the stages use: every module that a stage imports, and every section of params.yaml that it reads.

A dependency that is missing gives an old result after a change; one too many runs an hour again for nothing."""
import ast
import re

import pytest
import yaml

from chapters import PACKAGE, ROOT, is_package, modules, reached_from

if not (ROOT/"dvc.yaml").exists() or not (ROOT/"params.yaml").exists():
    pytest.skip("there is no dvc.yaml or params.yaml yet", allow_module_level=True)

STAGES = yaml.safe_load((ROOT/"dvc.yaml").read_text())["stages"]
PARAMS = yaml.safe_load((ROOT/"params.yaml").read_text())
PROFILES = ("embedded", "paper")
PIPELINE = f"{PACKAGE}.pipeline"


def body(stage: str) -> dict:
    "A stage's cmd, deps, params and outs, those of a matrix or foreach stage too."
    return STAGES[stage].get("do", STAGES[stage])


def module_of(stage: str) -> str:
    "The module that a stage runs."
    cmd = body(stage)["cmd"]
    ran = re.match(rf"python -m ({re.escape(PIPELINE)}\.\w+)\b", cmd if isinstance(cmd, str) else " && ".join(cmd))
    assert ran, f"{stage} runs `{cmd}`: a stage is `python -m {PIPELINE}.NAME`"
    return ran[1]


def paths(entries) -> list[str]:
    "The paths of deps or outs, which are names, or {name: options}."
    return [next(iter(e)) if isinstance(e, dict) else e for e in entries or ()]


def files_declared(stage: str) -> dict[str, set[str]]:
    "{each dep in the package: the modules that it covers}."
    covered = {}
    for dep in paths(body(stage).get("deps")):
        if dep.split("/")[0] != PACKAGE: continue
        covered[dep] = {name for name, file in modules().items() if not is_package(name)
                        and (file.relative_to(ROOT).as_posix() == dep or file.relative_to(ROOT).as_posix().startswith(dep.rstrip("/") + "/"))}
    return covered


def keys_declared(stage: str) -> list[str]:
    "The keys of params.yaml that a stage declares."
    keys = []
    for entry in body(stage).get("params") or ():
        if isinstance(entry, str): keys.append(entry)
        else:
            assert list(entry) == ["params.yaml"], f"{stage}: parameters from {list(entry)}; run values live in params.yaml alone"
            assert entry["params.yaml"], f"{stage}: all of params.yaml; name the sections"
            keys += entry["params.yaml"]
    return keys


def sections_declared(stage: str) -> dict[str, set[str]]:
    "{section: the profiles under which it is declared}, `*` for the one that is chosen, `-` for a section outside of the profiles."
    found: dict[str, set[str]] = {}
    for key in keys_declared(stage):
        key = re.sub(r"\$\{\s*profile\s*\}", "*", key)
        first, _, rest = key.partition(".")
        if first == "profile": continue
        section = rest.split(".")[0] if first in (*PROFILES, "*") else first
        assert section, f"{stage}: all of `{first}`; name the sections"
        found.setdefault(section, set()).add(first if first in (*PROFILES, "*") else "-")
    return found


def tree(module: str) -> ast.Module: return ast.parse(modules()[module].read_text(encoding="utf-8"))


def sections_of(module: str) -> tuple[str, ...]:
    "The literal SECTIONS of a stage's module."
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["SECTIONS"]:
            return tuple(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no SECTIONS = (...): the sections of params.yaml that it reads")


def words(module: str) -> set[str]:
    "The names by which a module could take a section out of its parameters: attributes, keys, arguments; not SECTIONS itself."
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute): found.add(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant): found.add(node.slice.value)
        elif isinstance(node, ast.Call):
            found |= {k.arg for k in node.keywords} | {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


def test_the_four_stages():
    assert [module_of(s).split(".")[-1] for s in ("prepare", "train", "evaluate", "report")] == ["prepare", "train", "evaluate", "report"]


def test_each_pipeline_module_is_a_stage():
    ran, there = {module_of(s) for s in STAGES}, {m for m in modules() if m.startswith(PIPELINE + ".")}
    runnable = {m for m in there if '__name__ == "__main__"' in modules()[m].read_text(encoding="utf-8")}
    assert ran == runnable, "modules of pipeline/ that can be run and the stages of dvc.yaml are the same"


@pytest.mark.parametrize("stage", STAGES)
def test_modules(stage):
    "Declared = imported, through others and inside functions too."
    used, covered = reached_from(module_of(stage)), files_declared(stage)
    declared = set().union(*covered.values())
    assert not (used - declared), f"{stage} imports these and does not declare them under deps: {sorted(used - declared)}"
    assert not (declared - used), f"{stage} declares these under deps and does not import them: {sorted(declared - used)}"
    assert not [d for d, names in covered.items() if not names], f"{stage}: no such module: {[d for d, n in covered.items() if not n]}"


@pytest.mark.parametrize("stage", STAGES)
def test_sections(stage):
    "Declared = SECTIONS, under every profile."
    declared, sections = sections_declared(stage), sections_of(module_of(stage))
    assert set(declared) == set(sections), f"{stage}: dvc.yaml declares {sorted(declared)}, the module reads {sorted(sections)}"
    for name, under in declared.items():
        assert under in ({"*"}, {"-"}, set(PROFILES)), f"{stage}: {name} is declared under {sorted(under)} only; {PROFILES} or ${{profile}}"
    if any("-" not in under for under in declared.values()):
        assert "profile" in keys_declared(stage), f"{stage} reads sections of a profile and does not declare `profile`"


@pytest.mark.parametrize("stage", STAGES)
def test_sections_are_used(stage):
    "SECTIONS says neither more nor less than the module takes out of its parameters."
    module = module_of(stage)
    unused = [s for s in sections_of(module) if s not in words(module)]
    assert not unused, f"{module}: {unused} in SECTIONS, and nothing in the module takes it"


@pytest.mark.parametrize("stage", STAGES)
def test_sections_exist(stage):
    "Every key that is declared is there, in each profile."
    for key in keys_declared(stage):
        for profile in PROFILES:
            at = PARAMS
            for part in re.sub(r"\$\{\s*profile\s*\}", profile, key).split("."):
                assert isinstance(at, dict) and part in at, f"{stage}: params.yaml has no {key} ({profile})"
                at = at[part]


def test_every_section_is_read_by_a_stage():
    read = set().union(*(sections_declared(s) for s in STAGES)) | {"profile"}
    there = {s for profile in PROFILES for s in PARAMS[profile]} | {k for k in PARAMS if k not in PROFILES}
    assert there == read, f"in params.yaml and read by no stage: {sorted(there - read)}"


def test_profiles_have_the_same_sections():
    assert PARAMS["profile"] in PROFILES
    assert sorted(PARAMS["embedded"]) == sorted(PARAMS["paper"])


def test_only_the_edges_read_parameter_files():
    "Constructors take values: outside of pipeline/ and the command line nothing opens params.yaml."
    readers = []
    for module in modules():
        docs = {id(n.body[0].value) for n in ast.walk(tree(module)) if isinstance(n, (ast.Module, ast.FunctionDef, ast.ClassDef))
                and n.body and isinstance(n.body[0], ast.Expr)}
        named = [n for n in ast.walk(tree(module)) if isinstance(n, ast.Constant) and n.value == "params.yaml" and id(n) not in docs]
        if named and not module.startswith(PIPELINE + ".") and module != f"{PACKAGE}.cli": readers.append(module)
    assert not readers, readers


@pytest.mark.parametrize("stage", STAGES)
def test_every_dep_comes_from_somewhere(stage):
    "A dep is a file of the repository, data that a .dvc file tracks, or another stage's out."
    made = {p.rstrip("/") for s in STAGES for kind in ("outs", "metrics", "plots") for p in paths(body(s).get(kind))}
    made |= {o["path"] for f in ROOT.glob("*.dvc") if f.is_file() for o in yaml.safe_load(f.read_text())["outs"]}
    for dep in paths(body(stage).get("deps")):
        if "${" in dep: continue        # where a user's own data lie
        known = any(dep.rstrip("/") == m or dep.startswith(m + "/") or m.startswith(dep.rstrip("/") + "/") for m in made)
        assert known or (ROOT/dep).exists(), f"{stage}: {dep} is neither there nor made by a stage"
