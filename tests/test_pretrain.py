"Pretraining: nothing of validation or test in it, a killed run ends as an undisturbed one, and training starts from what it leaves behind."
import csv
import json
import pickle
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import yaml
from forked import Forked, at_hand, stage

from qualivision.data.sampling import Sampling
from qualivision.data.draw import FPS, crf
from qualivision.data.simulate import SEED, SPLITS, plan
from qualivision.pretraining import lessons as stream
from qualivision.pretraining.lessons import CAUSE_NAMES, Reserved, lesson, reserved, show
from qualivision.data.container import write_video
from qualivision.files import file_sha256
from qualivision.models.bodies import body_names, config_for, start_from_body, unpack
from qualivision.models.dover_mos import DoverPlusPlus
from qualivision.models.registry import load_body
from qualivision.models.vjepa_mos import VJepaMos
from qualivision.models.text import TextEncoder
from qualivision.models.store import REGISTRY, Entry, list_weights
from qualivision.models.weights import WeightsError, read_state
from qualivision.training import train
from qualivision.pretraining.masked import MaskedPrediction, PretrainConfig, PretrainError
from qualivision.pretraining.tasks import asking, figures_of, plain_encoder, pretrain
from qualivision.toy import toy_set
from qualivision.training.train import Task, model_config, train_model
from qualivision.training.step import TrainError, parameter_groups

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = {"config": "vjepa2_embedded", "frames": 4, "size": 48, "patch": 16, "hidden_size": 48, "layers": 2, "encoder_heads": 2, "mlp_ratio": 2.,
         "grid": [2, 3, 3], "fusion_width": 16, "bank": [], "frozen_dtype": "fp32"}
SHORT = {"window": 4, "masked_windows": 1, "windows": 2, "passes": 1, "batch_size": 4, "warmup_steps": 1, "judge_clips": 4, "workers": 0,
         "precision": "no", "device": "cpu"}


def params(folder: Path) -> Path:
    "A folder to run the stage in."
    folder.mkdir()
    (folder/"params.yaml").write_text(yaml.safe_dump({"profile": "mini", "mini": {
        "text": {"encoder": "minilm"},
        "pretrain": {"vjepa2": SHORT, "dover": None, "short": {"windows": 1, "masked_windows": 0}},
        "masked": {"seeds": [7, 8], "masked_windows": 1, "windows": 1},
        "vjepa2": {"model": MODEL}, "dover": {"model": {}}}}))
    return folder


def kept(folder: Path):
    "Lessons as the stage makes them, each of which is drawn once and then read from this folder."
    real = stream._make
    def make(index, **of):
        file = folder/str(hash((index, *sorted(of.items()))))        # all forks of a process hash alike
        if not file.exists(): file.write_bytes(pickle.dumps(real(index, **of)))
        return pickle.loads(file.read_bytes())
    return make


def run(folder: Path, *arguments, module="pretraining.stage", drawn=None) -> Forked:
    "A stage in a fork; lessons come from `drawn`, the folder of `kept`, or are drawn again."
    with pytest.MonkeyPatch.context() as m:
        if drawn: m.setattr(stream, "_make", kept(drawn))
        return stage(folder, module, *arguments)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    at_hand(), reserved()                                              # so that no fork works it out again
    return tmp_path_factory.mktemp("lessons")


@pytest.fixture(scope="module")
def made(tmp_path_factory, drawn):
    "What the stage writes, undisturbed."
    folder = params(tmp_path_factory.mktemp("pretrain")/"whole")
    done = run(folder, "vjepa2", drawn=drawn)
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    return folder/"work"/"pretrain"/"vjepa2"


# --- nothing leaks ---

def told(split: str) -> set[str]:
    "The prompts of a split of the embedded set, from its label file where it is here, in lower case."
    file = next(iter(sorted((ROOT/"data"/split).rglob("*_labels.csv"))), None)
    if file is None: pytest.skip("data/ is not restored: dvc pull data.dvc")
    with open(file, encoding="utf-8", newline="") as f: return {row["Prompt"].lower() for row in csv.DictReader(f)}


