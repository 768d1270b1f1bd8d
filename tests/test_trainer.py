"What crosses processes and modules in training: resume after a kill, determinism, a tiny overfit, trackers, errors."
import csv
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from qualivision import files
from qualivision.data.clips import collate
from qualivision.data.sampling import Sampling
from qualivision.devices import DeviceError, make_accelerator, seed_all
from qualivision.models.dover_mos import DoverPlusPlus
from qualivision.models.text import TextEncoder
from qualivision.models.weights import load_checkpoint
from qualivision.toy import toy_set
from qualivision.training import loop
from qualivision.training.losses import HybridLoss
from qualivision.training.loop import TrainConfig, fit, read_pointer, start_run, take_step, validate
from qualivision.training.step import steps_per_epoch, warmup_cosine
from qualivision.training.contrast import training_loss
from qualivision.training.step import TrainError
from qualivision.training.train import prepare_data

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory): return toy_set(tmp_path_factory.mktemp("data")/"set")


@pytest.fixture(scope="module")
def sets(root): return prepare_data(root, Sampling(tiny.CONFIG.frames, tiny.CONFIG.size), TextEncoder("minilm"), root.parent/"cache", progress=False)


@pytest.fixture(scope="module")
def encode(): return TextEncoder("minilm").encode


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    "An undisturbed run: 3 epochs of 3 steps."
    folder = tmp_path_factory.mktemp("whole")
    return tiny.train(root, folder), folder/"out"


def model(seed=0):
    torch.manual_seed(seed)
    return DoverPlusPlus(tiny.CONFIG)


def same_files(a: Path, b: Path):
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for p in sorted(a.iterdir()): assert p.read_bytes() == (b/p.name).read_bytes(), f"{p.name} differs"


def state(m): return {k: v.clone() for k, v in m.state_dict().items()}


def assert_equal(a, b): assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), [k for k in a if not torch.equal(a[k], b[k])]


# --- the same run twice, in pieces, and killed ---

def test_the_same_run_twice_is_byte_equal(root, whole, tmp_path):
    again = tiny.train(root, tmp_path)
    same_files(whole[1], tmp_path/"out")
    assert again["history"] == whole[0]["history"]


def test_another_seed_is_another_run(root, whole, tmp_path):
    assert tiny.train(root, tmp_path, seed=1)["history"] != whole[0]["history"]


COLOURS = [[["red"], ["green", "emerald"], ["blue"], ["yellow"]], [["boat", "ship"], ["tree"], ["car"]]]
CONTRAST = {"contrast_weight": 0.5, "contrast_count": 4, "contrast_sets": COLOURS}      # other prompts are drawn in every step


@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "adaptive": True, "accumulation": 2, "batch_size": 3},
                                     {**CONTRAST, "accumulation": 2, "batch_size": 3, "validate_every": 2}],
                         ids=["plain", "ema-adaptive-accumulated", "contrast-seldom_validated"])
def test_stopped_after_every_step_and_resumed(sets, tmp_path, encode, options):
    config = tiny.settings(epochs=3 if "validate_every" in options else 2, **options)
    undisturbed = model()
    want = fit(undisturbed, sets.train, sets.val, config, tmp_path/"whole", progress=False, encode=encode)
    assert ("contrast_loss" in want["history"][0]) == bool(config.contrast_weight)
    for k in range(1, want["steps"] + 1):
        first = fit(model(), sets.train, sets.val, config, tmp_path/str(k), stop_after=k, progress=False, encode=encode)
        assert (first["step"], first["finished"]) == (k, False)
        resumed = model(seed=99)
        got = fit(resumed, sets.train, sets.val, config, tmp_path/str(k), progress=False, encode=encode)
        assert_equal(state(resumed), state(undisturbed))
        assert got["history"] == want["history"] and got["best"] == want["best"]
        same_files(Path(got["checkpoint"]), Path(want["checkpoint"]))
        assert (tmp_path/str(k)/"history.csv").read_bytes() == (tmp_path/"whole"/"history.csv").read_bytes()


