"Pretraining: nothing of validation or test in it, a killed run ends as an undisturbed one, and training starts from what it leaves behind."
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from qualivision.data.simulate import SEED, SPLITS, plan
from qualivision.data.stream import CAUSE_NAMES, Reserved, lesson, reserved
from qualivision.models.transfer import body_names, config_for, start_from_body, unpack
from qualivision.models import weights
from qualivision.models.qualivision import DoverPlusPlus, VJepaMos
from qualivision.models.weights import REGISTRY, Entry, WeightsError, read_state
from qualivision.pipeline import pretrain as stage
from qualivision.training import trainer
from qualivision.training.pretrain import asking
from qualivision.training.trainer import Task, TrainError, model_config, train_model

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = {"config": "vjepa2_embedded", "frames": 4, "size": 48, "patch": 16, "hidden_size": 48, "layers": 2, "encoder_heads": 2, "mlp_ratio": 2.,
         "grid": [2, 3, 3], "fusion_width": 16, "heads": 2, "fused_dim": 16, "bank": [], "frozen_dtype": "float32"}
SHORT = {"window": 4, "masked_windows": 1, "windows": 2, "passes": 1, "batch_size": 4, "warmup_steps": 1, "judge_clips": 4, "workers": 0,
         "precision": "no", "device": "cpu"}


def params(folder: Path) -> Path:
    "A folder to run the stage in."
    folder.mkdir()
    (folder/"params.yaml").write_text(yaml.safe_dump({"profile": "mini", "mini": {
        "text": {"encoder": "minilm"},
        "pretrain": {"vjepa2": SHORT, "dover": None, "short": {"windows": 1, "masked_windows": 0}},
        "vjepa2": {"model": MODEL}, "dover": {"model": {}}}}))
    return folder


def run(folder: Path, *arguments, **kw):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "qualivision.pipeline.pretrain", *arguments], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "What the stage writes, undisturbed."
    folder = params(tmp_path_factory.mktemp("pretrain")/"whole")
    done = run(folder, "vjepa2")
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    return folder/"work"/"pretrain"/"vjepa2"


# --- nothing leaks ---

def told(split: str) -> set[str]:
    "The prompts of a split of the embedded set, from its label file where it is here, in lower case."
    file = next(iter(sorted((ROOT/"data"/split).rglob("*_labels.csv"))), None)
    if file is None: pytest.skip("data/ is not restored: dvc pull data.dvc")
    with open(file, encoding="utf-8", newline="") as f: return {row["Prompt"].lower() for row in csv.DictReader(f)}


def leaks(taken=None, count=6000) -> tuple[int, int]:
    "Lessons that show a scene of validation or test, and prompts of theirs among all prompts of the lessons."
    scenes = {c.scene for c in plan(SPLITS, SEED) if c.split != "train"}
    prompts, lessons = told("val") | told("test"), [lesson(7, i, side, taken=taken) for side in ("learn", "judge") for i in range(0, count, 2)]
    return sum(x.causes.shown in scenes for x in lessons), sum(p.lower() in prompts for x in lessons for p in x.prompts)


def test_no_scene_and_no_prompt_of_validation_or_test():
    assert told("val") | told("test") == reserved().prompts
    assert leaks() == (0, 0)


def test_without_the_exclusion_they_would_come():
    assert leaks(Reserved())[0] > 20


def test_every_prompt_is_checked_those_that_do_not_fit_too():
    "With one phrase after the other reserved, none of them is drawn."
    free = [lesson(7, i) for i in range(0, 60, 2)]
    taken = Reserved(frozenset(p.lower() for x in free for p in x.prompts), frozenset())
    again = [lesson(7, i, taken=taken) for i in range(0, 60, 2)]
    assert not {p.lower() for x in again for p in x.prompts} & taken.prompts


# --- the stage ---

def test_the_body_and_its_card(made):
    about = json.loads((made/"model.json").read_text())
    assert about["body_of"] == "VJepaMos" and about["pretrain"]["seed"] == 7 and "12 simulated clips" in about["trained_on"]
    assert {"judged_severity", "judged_attribute", "judged_match", "severity_freeze", "attribute_motion"} <= set(about["figures"])
    assert [row["phase"] for row in csv.DictReader(open(made/"curves.csv"))] == ["masked", "tasks", "tasks"]


def test_killed_it_ends_as_an_undisturbed_run(made, tmp_path):
    folder = params(tmp_path/"killed")
    process = run(folder, "vjepa2")
    until = time.monotonic() + 200
    while not list(folder.glob("runs/pretrain/*/state.pt")) and time.monotonic() < until and process.poll() is None: time.sleep(.02)
    process.send_signal(signal.SIGKILL); process.communicate()
    assert not (folder/"work"/"pretrain"/"vjepa2").exists(), "it was over before it could be killed"
    again = run(folder, "vjepa2")
    err = again.communicate(timeout=300)[1]
    assert again.returncode == 0, err
    assert "window 1/" not in err                       # it went on
    for name in ("model.safetensors", "model.json", "curves.csv"):
        assert (made/name).read_bytes() == (folder/"work"/"pretrain"/"vjepa2"/name).read_bytes(), name