def leaks(taken=None, count=3000) -> tuple[int, int]:
    "Lessons that show a scene which validation or test ask for, and prompts of theirs among all prompts of the lessons."
    scenes = {c.scene for c in plan(SPLITS, SEED) if c.split != "train"}
    prompts, lessons = told("val") | told("test"), [lesson(7, i, side, taken=taken) for side in ("learn", "judge") for i in range(0, count, 2)]
    return sum(x.causes.shown in scenes for x in lessons), sum(p.lower() in prompts for x in lessons for p in x.prompts)


def test_no_prompt_of_validation_or_test_and_no_scene_that_one_asks_for():
    assert told("val") | told("test") == reserved().prompts
    assert leaks() == (0, 0)


def test_without_the_exclusion_they_would_come():
    assert leaks(Reserved())[0] > 10


def test_every_prompt_is_checked_those_that_do_not_fit_too():
    "With one phrase after the other reserved, none of them is drawn."
    free = [lesson(7, i) for i in range(0, 60, 2)]
    taken = Reserved(frozenset(p.lower() for x in free for p in x.prompts), frozenset())
    again = [lesson(7, i, taken=taken) for i in range(0, 60, 2)]
    assert not {p.lower() for x in again for p in x.prompts} & taken.prompts


# --- the lessons look like the data ---

def frozen(clip) -> Path:
    "The file of a clip in the embedded set."
    file = ROOT/"data"/clip.split/"videos"/clip.name
    if not file.exists(): pytest.skip("data/ is not restored: dvc pull data.dvc")
    return file


def test_lessons_pass_through_the_encoder_of_the_data(tmp_path):
    "How much of the noise is left is up to the encoder: lessons written with other settings would teach what the data do not show."
    noisy = [c for c in plan(SPLITS, SEED) if c.split == "train" and c.causes.severity["noise"] > .4][:6]
    seen, lessons, others = Sampling(48, 144), [], []
    grain = lambda clip: (clip[..., 1:].float() - clip[..., :-1].float()).abs().mean().item()      # of neighbours in a row, grey levels
    for clip in noisy:
        data, plain = grain(seen(frozen(clip))), tmp_path/clip.name
        write_video(plain, clip.frames(), fps=FPS, crf=crf(clip.causes), preset="medium", bf=0, g=48,
                    **{"x264-params": "scenecut=0:open-gop=0:threads=1"})               # without the macroblock tree, as write_video does by itself
        lessons.append(abs(grain(show(clip, seen)) / data - 1)), others.append(abs(grain(seen(plain)) / data - 1))
    assert max(lessons) < .02 and max(others) > .15 and sum(lessons) < .1 * sum(others), (lessons, others)


# --- the stage ---

def test_the_body_and_its_card(made):
    about = json.loads((made/"model.json").read_text())
    assert about["body_of"] == "VJepaMos" and about["pretrain"]["seed"] == 7 and "12 simulated clips" in about["trained_on"]
    assert {"judged_severity", "judged_attribute", "judged_match", "severity_freeze", "attribute_motion"} <= set(about["figures"])
    assert [row["phase"] for row in csv.DictReader(open(made/"curves.csv"))] == ["masked", "tasks", "tasks"]
    told = (made/"README.md").read_text()
    figures, shipped = about["figures"], about["shipped"]
    assert set(shipped) == {k for k in figures if k.startswith(("severity_", "agree_"))} | {"judged_severity", "judged_agree"}
    row = f"| severity: freeze | {figures['severity_freeze']:.2f} | {shipped['severity_freeze']:.2f} |"
    for fact in (about["trained_on"], about["command"], about["code_hash"][:12], "seed 7", row): assert fact in told, fact
    assert re.search(r"\d+ minutes with \d threads", told)
    assert "1 windows of masked latent prediction, then 2 windows of 4 clips" in told


