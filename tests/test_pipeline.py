"""The main job in miniature: in a temporary repository, data from dvcstore/, the stages over some clips, for both models, the table, scores.

The repository is the working tree as it is, committed; its parameters are smaller and its label files shorter."""
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import yaml
from forked import Forked, stage

from chapters import ROOT
from qualivision.cli import main
from qualivision.models.dover_mos import DoverPlusPlus
from qualivision.models.bodies import save_body
from qualivision.pipeline.report import readme_results, report
from qualivision.quality import DIMENSIONS
from qualivision.pretraining.tasks import asking
from qualivision.training.train import model_config

PROMPTS = {"train": 5, "val": 2, "test": 3}     # of five clips each
SMALL = {   # of the profile embedded: networks that are trained in seconds and know nothing
    "prepare": {"workers": 0},
    "dover": {
        "model": {"frames": 6, "size": 72, "dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "stem": [1, 6, 6], "kernel": [3, 3, 3], "grid": [2, 2, 2],
                  "fusion_width": 16, "freeze_backbone": False},
        "pretrained": None,
        "train": {"epochs": 2, "batch_size": 10, "accumulation": 1, "warmup_steps": 1, "validate_every": 1}},
    "vjepa2": {
        "model": {"frames": 6, "size": 64, "hidden_size": 32, "layers": 3, "encoder_heads": 2, "patch": 16, "grid": [3, 2, 2], "fusion_width": 16},
        "pretrained": None, "trunk": {"epochs": 1, "warmup_steps": 1, "lr_multipliers": {}},
        "train": {"epochs": 1, "batch_size": 10, "accumulation": 1, "warmup_steps": 1, "validate_every": 1}},
    "scratch": {"dover": {"train": {"epochs": 1, "warmup_steps": 1}},
                "vjepa2": {"model": {"encoder_heads": 2}, "trunk": {"epochs": 2, "warmup_steps": 1}, "train": {"epochs": 1, "warmup_steps": 1}}},
    "learning": {"clips": [10, 25], "seeds": [0, 1], "steps": 3},
    "evaluate": {"resamples": 100, "device": "cpu"}}
MODELS = ["dover", "vjepa2"]
STAGES = ["prepare", *(f"{stage}@{model}" for stage in ("train", "evaluate") for model in MODELS), "compare", "report"]
FILES = {"splits.json", "prepare.json", "metrics.json", "predictions.csv", "rows.csv", "compare.json", "intervals.json", "generators.json",
         "summary.json", "README.md", "table.txt", "report.html", "road.png", "rows.png", "scatter.png", "curves.png", "experiments/scratch/.gitkeep",
         *(f"{m}/{f}" for m in MODELS for f in ("train.json", "curves.csv", "predictions.csv", "validation.csv", "evaluate.json"))}

pytestmark = pytest.mark.usefixtures("one_thread")      # what is forked may not wait for threads that it has not
if not (ROOT/".git").exists(): pytest.skip("not a git checkout", allow_module_level=True)
if not (ROOT/"data.dvc").exists(): pytest.skip("there is no data.dvc yet", allow_module_level=True)