def test_other_prompts_follow_the_step(sets, tmp_path, encode):
    "Each step draws prompts of its own, and the same ones when it is taken again; what the model learns follows their weight."
    config = tiny.settings(epochs=1, **CONTRAST)
    drawn = []
    for folder in ("one", "two"):
        run, prompts = start_run(model(), sets.train, None, config, tmp_path/folder, encode=encode), []
        real = run.contrast.draw
        run.contrast.draw = lambda p, k, real=real, prompts=prompts: prompts.append(real(p, k)) or prompts[-1]
        batch = collate([sets.train[i] for i in range(4)])
        for _ in range(2): take_step(run, [batch])
        drawn.append(prompts)
    (a, b), (again_a, again_b) = drawn
    assert a.shape == (4, 4, tiny.CONFIG.text_dim) and torch.equal(a, again_a) and torch.equal(b, again_b) and not torch.equal(a, b)
    less, more = model(), model()           # the same prompts, and another share of them in the loss
    for m, weight in ((less, 0.25), (more, 0.5)):
        fit(m, sets.train, None, replace(config, contrast_weight=weight), tmp_path/str(weight), progress=False, encode=encode)
    assert not all(torch.equal(p, q) for p, q in zip(less.parameters(), more.parameters()))
    with pytest.raises(TrainError, match="train.contrast_weight.*encode"): start_run(model(), sets.train, None, config, tmp_path/"no encoder")


def test_killed_inside_any_save(sets, tmp_path, monkeypatch):
    """A process that dies between any two writes of its saves leaves a whole one to go on from.

    What lies on the disk at such a moment is copied while one run goes on: a killed process leaves that and nothing else. Moments at
    which the same lies there are one."""
    config, folder, moments, seen = tiny.settings(epochs=2, batch_size=12, warmup_steps=1), tmp_path/"whole", [], {}
    places = [(loop, n) for n in ("save_checkpoint", "_fresh", "sync_to_disk", "write_whole", "switch_pointer", "write_history")]
    places += [(files, "sync_to_disk")]                                      # inside write_whole, before its name and after it

    def watched(real):
        def call(*a, **kw):
            moments.append(tmp_path/str(len(moments)))
            if folder.exists(): shutil.copytree(folder, moments[-1])
            else: moments[-1].mkdir()
            seen.setdefault(frozenset((p.relative_to(moments[-1]), p.is_file() and p.read_bytes()) for p in moments[-1].rglob("*")), moments[-1])
            return real(*a, **kw)
        return call

    with monkeypatch.context() as m:
        for module, name in places: m.setattr(module, name, watched(getattr(module, name)))
        want = model()
        fit(want, sets.train, sets.val, config, folder, progress=False)
    for moment in seen.values():
        for name in read_pointer(moment).values(): assert name is None or load_checkpoint(moment/name)
        resumed = model(seed=99) if read_pointer(moment)["last"] else model()
        fit(resumed, sets.train, sets.val, config, moment, progress=False)
        assert_equal(state(resumed), state(want))
        assert (moment/"history.csv").read_bytes() == (folder/"history.csv").read_bytes()
    assert len(moments) > 15, "a run has many such moments"