@pytest.mark.parametrize("kind", ["dover", "vjepa2", "mini"])
def test_no_score_has_an_opinion_yet(kind, request):
    "Pretraining asks for alignment in order only, and for nothing of the other four: all begin in the middle. The same on every load."
    source = request.getfixturevalue("made") if kind == "mini" else f"qualivision/{kind}-embedded"
    if kind != "mini" and not (ROOT/"pretrained").exists(): pytest.skip("pretrained/ is not restored: dvc pull pretrained.dvc")
    outs = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = load_body(source)
        c, g = model.config, torch.Generator().manual_seed(0)
        frames = torch.randint(0, 256, (3, 3, c.frames, c.size, c.size), dtype=torch.uint8, generator=g)
        with torch.no_grad(): outs.append(model(frames, torch.randn(3, c.text_dim, generator=g)))
    assert torch.equal(outs[0]["mos"], torch.full((3, 5), 3.)) and outs[0]["severity"].std(0).max() > 0
    assert all(torch.equal(outs[0][k], outs[1][k]) for k in ("mos", "severity", "agreement"))


def test_what_was_pretrained_learns_at_rates_of_its_own():
    rates = {"body": .01, "path": 10, "head": 1}
    for kind, name in ((DoverPlusPlus, "embedded"), (VJepaMos, "vjepa2_embedded")):
        model = kind(asking(model_config(name, {})))
        roles = {n: model.role(n) for n, _ in model.named_parameters()}
        assert {n for n, r in roles.items() if r == "path"} == {"causes.path.weight", "causes.path.bias"}
        assert all(roles[n] == "body" for n in roles if n.startswith(("causes.severity.", "causes.clip.", "mos_predictor.")))
        of = {id(p): g["lr"] for g in parameter_groups(model, .05, 1e-3, rates) for p in g["params"]}
        assert of[id(model.causes.path.weight)] == 1e-2 and of[id(model.causes.severity.weight)] == 1e-5
        plain = kind(model_config(name, {}))                      # from noise there is no body
        assert not {"body", "path"} & {plain.role(n) for n, _ in plain.named_parameters()}


# --- what is shipped ---

def test_both_bodies_are_small_and_what_the_registry_says():
    shipped = [REGISTRY[f"qualivision/{m}-embedded"] for m in ("dover", "vjepa2")]
    if not (ROOT/"pretrained").exists(): pytest.skip("pretrained/ is not restored: dvc pull pretrained.dvc")
    assert sum(f.stat().st_size for f in (ROOT/"pretrained").rglob("*") if f.is_file()) <= 12e6
    for e in shipped:
        about, told = (json.loads((ROOT/e.shipped/"model.json").read_text()), (ROOT/e.shipped/"README.md").read_text())
        lessons = about["pretrain"]["window"] * about["pretrain"]["windows"]
        assert about["trained_on"].startswith(f"{lessons} simulated clips") and e.trained_on.startswith(f"{lessons:,} simulated clips")
        assert e.licence == about["licence"] == "MIT" and about["command"] in told and about["code_hash"][:12] in told
        assert about["sha256"] == file_sha256(ROOT/e.shipped/"model.safetensors")


def test_killed_it_ends_as_an_undisturbed_run(made, tmp_path):
    "Nothing is taken from it: both halves draw their lessons again."
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
        frozen = model_config(name, {"freeze_backbone": True} if kind is DoverPlusPlus else {"freeze": 0.85})
        assert kind(frozen).frozen and not kind(asking(frozen)).frozen
        assert all(p.requires_grad for p in kind(asking(frozen)).parameters())


def test_a_short_run_leaves_its_figures(drawn, tmp_path):
    folder, found = params(tmp_path/"short"), []
    for _ in range(2):
        process = run(folder, "vjepa2", "short", drawn=drawn)
        err = process.communicate(timeout=300)[1]
        assert process.returncode == 0, err
        found.append((folder/"results"/"experiments"/"pretrain-short"/"vjepa2.json").read_bytes())
        shutil.rmtree(folder/"runs")
    about = json.loads(found[0])
    assert found[0] == found[1] and about["pretrain"]["windows"] == 1 and "judged_severity" in about["figures"]
    assert not (folder/"work"/"pretrain").exists()
    process = run(folder, "vjepa2", "long")
    assert "full or short" in process.communicate(timeout=100)[1] and process.returncode == 1