def test_nothing_is_frozen_in_pretraining():
    "Though fine-tuning, whose section the configuration comes from, freezes the backbone of both."
    for kind, name in ((DoverPlusPlus, "embedded"), (VJepaMos, "vjepa2_embedded")):
        frozen = model_config(name, {"freeze_backbone": True} if kind is DoverPlusPlus else {})
        assert kind(frozen).frozen and not kind(asking(frozen)).frozen
        assert all(p.requires_grad for p in kind(asking(frozen)).parameters())


def test_a_short_run_leaves_its_figures(tmp_path):
    folder, found = params(tmp_path/"short"), []
    for _ in range(2):
        process = run(folder, "vjepa2", "short")
        err = process.communicate(timeout=300)[1]
        assert process.returncode == 0, err
        found.append((folder/"results"/"pretrain-short"/"vjepa2.json").read_bytes())
        shutil.rmtree(folder/"runs")
    about = json.loads(found[0])
    assert found[0] == found[1] and about["pretrain"]["windows"] == 1 and "judged_severity" in about["figures"]
    assert not (folder/"work"/"pretrain").exists()
    process = run(folder, "vjepa2", "long")
    assert "full or short" in process.communicate(timeout=100)[1] and process.returncode == 1


def test_a_profile_without_settings_says_so(tmp_path):
    process = run(params(tmp_path/"none"), "dover")
    err = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and "pretrain.dover" in err and "Traceback" not in err


# --- training from it ---

def config(body=None, **kw):
    "Of the model of this file; with a body, asking for what it can name."
    plain = model_config("vjepa2_embedded", {**{k: v for k, v in MODEL.items() if k != "config"}, **kw})
    return config_for(plain, body) if body else plain


def start(made, tmp_path, monkeypatch, **kw):
    "Trains a step from the body; the model as it was before the first step."
    root, seen = tmp_path/"set" if (tmp_path/"set").exists() else tiny.data_set(tmp_path/"set"), {}
    real = trainer.fit

    def spy(model, *args, **kwargs):
        seen["state"] = {k: v.clone() for k, v in model.state_dict().items()}
        return real(model, *args, **kwargs)
    monkeypatch.setattr(trainer, "fit", spy)
    task = Task(root, tmp_path/"out", tmp_path/"runs", tmp_path/"cache", pretrained=str(made), licence="MIT")
    return train_model(task, model_config("vjepa2_embedded", {k: v for k, v in MODEL.items() if k != "config"}),
                       tiny.settings(epochs=1, warmup_steps=1), progress=False, **kw), seen["state"]


def test_training_starts_from_the_body(made, tmp_path, monkeypatch):
    result, state = start(made, tmp_path, monkeypatch)
    body = unpack(read_state(made/"model.safetensors"))
    assert len(body) > 50 and all(torch.equal(state[name], value.to(state[name].dtype)) for name, value in body.items())
    about = json.loads((tmp_path/"out"/"model.json").read_text())
    assert about["body"] == json.loads((made/"model.json").read_text())["sha256"] and about["licence"] == "MIT"
    assert about["config"]["causes"] == list(CAUSE_NAMES) and "causes.path.weight" in body


def test_a_body_is_known_by_its_name(made, tmp_path, monkeypatch):
    e = Entry("qualivision/tool", "model.safetensors", "MIT", "a test", shipped="pretrained/tool")
    monkeypatch.setitem(REGISTRY, e.name, e)
    monkeypatch.setattr(weights, "PACKAGE", tmp_path/"qualivision")
    with pytest.raises(WeightsError, match="dvc pull pretrained.dvc"): start("qualivision/tool", tmp_path, monkeypatch)
    shutil.copytree(made, tmp_path/"pretrained"/"tool")
    result, state = start("qualivision/tool", tmp_path, monkeypatch)
    about = json.loads((tmp_path/"out"/"model.json").read_text())
    assert result["finished"] and about["pretrained"] == "qualivision/tool" and about["body"] and about["licence"] == "MIT"
    assert {r["name"]: r["path"] for r in weights.list_weights()}["qualivision/tool"] == str(tmp_path/"pretrained"/"tool"/"model.safetensors")


def test_a_body_has_no_trunk(made, tmp_path, monkeypatch):
    with pytest.raises(TrainError, match="trunk"): start(made, tmp_path, monkeypatch, trunk=tiny.settings())


def test_a_body_that_does_not_fit_is_refused(made, tmp_path):
    with pytest.raises(WeightsError, match="layers 2 there and 3 here"): start_from_body(VJepaMos(config(made, layers=3)), made)
    with pytest.raises(WeightsError, match="encoder_heads"):         # as many numbers, read in another way
        start_from_body(VJepaMos(config(made, encoder_heads=1)), made)
    with pytest.raises(WeightsError, match="causes.*unexpected|unexpected.*causes"): start_from_body(VJepaMos(config()), made)
    shutil.copytree(made, tmp_path/"other")
    (tmp_path/"other"/"model.safetensors").write_bytes(b"x" + (made/"model.safetensors").read_bytes()[1:])
    model = VJepaMos(config(made))
    with pytest.raises(WeightsError, match="not the file"): start_from_body(model, tmp_path/"other")
    assert len(body_names(model)) == len(unpack(read_state(made/"model.safetensors"))) and stage.SECTIONS["vjepa2"]