KILLED = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
import torch; torch.set_num_threads(1)
import tiny
print("started", flush=True)
tiny.train(Path({root!r}), Path({folder!r}), epochs=8, save_every=1, **{options!r})
"""


def test_killed_at_a_random_moment_and_resumed(root, tmp_path):
    "Another interpreter, killed at a moment nobody chose, taken up by this one: the checkpoint of an undisturbed run, byte for byte."
    options = {**CONTRAST, "validate_every": 5}
    code = KILLED.format(tests=str(ROOT/"tests"), root=str(root), folder=str(tmp_path/"killed"), options=options)
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert p.stdout.readline() == "started\n"
    until = time.monotonic() + 60
    while not list((tmp_path/"killed").glob("runs/*/run.json")) and time.monotonic() < until: time.sleep(0.01)
    time.sleep(random.Random(time.time_ns()).uniform(0, 0.5))
    p.send_signal(signal.SIGKILL); p.wait()
    assert not (tmp_path/"killed"/"out").exists(), "it was killed before its end"
    result = tiny.train(root, tmp_path/"killed", epochs=8, save_every=1, **options)
    assert result["finished"] and not list((tmp_path/"killed").glob("runs/*/last-*"))
    tiny.train(root, tmp_path/"whole", epochs=8, save_every=1, **options)
    same_files(tmp_path/"whole"/"out", tmp_path/"killed"/"out")


def test_a_run_with_other_settings_is_not_taken_up(sets, tmp_path):
    config = tiny.settings()
    fit(model(), sets.train, sets.val, config, tmp_path, stop_after=2, progress=False)
    with pytest.raises(TrainError, match="lr 0.001 → 0.01"): fit(model(), sets.train, sets.val, replace(config, lr=1e-2), tmp_path, progress=False)
    assert fit(model(), sets.train, sets.val, replace(config, lr=1e-2), tmp_path, resume=False, progress=False)["finished"]


# --- it learns, and what it reports is right ---

def test_overfits_a_tiny_batch(sets, tmp_path):
    config = tiny.settings(epochs=40, batch_size=12, lr=5e-3, warmup_steps=5)
    history = fit(model(), sets.train, None, config, tmp_path, progress=False)["history"]
    assert history[-1]["loss"] < 0.3 * history[0]["loss"], (history[0]["loss"], history[-1]["loss"])
    assert history[-1]["aux_loss"] < 0.5 * history[0]["aux_loss"]


def test_the_rate_follows_its_schedule_over_the_steps_taken(whole, sets):
    result = whole[0]
    assert result["step"] == result["steps"] == 3 * steps_per_epoch(len(sets.train), 4, 1) == 9
    want = [1e-3 * warmup_cosine(3 * e + 2, 2, 9) for e in range(3)]
    assert np.allclose([row["lr"] for row in result["history"]], want, rtol=1e-12)


def test_both_extra_heads_get_a_gradient(sets):
    m = model().train()
    batch = sets.train[0], sets.train[1]
    out = m(torch.stack([b["frames"] for b in batch]), torch.stack([b["text"] for b in batch]))
    loss, parts = training_loss(out, torch.stack([b["mos"] for b in batch]), HybridLoss(), 0.1)
    loss.backward()
    for head in (m.dover_model.aesthetic_head, m.dover_model.technical_head):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert parts["aux_loss"] > 0


def test_every_trained_parameter_moves(sets, tmp_path):
    m = model(); before = state(m)
    fit(m, sets.train, None, tiny.settings(epochs=2, weight_decay=0.0), tmp_path, progress=False)
    still = [n for n, p in m.named_parameters() if torch.equal(p, before[n])]
    assert not still, still


def test_validation_changes_nothing(sets, tmp_path):
    run = start_run(model(), sets.train, sets.val, tiny.settings(adaptive=True), tmp_path)
    run.module.dover_model.backbone.eval()                      # a part that its owner froze
    seed_all(0)
    def everything():
        modes = [m.training for m in run.module.modules()]
        generators = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
        return state(run.module), str(run.loss.state_dict()), modes, generators
    before = everything()
    validate(run)
    after = everything()
    assert_equal(before[0], after[0])
    assert before[1:] == after[1:]


def cells(file: Path) -> list[dict]:
    with open(file, newline="") as f: return list(csv.DictReader(f))


def test_validation_every_second_epoch_and_after_the_last(sets, tmp_path, capsys):
    "Epochs without it have empty cells, and are trained like the others."
    every, second = (fit(model(), sets.train, sets.val, tiny.settings(epochs=5, validate_every=n), tmp_path/str(n))["history"] for n in (1, 2))
    assert capsys.readouterr().err.count("val not due") == 2
    assert [row["epoch"] for row in second if "val_score" in row] == [2, 4, 5]
    for a, b in zip(every, second): assert b == (a if b["epoch"] in (2, 4, 5) else {k: v for k, v in a.items() if not k.startswith("val_")})
    rows = cells(tmp_path/"2"/"history.csv")
    judged = [name for name in rows[0] if name.startswith("val_")]
    assert len(judged) == 12 and len(rows) == 5      # loss, score, and two correlations of each dimension
    for row in rows:
        full = {bool(row[name]) for name in judged}
        assert full == {row["epoch"] in ("2", "4", "5")} and row["loss"] and row["lr"]


def test_the_best_epoch_is_one_that_was_validated(sets, tmp_path, monkeypatch):
    "The scores are given here: epoch 1 would be the best, and nobody looks at it."
    scores, seen, weights = [.9, .1, .3, .8, .3, .2, .2], [], {}
    def given(run):
        seen.append(run.epoch + 1); weights[run.epoch + 1] = state(run.module)
        return {"val_score": scores[run.epoch]}
    monkeypatch.setattr(loop, "validate", given)
    result = fit(model(), sets.train, sets.val, tiny.settings(epochs=7, validate_every=3), tmp_path, progress=False)
    assert seen == [3, 6, 7] and result["best"] == {"score": .3, "epoch": 3, "step": 9}
    assert_equal(load_checkpoint(result["checkpoint"])[0], weights[3])


def test_constant_scores_have_no_validation_score(sets, tmp_path):
    class Constant(DoverPlusPlus):
        def forward(self, frames, text): out = super().forward(frames, text); return {**out, "mos": out["mos"] * 0 + 3}
    result = fit(Constant(tiny.CONFIG), sets.train, sets.val, tiny.settings(epochs=1), tmp_path, progress=False)
    assert result["best"] is None and result["history"][0]["val_score"] is None and "last-" in result["checkpoint"]
    names, values = [line.split(",") for line in (tmp_path/"history.csv").read_text().splitlines()]
    assert dict(zip(names, values))["val_score"] == ""


# --- errors ---

def test_a_bad_label_names_its_video(sets, tmp_path):
    class Bad(torch.utils.data.Dataset):
        def __len__(self): return len(sets.train)
        def set_epoch(self, e): pass
        def __getitem__(self, i): item = sets.train[i]; return {**item, "mos": item["mos"] * (float("inf") if i == 5 else 1)}
    for adaptive in (False, True):
        with pytest.raises(TrainError, match=sets.train.names[5]):
            fit(model(), Bad(), None, tiny.settings(adaptive=adaptive), tmp_path, resume=False, progress=False)


def test_an_infinite_gradient_stops_the_run(sets, tmp_path):
    run = start_run(model(), sets.train, None, tiny.settings(), tmp_path)
    run.module.mos_predictor.predictor[-1].weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(TrainError, match="the gradient is (nan|inf)"): take_step(run, [collate([sets.train[i] for i in range(4)])])


def test_out_of_memory_says_what_to_do(sets, tmp_path):
    class Hungry(DoverPlusPlus):
        def forward(self, frames, text): raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(TrainError, match="out of memory. Halve train.batch_size"):
        fit(Hungry(tiny.CONFIG), sets.train, None, tiny.settings(), tmp_path, progress=False)


def test_steps_that_float16_leaves_out_are_counted_and_bounded(sets, tmp_path):
    "Gradient scaling needs a GPU; what the loop does with its verdict does not."
    run = start_run(model(), sets.train, None, tiny.settings(), tmp_path)
    group = [{"video_name": ["a.mp4"]}]
    for verdicts, in_a_row in (([True, True, False], 0), ([True] * 19, 19)):
        for skipped in verdicts:
            run.accelerator = type("Fake", (), {"optimizer_step_was_skipped": skipped})()
            loop._count_skipped(run, group)
        assert run.skipped_in_a_row == in_a_row
    assert run.skipped == 21
    run.accelerator = type("Fake", (), {"optimizer_step_was_skipped": True})()
    with pytest.raises(TrainError, match="20 steps in a row.*a.mp4"): loop._count_skipped(run, group)


def test_an_absent_device_is_an_error():
    if torch.cuda.is_available(): pytest.skip("this machine has a CUDA device")
    with pytest.raises(DeviceError, match="offers cpu"): make_accelerator("cuda")


# --- precision, processes, workers ---

def test_bfloat16_on_the_cpu_trains(sets, tmp_path):
    m = model()
    result = fit(m, sets.train, sets.val, tiny.settings(epochs=1, precision="bf16"), tmp_path, progress=False)
    assert result["finished"] and all(p.dtype == torch.float32 for p in m.parameters())
    assert "forward" not in vars(m), "the model is left as it was"


def test_loader_workers_change_nothing(sets, tmp_path):
    runs = [fit(model(), sets.train, sets.val, tiny.settings(epochs=1, workers=w), tmp_path/str(w), progress=False)["history"] for w in (0, 2)]
    assert runs[0] == runs[1]


def test_two_processes_resume_to_the_same_weights(sets, tmp_path):
    "Two processes on this machine, stopped after each step and resumed, or not: the same weights and history."
    def launch(folder, stop):
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
        def work(rank):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            fit(model(), sets.train, sets.val, tiny.settings(epochs=2, batch_size=2, ema=0.9), folder, stop_after=stop, progress=False)
        pids = []
        for rank in range(2):
            if not (pid := os.fork()):
                try: work(rank); os._exit(0)
                finally: os._exit(1)
            pids.append(pid)
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    launch(tmp_path/"whole", None)
    for stop in (1, 3, 5):
        launch(tmp_path/str(stop), stop); launch(tmp_path/str(stop), None)
        for a in (tmp_path/"whole").glob("*-*"):
            for file in ("model.safetensors", "model.json"): assert (a/file).read_bytes() == (tmp_path/str(stop)/a.name/file).read_bytes()
        assert (tmp_path/"whole"/"history.csv").read_bytes() == (tmp_path/str(stop)/"history.csv").read_bytes()


# --- trackers ---

def test_dvclive_writes_the_history(sets, tmp_path, monkeypatch):
    pytest.importorskip("dvclive")
    monkeypatch.chdir(tmp_path)
    config = tiny.settings(tracker="dvclive")
    fit(model(), sets.train, sets.val, config, tmp_path/"run", stop_after=4, progress=False)
    result = fit(model(), sets.train, sets.val, config, tmp_path/"run", progress=False)
    lines = (tmp_path/"run"/"dvclive"/"plots"/"metrics"/"loss.tsv").read_text().splitlines()
    assert len(lines) == 4, "one row for each epoch, also after an interruption"
    assert float(lines[-1].split("\t")[1]) == result["history"][-1]["loss"]


def test_dvclive_without_a_commit_says_so(sets, tmp_path, monkeypatch):
    pytest.importorskip("dvclive")
    dvc = [sys.executable, "-m", "dvc"]
    for command in (["git", "init", "-q"], [*dvc, "init", "-q"]): subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainError, match="no commit"):
        fit(model(), sets.train, sets.val, tiny.settings(tracker="dvclive"), tmp_path/"run", progress=False)


def test_tensorboard_writes_events(sets, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    fit(model(), sets.train, sets.val, tiny.settings(tracker="tensorboard", epochs=1), tmp_path, progress=False)
    assert list((tmp_path/"tensorboard").glob("events.*"))


def test_wandb_works_offline(sets, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline"); monkeypatch.setenv("WANDB_SILENT", "true")
    fit(model(), sets.train, sets.val, tiny.settings(tracker="wandb", epochs=1), tmp_path, progress=False)
    assert list((tmp_path/"wandb").glob("offline-run-*/*.wandb"))


def test_a_missing_tracker_is_named(sets, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrainError, match="pip install wandb"):
        fit(model(), sets.train, sets.val, tiny.settings(tracker="wandb"), tmp_path, progress=False)


def test_the_default_is_the_published_batch(): assert (lambda c: c.batch_size * c.accumulation)(TrainConfig()) == 32