def test_with_and_without_masked_prediction(drawn, tmp_path):
    "The same tasks after masked prediction and alone, for each seed; what is there is not made again, and comes out the same if it is."
    folder = params(tmp_path/"masked")
    file, lines = folder/"results"/"experiments"/"masked-vjepa2.json", []
    for k in range(2):
        process = run(folder, module="experiments.masked", drawn=drawn)
        err = process.communicate(timeout=300)[1]
        assert process.returncode == 0, err
        lines.append([line.split(":")[0] for line in err.splitlines() if line.startswith("window")])
        made = [at for at in folder.glob("runs/masked/*") if json.loads((at/"result.json").read_text())["masked"]]
        if k == 0: first = file.read_bytes(); shutil.rmtree(next(at for at in folder.glob("runs/masked/*") if at not in made))      # one without
    about = json.loads(first)
    assert len(made) == 2 and file.read_bytes() == first
    whole = ["window 1/2 masked", "window 2/2 tasks"]
    assert lines == [["window 1/1 tasks"] * 2 + whole * 2, ["window 1/1 tasks"]]
    assert about["runs"]["masked first"]["7"] != about["runs"]["tasks alone"]["7"] and not about["runs"]["tasks alone"]["8"]["masked"]
    gain = [about["runs"]["masked first"][s]["judged_severity"] - about["runs"]["tasks alone"][s]["judged_severity"] for s in "78"]
    assert about["figures"]["difference"]["judged_severity"]["seeds"] == [pytest.approx(g, abs=1e-4) for g in gain]


def test_a_profile_without_settings_says_so(tmp_path):
    process = run(params(tmp_path/"none"), "dover")
    err = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and "pretrain.dover" in err and "Traceback" not in err


@pytest.mark.parametrize("wrong", [{"judge_clips": 1}, {"lr": -1.}, {"precision": "fp16"}, {"device": "tpu"}, {"seed": -1}, {"window": 5}])
def test_values_that_would_fail_after_hours_are_refused(wrong):
    with pytest.raises(PretrainError, match=f"pretrain.{next(iter(wrong))}"): PretrainConfig.of(wrong)


def test_a_run_does_not_go_on_with_other_settings(tmp_path):
    def go(**more):
        settings, encode = PretrainConfig.of({**SHORT, "masked_windows": 0, **more}), plain_encoder(TextEncoder("minilm"))
        return pretrain(VJepaMos(asking(config())), settings, Sampling(4, 48), encode, tmp_path, progress=False, stop_after=1)
    go()
    with pytest.raises(PretrainError, match="with other settings: .*lr"): go(lr=2e-3)


def test_a_damaged_state_is_named(tmp_path):
    (tmp_path/"state.pt").write_bytes(b"")
    with pytest.raises(PretrainError, match="state.pt.*damaged"):
        pretrain(VJepaMos(asking(config())), PretrainConfig.of(SHORT), Sampling(4, 48), None, tmp_path, progress=False)


# --- masked prediction ---

def test_the_answer_to_a_masked_token_is_what_the_average_says_of_it():
    "A predictor that answered with the average's own tokens, at the hidden places, would have no loss; at others it has."
    torch.manual_seed(0)
    tasks = MaskedPrediction(VJepaMos(asking(config())).video, PretrainConfig.of(SHORT))
    frames = torch.randint(0, 256, (2, 3, 4, 48, 48), dtype=torch.uint8)

    class Knows(torch.nn.Module):
        def __init__(self, shift): super().__init__(); self.shift = shift
        def forward(self, full, seen, hidden):
            whole = tasks.encoded(frames, torch.arange(full.shape[1]))
            right = torch.nn.functional.layer_norm(whole.float(), whole.shape[-1:]).roll(self.shift, 1)
            return SimpleNamespace(last_hidden_state=torch.stack([r[h] for r, h in zip(right, hidden[0])]))
    for shift, right in ((0, True), (1, False)):
        tasks.predictor = Knows(shift)
        with torch.no_grad(): loss = tasks.loss({"frames": frames, "rng": np.random.default_rng(0)})[0]
        assert (float(loss) < 1e-5) == right, (shift, float(loss))


def test_the_average_follows_the_encoder_slowly():
    torch.manual_seed(0)
    tasks = MaskedPrediction(VJepaMos(asking(config())).video, PretrainConfig.of({**SHORT, "momentum": .9}))
    before = [p.clone() for p in tasks.target.parameters()]
    with torch.no_grad():
        for p in tasks.video.encoder.parameters(): p += 1
    tasks.after_step(0.)
    assert all(torch.allclose(now, old + .1, atol=1e-6) for old, now in zip(before, tasks.target.parameters()))
    tasks.after_step(1.)                                             # at the end it stands still
    assert all(torch.allclose(now, old + .1, atol=1e-6) for old, now in zip(before, tasks.target.parameters()))