def test_readme_shows_these_results():
    "The table in README.md is that of results/; skipped where a run of one's own has changed them since the commit."
    changed = subprocess.run(["git", "status", "--porcelain", "--", "results"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if changed: pytest.skip("results/ differs from the commit: make README.md again from nbs/index.ipynb to publish it")
    shown = readme_results(ROOT/"results").replace("](../", "](").splitlines()
    readme = (ROOT/"README.md").read_text(encoding="utf-8").splitlines()
    assert not [line for line in shown if line not in readme], "execute nbs/index.ipynb and make README.md from it"
    assert (ROOT/"results"/"README.md").read_text(encoding="utf-8") == report(ROOT/"results"), "run the report stage"


class Repository:
    "A repository of its own in a temporary folder."
    def __init__(self, at: Path): self.at = at

    def __call__(self, *command: str, status=0) -> str:
        "Runs a command there and returns its stdout; its status must be this one."
        own = Path(sys.executable).parent
        env = {**os.environ, "PATH": f"{own}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1", "MPLBACKEND": "Agg",
               "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a",
               "GIT_COMMITTER_EMAIL": "a@b"}
        for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"): env.pop(name, None)     # set where a hook runs the tests
        done = subprocess.run(command, cwd=self.at, capture_output=True, text=True, env=env)
        assert done.returncode == status, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        self.said = done.stdout + done.stderr
        return done.stdout

    def stage(self, module: str, *arguments):
        "Runs a stage as its command does, in a fork of this process: nothing is imported again."
        process = stage(self.at, module, *arguments, MPLBACKEND="Agg", HF_HUB_OFFLINE="1")
        self.said = "".join(process.communicate())
        assert process.returncode == 0, self.said

    def qualivision(self, *arguments: str):
        "What the command prints as JSON, run in a fork."
        process = Forked(main, *arguments, "--json", cwd=self.at, env={"HF_HUB_OFFLINE": "1"})
        out, self.said = process.communicate()
        assert process.returncode == 0, self.said
        return json.loads(out)

    def dvc(self, *args: str, **kw) -> str: return self(sys.executable, "-m", "dvc", *args, **kw)
    def results(self) -> dict[str, bytes]:
        return {p.relative_to(self.at/"results").as_posix(): p.read_bytes() for p in sorted((self.at/"results").rglob("*")) if p.is_file()}

    def json(self, name: str): return json.loads((self.at/"results"/name).read_text(encoding="utf-8"))

    def params(self, change):
        "Lets `change` alter params.yaml."
        file = self.at/"params.yaml"
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        change(values)
        file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def smaller(values: dict):
    values["profile"] = "embedded"
    values["data"]["root"] = "data"
    for section, changes in SMALL.items(): change(values["embedded"][section], changes)


def change(values: dict, changes: dict):
    "These values, and in their sections these."
    for k, v in changes.items():
        if isinstance(v, dict) and isinstance(values.get(k), dict): change(values[k], v)
        else: values[k] = v


def cut(data: Path):
    "Some prompts of each split."
    for file in data.glob("*/**/*_labels.csv"):
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
        split = file.relative_to(data).parts[0]
        few = table[table["Prompt"].isin(table["Prompt"].drop_duplicates()[:PROMPTS[split]])]
        file.unlink()
        few.to_csv(file, index=False)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Repository:
    "The working tree, committed, with data pulled and cut, after `dvc repro`."
    at = tmp_path_factory.mktemp("pipeline")/"clone"
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                            check=True)
    for name in filter(None, set(listed.stdout.split("\0"))):
        if not (ROOT/name).is_file() or name.split("/")[0] in ("results", "nbs"): continue
        (at/name).parent.mkdir(parents=True, exist_ok=True)
        (at/name).write_bytes((ROOT/name).read_bytes())
    (at/"dvc.lock").unlink(missing_ok=True)
    (at/"results"/"experiments"/"scratch").mkdir(parents=True)
    (at/"results"/"experiments"/"scratch"/".gitkeep").touch()
    clone = Repository(at)
    clone.params(smaller)
    clone("git", "init", "-q")
    clone("git", "add", "-A")
    clone("git", "commit", "-q", "-m", "all")
    clone.dvc("pull", "data.dvc", "pretrained.dvc")
    cut(at/"data")
    clone.dvc("repro")
    return clone


def test_results(repository):
    "Every file is there, the table has its rows, and each number its interval or the reason why there is none."
    assert set(repository.results()) == FILES
    metrics, about = repository.json("metrics.json"), repository.json("compare.json")
    rows = [*MODELS, "constant", "generator", "text", "text_generator", "low_level", "hand_crafted", "ceiling", "raters"]
    assert list(metrics) == [*rows, "differences"] and not about["omitted"] and about["models"] == MODELS
    for row in rows:
        for d in DIMENSIONS:
            assert metrics[row][d]["n"] == 5 * PROMPTS["test"] == about["videos"]
            for m in ("srocc", "plcc", "mae", "rmse"):
                cell = metrics[row][d][m]
                assert cell["low"] <= cell["high"] if cell["value"] is not None else cell["reason"]
    assert list(metrics["differences"]["dover"]) == rows[2:-2] and list(metrics["differences"]["vjepa2"]) == ["dover", *rows[2:-2]]
    assert metrics["ceiling"]["traditional"]["srocc"]["value"] > .8
    assert repository.json("splits.json")["prompts"] == PROMPTS
    tried = repository.json("intervals.json")
    for m in MODELS: assert all((c["n"], c["clips"]) == (5 * PROMPTS["test"], 5 * PROMPTS["val"]) for c in tried[m].values())
    assert "simulated labels" in about["labels"] and "The labels are simulated:" in (repository.at/"results"/"README.md").read_text()
    table = (repository.at/"results"/"table.txt").read_text()
    assert max(map(len, table.splitlines())) <= 60 and all(name in table for name in ("DOVER++", "V-JEPA 2", "text+gen.", "handcraft", "ceiling"))
    assert "V-JEPA 2 has no pretraining: its encoder, the trunk, was trained" in " ".join(table.split())
    trained = repository.json("vjepa2/train.json")
    assert trained["parameters"]["trunk"]["lr_multipliers"] == {} and trained["parameters"]["train"]["lr_multipliers"] and not trained["pretrained"]
    phases = pd.read_csv(repository.at/"results"/"vjepa2"/"curves.csv")["phase"]
    assert list(phases) == ["trunk", "main"] and "phase" not in pd.read_csv(repository.at/"results"/"dover"/"curves.csv")


def test_results_tell_no_time_and_no_machine(repository):
    words = [str(repository.at), sys.prefix, time.strftime("%Y-%m-%d"), *([platform.node()] if len(platform.node()) > 6 else [])]
    for name, content in repository.results().items(): assert not [w for w in words if w.encode() in content], name
    times = [json.loads(line) for line in (repository.at/"work"/"machine.jsonl").read_text().splitlines()]
    ran = [t["stage"] for t in times]
    assert sorted(ran) == sorted(STAGES) and in_order(ran)
    ignored = repository("git", "status", "--short", "--ignored")
    assert all(f"!! {folder}/" in ignored for folder in ("work", "checkpoints", "cache", "runs", "data"))


def test_nothing_is_left_to_do(repository):
    repository.dvc("repro")
    assert "up to date" in repository.said and "Running stage" not in repository.said
    repository.dvc("repro", "--dry", "--force", "report")
    assert all(f"Running stage '{s}'" in repository.said for s in STAGES)


def in_order(ran: list[str]) -> bool:
    "Whether no stage ran before one that it needs."
    at = {stage: ran.index(stage) for stage in ran}
    return (all(at["prepare"] < at[f"train@{m}"] < at[f"evaluate@{m}"] < at["compare"] for m in MODELS)) and at["compare"] < at["report"]


def test_each_model_on_its_own(repository):
    "A setting of one model concerns its own training and scoring, and what compares them."
    before = (repository.at/"params.yaml").read_text()
    repository.params(lambda values: values["embedded"]["vjepa2"]["train"].update(lr=0.123))
    try:
        repository.dvc("repro", "--dry")
        assert "Running stage 'train@vjepa2'" in repository.said and "Running stage 'train@dover'" not in repository.said
    finally: (repository.at/"params.yaml").write_text(before)
    repository.dvc("exp", "run", "--queue", "--name", "other", "-S", "embedded.dover.train.seed=1", "-S",
                   "embedded.vjepa2.train.lr_multipliers.head=3.0")
    repository.dvc("exp", "remove", "--queue")
    assert (repository.at/"params.yaml").read_text() == before


def test_dvc_metrics(repository):
    shown = json.loads(repository.dvc("metrics", "show", "--json"))
    values = json.dumps(shown)
    assert "results/summary.json" in values and "share_of_ceiling" in values
    named = json.dumps(json.loads(repository.dvc("metrics", "show", "--json", "results/metrics.json")))
    assert "text_generator" in named


def test_scores_follow_from_the_files(repository):
    "`qualivision evaluate` on what was written gives what the table says."
    made = repository.qualivision("evaluate", "results/predictions.csv", "data/test/test_labels.csv")
    for d in DIMENSIONS: assert round(made[d]["srocc"], 4) == round(repository.json("metrics.json")["dover"][d]["srocc"]["value"], 4)
    assert (repository.at/"results"/"predictions.csv").read_text().startswith("video_name,Prompt,Traditional_MOS,")


def test_score_one_clip(repository):
    row = pd.read_csv(repository.at/"data"/"test"/"test_labels.csv").iloc[0]
    clip = "score", f"data/test/videos/{row['video_name']}", "--prompt", row["Prompt"]
    carried, = repository.qualivision(*clip)
    assert carried["checkpoint"] == "qualivision/frames"    # unless told otherwise, whatever lies in checkpoints/
    record, = repository.qualivision(*clip, "--checkpoint", "checkpoints/dover")
    other, = repository.qualivision(*clip, "--checkpoint", "checkpoints/vjepa2")
    assert other["model"] == "vjepa2"
    known = json.loads((repository.at/"checkpoints"/"dover.intervals.json").read_text())["dimensions"]
    assert {d: v is None for d, v in record["interval"].items()} == {d: "reason" in about for d, about in known.items()}
    for file, r in (("predictions.csv", record), ("dover/predictions.csv", record), ("vjepa2/predictions.csv", other)):
        predicted = pd.read_csv(repository.at/"results"/file).set_index("video_name").loc[row["video_name"]]
        for d in DIMENSIONS: assert abs(r[d] - predicted[f"{d.capitalize()}_MOS"]) < 1e-4
    assert record["error"] is None and record["trained_on"].startswith("simulated labels, data ")


def test_paper_profile(repository):
    "Its parameters reach every stage that reads some; the report reads none of a profile, and waits for what the others write."
    before = (repository.at/"params.yaml").read_text()
    repository.params(lambda values: values.update(profile="paper"))
    try:
        repository.dvc("repro", "--dry")
        assert [s for s in STAGES if f"Running stage '{s}'" in repository.said] == STAGES[:-1]
    finally: (repository.at/"params.yaml").write_text(before)


def test_rows_from_noise(repository):
    "The pipeline of its own leaves what the table takes."
    before, kept = repository.results(), repository.at/"results"/"experiments"/"scratch"
    for model in MODELS:
        repository.stage("experiments.scratch", model)
        (kept/model).mkdir()
        for name in ("train.json", "curves.csv", "predictions.csv", "evaluate.json"):
            (kept/model/name).write_bytes((repository.at/"work"/"scratch"/model/name).read_bytes())
    repository.stage("pipeline.compare"), repository.stage("pipeline.report")
    try:
        metrics, about = repository.json("metrics.json"), repository.json("compare.json")
        assert list(metrics)[:4] == [*MODELS, "dover_scratch", "vjepa2_scratch"] and not about["omitted"]
        assert "dover_scratch" in metrics["differences"]["dover"] and "D. noise" in (repository.at/"results"/"table.txt").read_text()
        assert repository.json("experiments/scratch/dover/train.json")["parameters"]["train"]["epochs"] == 1
        assert repository.json("experiments/scratch/vjepa2/train.json")["parameters"]["trunk"]["epochs"] == 2
    finally:
        for model in MODELS: shutil.rmtree(kept/model)
        for name, found in before.items(): (repository.at/"results"/name).write_bytes(found)     # for the tests that follow


def test_learning_curves(repository):
    "Both starts, both amounts, both seeds; with a body that fits these small sizes. It goes on where it was killed."
    before = (repository.at/"params.yaml").read_text()
    values = yaml.safe_load(before)["embedded"]["dover"]["model"]
    config = asking(model_config(values["config"], {k: v for k, v in values.items() if k != "config"}))
    save_body(repository.at/"work"/"body", DoverPlusPlus(config), {"licence": "MIT", "trained_on": "nothing", "config": asdict(config)})
    repository.params(lambda values: values["embedded"]["dover"].update(pretrained="work/body"))
    kept = repository.at/"results"/"experiments"/"learning-dover.json"
    try:
        repository.stage("experiments.learning", "dover")
        curves, content = repository.json("experiments/learning-dover.json")["curves"], kept.read_bytes()
        assert list(curves) == ["pretrained", "noise"] and all(list(c) == ["10", "25"] for c in curves.values())
        for cell in (c for start in curves.values() for amount in start.values() for c in amount.values()):
            assert cell["low"] <= cell["mean"] <= cell["high"] and len(cell["seeds"]) == 2
        folder = next((repository.at/"runs"/"learning").iterdir())
        about = {start: json.loads((folder/f"{start}-10-0"/"checkpoint"/"model.json").read_text()) for start in curves}
        assert about["pretrained"]["body"] and not about["noise"].get("body") and curves["pretrained"] != curves["noise"]
        runs = sorted((repository.at/"runs"/"learning").glob("*/*.json"))
        assert len(runs) == 8
        runs[3].unlink(); kept.unlink()
        again = {p: p.stat().st_mtime_ns for p in runs if p.exists()}
        repository.stage("experiments.learning", "dover")
        assert kept.read_bytes() == content and all(p.stat().st_mtime_ns == t for p, t in again.items())
    finally:
        kept.unlink(missing_ok=True)
        (repository.at/"params.yaml").write_text(before)