# --- the figures ---

def test_a_network_that_answers_all_prompts_alike_is_never_right(made):
    "Its alignment is the same for all four: no fitting prompt beats another, though it stands first."
    found = figures_of(load_body(made), PretrainConfig.of({**SHORT, "judge_clips": 8}), Sampling(4, 48), plain_encoder(TextEncoder("minilm")))
    assert found["judged_match"] == 0 and not any(v for k, v in found.items() if k.startswith("match_"))
    assert any(v for k, v in found.items() if k.startswith("agree_"))


# --- training from it ---

def config(body=None, **kw):
    "Of the model of this file; with a body, asking for what it can name."
    plain = model_config("vjepa2_embedded", {**{k: v for k, v in MODEL.items() if k != "config"}, **kw})
    return config_for(plain, body) if body else plain


def start(made, tmp_path, monkeypatch, **kw):
    "Trains a step from the body; the model as it was before the first step."
    root, seen = tmp_path/"set" if (tmp_path/"set").exists() else toy_set(tmp_path/"set"), {}
    real = train.fit

    def spy(model, *args, **kwargs):
        seen["state"] = {k: v.clone() for k, v in model.state_dict().items()}
        return real(model, *args, **kwargs)
    monkeypatch.setattr(train, "fit", spy)
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
    monkeypatch.setattr("qualivision.models.store.PACKAGE", tmp_path/"qualivision")
    with pytest.raises(WeightsError, match="dvc pull pretrained.dvc"): start("qualivision/tool", tmp_path, monkeypatch)
    shutil.copytree(made, tmp_path/"pretrained"/"tool")
    result, state = start("qualivision/tool", tmp_path, monkeypatch)
    about = json.loads((tmp_path/"out"/"model.json").read_text())
    assert result["finished"] and about["pretrained"] == "qualivision/tool" and about["body"] and about["licence"] == "MIT"
    assert {r["name"]: r["path"] for r in list_weights()}["qualivision/tool"] == str(tmp_path/"pretrained"/"tool"/"model.safetensors")


def test_a_body_of_other_prompts_embeddings_is_refused(made, tmp_path, monkeypatch):
    "As wide, and another encoder: its alignment would mean nothing."
    shutil.copytree(made, tmp_path/"other")
    about = json.loads((made/"model.json").read_text())
    (tmp_path/"other"/"model.json").write_text(json.dumps({**about, "text_encoder": "another", "text_encoder_key": "another"}))
    with pytest.raises(TrainError, match="text encoder another"): start(tmp_path/"other", tmp_path, monkeypatch)


def test_a_body_has_no_trunk(made, tmp_path, monkeypatch):
    with pytest.raises(TrainError, match="trunk"): start(made, tmp_path, monkeypatch, trunk=tiny.settings())


def test_a_body_that_does_not_fit_is_refused(made, tmp_path):
    with pytest.raises(WeightsError, match="layers 2 there and 3 here"): start_from_body(VJepaMos(config(made, layers=3)), made)
    with pytest.raises(WeightsError, match="encoder_heads"):         # as many numbers, read in another way
        start_from_body(VJepaMos(config(made, encoder_heads=1)), made)
    with pytest.raises(WeightsError, match="causes.*unexpected|unexpected.*causes"): start_from_body(VJepaMos(config()), made)
    with pytest.raises(WeightsError, match="causes"):                # as many, in another order
        start_from_body(VJepaMos(replace(config(made), causes=CAUSE_NAMES[::-1])), made)
    shutil.copytree(made, tmp_path/"other")
    (tmp_path/"other"/"model.safetensors").write_bytes(b"x" + (made/"model.safetensors").read_bytes()[1:])
    model = VJepaMos(config(made))
    with pytest.raises(WeightsError, match="not the file"): start_from_body(model, tmp_path/"other")
    assert len(body_names(model)) == len(unpack(read_state(made/"model.safetensors")))
