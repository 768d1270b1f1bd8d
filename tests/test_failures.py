"Whatever one item raises becomes its row and the others go on; what concerns the whole is one sentence and status 1."
import csv
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from typer.testing import CliRunner

from qualivision import devices
from qualivision.cli import app
from qualivision.data import clips, dataset, sampling
from qualivision.data.clips import ClipCache, read_ahead
from qualivision.data.dataset import DatasetError
from qualivision.files import FileError
from qualivision.inference import bulk
from qualivision.evaluation.conformal import UNKNOWN
from qualivision.inference.bulk import ENDS, FiveMosScorer
from qualivision.inference.bulk import score_set
from qualivision.official import scorer as official
from qualivision.official.scorer import OfficialScorer
from qualivision.inference.score import Scorer, predict
from qualivision.quality import DIMENSIONS, MOS_COLUMNS, QualiVisionError, ScoreRecord
from qualivision.toy import toy_clip, toy_set

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
KINDS = {"memory": (MemoryError("Unable to allocate 4.2 GiB"), "memory ran out"),
         "torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes."), "memory ran out"),
         "os": (OSError(errno.EIO, "Input/output error"), "Input/output error"),
         "unicode": (UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed"), "no UTF-8"),
         "runtime": (RuntimeError("something broke"), "something broke")}
each_kind = pytest.mark.parametrize("kind", KINDS)


def failing(real, error, at=1):
    "The function, raising at its call number `at` (from 0); always where that is None."
    def call(*args, **given):
        call.count += 1
        if at is None or call.count == at + 1: raise error
        return real(*args, **given)
    call.count = 0
    return call


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch):
    "Calls are counted here: one thread decodes, and a batch is one clip. What fails in a batch: tests/test_score.py."
    monkeypatch.setitem(devices.BATCH, "cpu", 1)
    monkeypatch.setattr(devices, "cores", lambda: 1)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    for k, name in enumerate(NAMES): toy_clip(folder/name, (40 * k, 100, 200))
    (folder/"list.csv").write_text("video,Prompt\n" + "".join(f"{n},a red boat\n" for n in NAMES))
    toy_set(folder/"set", train=1, val=1, test=2)
    for name in ("one", "two"): (folder/f"{name}.csv").write_text("video,mos\n" + "".join(f"{n},{k}\n" for k, n in enumerate(NAMES)))
    return folder


@pytest.fixture(scope="module")
def five(here):
    return Scorer.from_checkpoint(tiny.checkpoint(here/"checkpoints"/"dover"), "cpu")


@pytest.fixture(scope="module")
def branches():
    torch.manual_seed(0)
    scorer = OfficialScorer(tiny.Mobile(), "dover", dict(file="small.pth", sha256="0" * 64, licence="none", trained_on="nothing"))
    def cut(video, seed): return {v: torch.full((1, 3, 4, 32, 32), len(Path(video).read_bytes()) % 97 / 97) for v in tiny.Mobile.views}
    scorer.cut = cut       # in place of decoding
    return scorer


@pytest.fixture
def call(here, five, branches, monkeypatch):
    "A command in this process, with small scorers; status, JSON or text, stderr."
    monkeypatch.chdir(here)
    monkeypatch.setattr(Scorer, "from_checkpoint", lambda *a, **k: five)
    monkeypatch.setattr(OfficialScorer, "from_weights", lambda *a, **k: branches)
    def run(*args):
        r = CliRunner().invoke(app, [*map(str, args)])
        assert r.exception is None or isinstance(r.exception, SystemExit), r.exception
        return r.exit_code, json.loads(r.stdout) if "--json" in args else r.stdout, r.stderr
    return run


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as f: return list(csv.DictReader(f))


def one_failed(errors: list, said: str, cause: str, traces=1):
    "The second of several items failed, for a reason that is told; the traceback is said once."
    assert [isinstance(e, str) and e != "" for e in errors] == [k == 1 for k in range(len(errors))], errors
    assert cause in errors[1] and said.count("Traceback") == traces, (errors[1], said)


# ---------------------------------------------------------------- one item, at each seam of each command

FIVE_SEAMS = {"reader": lambda s: (sampling, "read_frames"), "sampling": lambda s: (type(s.sampling), "counted"),
              "text": lambda s: (s.encoder, "embed"), "network": lambda s: (s.model, "forward")}
five_seams = pytest.mark.parametrize("seam", FIVE_SEAMS)


def break_five(monkeypatch, scorer, seam, kind, at=1):
    place, name = FIVE_SEAMS[seam](scorer)
    monkeypatch.setattr(place, name, broken := failing(getattr(place, name), KINDS[kind][0], at))
    return broken, KINDS[kind][1]


@each_kind
@pytest.mark.parametrize("seam", [*FIVE_SEAMS, "record"])
def test_score(call, five, monkeypatch, seam, kind):
    if seam == "record":
        cause = KINDS[kind][1]
        monkeypatch.setattr(ScoreRecord, "of", failing(ScoreRecord.of, KINDS[kind][0]))
    else: _, cause = break_five(monkeypatch, five, seam, kind)
    status, rows, err = call("score", *NAMES, "--prompt", "a red boat", "--json")
    assert status == 1 and [r["video"] for r in rows] == NAMES
    one_failed([r["error"] for r in rows], err, cause)
    assert all(1 <= r["overall"] <= 5 for r in rows if not r["error"])


@five_seams
def test_predict(call, five, monkeypatch, seam, tmp_path):
    _, cause = break_five(monkeypatch, five, seam, "runtime")
    status, about, err = call("predict", "--data", "set", "--out", tmp_path/"p.csv", "--json")
    rows = rows_of(tmp_path/"p.csv")
    assert status == 1 and len(about["failed"]) == 1 and cause in about["failed"][0]["error"] and err.count("Traceback") == 1
    assert [r["Overall_MOS"] == "" for r in rows] == [False, True, False, False]


@pytest.mark.parametrize("seam", [*FIVE_SEAMS, "content", "row"])
@pytest.mark.parametrize("name,kind", [*(("s.csv", kind) for kind in KINDS), ("s.parquet", "runtime")])
def test_score_set(call, five, monkeypatch, tmp_path, seam, kind, name):
    "With threads that read ahead; a rerun scores the one that failed, and nothing else."
    cause = KINDS[kind][1]
    if seam in FIVE_SEAMS: break_five(monkeypatch, five, seam, kind)
    elif seam == "content": monkeypatch.setattr(bulk, "_content", failing(bulk._content, KINDS[kind][0]))
    else: monkeypatch.setattr(bulk, "cells", failing(bulk.cells, KINDS[kind][0]))
    def run():
        how = "--json", "--no-isolate", "--workers", 2 - (seam != "network")
        return call("score-set", "list.csv", "--model", "qualivision", "--out", tmp_path/name, *how)
    status, about, err = run()
    assert status == 1 and (about["scored"], about["failed"]) == (3, 1)
    rows = rows_of(tmp_path/name) if name == "s.csv" else pd.read_parquet(tmp_path/name).to_dict("records")
    one_failed([r["error"] for r in rows], err, cause)
    monkeypatch.undo(); monkeypatch.chdir(Path(five.about["checkpoint"]).parents[1])
    monkeypatch.setattr(Scorer, "from_checkpoint", lambda *a, **k: five)
    status, about, err = run()
    assert status == 0 and (about["scored"], about["kept"], about["failed"]) == (1, 3, 0) and not err


@each_kind
@pytest.mark.parametrize("seam", ["views", "network", "ranks"])
def test_dover(call, branches, monkeypatch, seam, kind):
    error, cause = KINDS[kind]
    place, name = {"views": (branches, "cut"), "network": (branches.model, "forward"), "ranks": (official, "relative_ranks")}[seam]
    monkeypatch.setattr(place, name, failing(getattr(place, name), error))
    status, rows, err = call("dover", *NAMES, "--json")
    assert status == 1 and [r["video"] for r in rows] == NAMES
    one_failed([r["error"] for r in rows], err, cause)


def test_infer_datasets(call, branches, monkeypatch, tmp_path):
    "A video that fails is a row, a label file that fails is an object, and the next label file is read."
    monkeypatch.setattr(branches, "cut", failing(branches.cut, KINDS["runtime"][0]))
    Path("none.csv").write_text("video,mos\nx.mp4,1\n")
    status, (good, bad, other), err = call("infer-datasets", "one.csv", "none.csv", "two.csv", "--out", tmp_path/"o", "--json")
    assert status == 1 and (good["scored"], good["failed"]) == (3, 1) and err.count("Traceback") == 1
    assert bad["labels"] == "none.csv" and "none.csv" in bad["error"] and (other["scored"], other["failed"]) == (4, 0)


class Odd:
    "A sampling that fails for one video; it can go to worker processes."
    def __init__(self, error, name="b.mp4"): self.error, self.name = error, name
    def key(self): return f"odd {self.error!r}"
    def __call__(self, path):
        if self.name in str(path): raise self.error
        return torch.zeros(3, 2, 4, 4, dtype=torch.uint8)


@each_kind
@pytest.mark.parametrize("workers", [0, 2])
def test_clip_cache(here, tmp_path, capsys, kind, workers):
    "In this process and in others: the rest is stored, the one is named with its reason."
    error, cause = KINDS[kind]
    cache = ClipCache(tmp_path/"cache", Odd(error))
    report = cache.build([here/n for n in NAMES], workers, progress=False, on_error="collect")
    assert report.clips == 3 and [Path(e["video"]).name for e in report.errors] == ["b.mp4"] and cause in report.errors[0]["error"]
    assert capsys.readouterr().err.count("Traceback") == 1
    with pytest.raises(DatasetError, match="(?s)1 videos cannot be decoded.*" + cause): cache.build([here/n for n in NAMES], workers, progress=False)


class Items(torch.utils.data.Dataset):
    def __init__(self, fail): self.fail = fail
    def __len__(self): return 4
    def __getitem__(self, i):
        if i == 3: self.fail()
        return torch.full((2,), i)


def test_batches_keep_their_words_and_say_when_a_worker_died():
    "Training cannot go on without an item: it ends with that item's error, and not with the traceback of a process."
    def typed(): raise DatasetError("d.mp4", "it changed while it was read", "Run again.")
    def unforeseen(): raise RuntimeError("something broke")
    def killed(): os.kill(os.getpid(), signal.SIGBUS)
    def full(): raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)")
    for workers in (0, 1):
        with pytest.raises(DatasetError, match="^d.mp4: it changed"): list(read_ahead(Items(typed), [[0, 1], [2, 3]], workers=workers))
        with pytest.raises(QualiVisionError, match="item 3: RuntimeError: something broke"):
            list(read_ahead(Items(unforeseen), [[0, 1], [2, 3]], workers=workers))
    for fail in (killed, full):
        with pytest.raises(DatasetError, match=r"1 workers: a process that reads ahead failed.*workers: 0.*--shm-size"):
            list(read_ahead(Items(fail), [[0, 1], [2, 3]], workers=1))


def test_little_shared_memory(monkeypatch, capsys):
    "A container's 64 MB: as few workers as fit, it is said, and the batches are the same."
    class Large(torch.utils.data.Dataset):
        def __len__(self): return 4
        def __getitem__(self, i): return {"frames": torch.full((3_000_000,), i, dtype=torch.uint8), "name": str(i)}
    def items(workers): return [b["frames"][:, 0].tolist() for b in read_ahead(Large(), [[0, 1, 2], [3]], workers=workers)]
    assert items(2) == [[0, 1, 2], [3]] and not capsys.readouterr().err
    real = clips.shutil.disk_usage
    small = type(real("/"))(2**26, 0, 2**26)
    monkeypatch.setattr(clips.shutil, "disk_usage", lambda p: small if p == clips.SHARED else real(p))
    assert items(4) == [[0, 1, 2], [3]]
    err = capsys.readouterr().err
    assert "4 workers need 81 MB" in err and "67" in err and "2 of them are used" in err and "--shm-size" in err


# ---------------------------------------------------------------- the whole

def test_a_run_whose_items_all_fail_alike_stops(call, five, branches, monkeypatch, tmp_path, here):
    "With the fifth, whatever is left; one traceback, one sentence, status 1."
    many = [NAMES[k % 4] for k in range(9)]
    broken, cause = break_five(monkeypatch, five, "network", "runtime", at=None)
    status, rows, err = call("score", *many, "--prompt", "a red boat", "--json")
    assert status == 1 and broken.count == 5 and len(rows) == 9 and all("its first 5 items all failed alike" in r["error"] for r in rows)
    assert err.count("Traceback") == 1 and cause in err
    for k in range(9): toy_clip(tmp_path/f"{k}.mp4", (k, k, k))
    (tmp_path/"list.csv").write_text("video,Prompt\n" + "".join(f"{k}.mp4,a red boat\n" for k in range(9)))
    broken.count = 0
    status, said, err = call("score-set", tmp_path/"list.csv", "--model", "qualivision", "--out", tmp_path/"s.csv", "--json", "--no-isolate")
    assert status == 1 and broken.count == 5 and "all failed alike" in said["error"] and err.count("Traceback") == 1
    monkeypatch.setattr(branches, "cut", failing(branches.cut, KINDS["runtime"][0], None))
    assert "all failed alike" in call("dover", *many, "--json")[1][0]["error"]
    assert 5 <= branches.cut.count <= 9, "a thread is ahead"
    cache = ClipCache(tmp_path/"cache", Odd(KINDS["runtime"][0], ".mp4"))
    with pytest.raises(QualiVisionError, match="its first 5 items all failed alike"):
        cache.build([tmp_path/f"{k}.mp4" for k in range(9)], progress=False)


def test_what_nobody_foresaw_ends_a_command_with_a_sentence(call, monkeypatch):
    def broken(*a, **k): raise RuntimeError("something broke")
    def stopped(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(Scorer, "from_checkpoint", broken)
    monkeypatch.setattr("qualivision.evaluation.metrics.evaluate_files", broken)
    for args in (["predict", "--data", "set", "--out", "p.csv"], ["evaluate", "one.csv", "one.csv"]):
        status, said, err = call(*args, "--json")
        assert status == 1 and said["error"] == f"qualivision {args[0]}: RuntimeError: something broke. " + said["error"].split(". ", 1)[1]
        assert err.count("Traceback") == 1 and err.rstrip().endswith(said["error"])
    status, rows, err = call("score", *NAMES, "--prompt", "a boat", "--json")
    assert status == 1 and [r["video"] for r in rows] == NAMES and err.count("Traceback") == 1
    monkeypatch.setattr("qualivision.evaluation.metrics.evaluate_files", stopped)
    assert call("evaluate", "one.csv", "one.csv") == (130, "", "Stopped.\n")
    monkeypatch.setattr(Scorer, "from_checkpoint", stopped)
    for args in (["score", "a.mp4", "--prompt", "a boat"], ["score-set", "list.csv", "--model", "qualivision", "--out", "s.csv"]):
        status, out, err = call(*args)
        assert status == 130 and not out and err.startswith("Stopped.") and len(err.splitlines()) == 1


def test_a_place_that_cannot_be_written_is_refused_before_the_work(call, here, monkeypatch):
    "One sentence, nothing read, nothing left."
    def worked(*a, **k): raise AssertionError("it began to work")
    for name in ("qualivision.data.video.read_frames", "qualivision.official.datasets._listing", "qualivision.data.clips.ClipCache.build"):
        monkeypatch.setattr(name, worked)
    monkeypatch.setattr(Scorer, "from_checkpoint", worked); monkeypatch.setattr(OfficialScorer, "from_weights", worked)
    monkeypatch.setenv("QUALIVISION_WEIGHTS", str(here/"list.csv"/"weights"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here/"hub"))
    place, before = here/"list.csv", sorted(p.name for p in here.iterdir())          # a file, so that nothing can be made below it
    for args in (["score-set", "list.csv", "--model", "qualivision", "--out", place/"s.csv"], ["predict", "--data", "set", "--out", place/"p.csv"],
                 ["gmad", "one.csv", "--first", "mos", "--second", "mos", "--out", place/"g.csv"], ["data", "pull", "lsvq", "--to", place/"lsvq"],
                 ["weights", "pull", "dover-mobile"], ["transfer", "--data", "one.csv", "--out", place/"h.safetensors"],
                 ["train", "--data", "one.csv", "--out", place/"model"],
                 ["ranks", "build", "one.csv", "--name", "x", "--model", "dover", "--out", place/"r.json"]):
        status, said, err = call(*args, "--json")
        assert status == 1 and "list.csv" in said["error"] and "written" in said["error"] and "Traceback" not in err, (args, said, err)
    assert sorted(p.name for p in here.iterdir()) == before


def test_training_in_a_folder_that_cannot_be_written(call, here, tmp_path, monkeypatch):
    "Neither decoded nor embedded: the first thing that train does is look."
    (tmp_path/"params.yaml").write_text((ROOT/"params.yaml").read_text().replace("root: data", f"root: {here/'set'}"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qualivision.pipeline.train.keep_memory", lambda: None)
    monkeypatch.setattr("qualivision.pipeline.train.train_model", lambda *a, **k: pytest.fail("it began to train"))
    real = os.access
    monkeypatch.setattr(os, "access", lambda p, mode, **k: real(p, mode, **k) and not (mode & os.W_OK and Path(p) == tmp_path))
    status, said, err = call("train", "--json")
    assert status == 1 and f"nothing can be written in {tmp_path}" in said["error"] and len(err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["params.yaml"]


def test_bad_videos_are_found_before_a_training(call, here, tmp_path, monkeypatch):
    "End to end, the held-out videos are looked at after the last epoch; all that cannot be read are told before the first."
    monkeypatch.setattr("qualivision.official.transfer.train_all", lambda *a, **k: pytest.fail("it began to train"))
    for k in range(3): (tmp_path/f"bad{k}.mp4").write_bytes(b"no video")
    (tmp_path/"labels.csv").write_text("video,mos\n" + "".join(f"{n},3\n" for n in [*(here/n for n in NAMES), "bad0.mp4", "bad1.mp4", "bad2.mp4"]))
    status, said, err = call("train", "--data", tmp_path/"labels.csv", "--out", tmp_path/"model", "--json")
    assert status == 1 and "3 cannot be read" in said["error"] and "Traceback" not in err
    assert all(f"bad{k}.mp4" in said["error"] for k in range(3)), said


def test_a_result_that_fails_in_the_end_says_so_and_leaves_nothing(here, five, tmp_path, monkeypatch):
    "A disk that is full when the table gets its name: the first error is told, whatever the clean-up meets."
    def full(*a, **k): raise OSError(errno.ENOSPC, "No space left on device")
    def read_only(*a, **k): raise OSError(errno.EROFS, "Read-only file system")
    scorer = FiveMosScorer(five)
    for name, place in (("s.csv", "os.replace"), ("s.parquet", "os.replace")):
        with monkeypatch.context() as m:
            m.setattr(place, full); m.setattr(Path, "unlink", read_only)
            with pytest.raises(QualiVisionError, match="No space left"): score_set(here/"list.csv", tmp_path/name, scorer)
        assert not (tmp_path/name).exists() and score_set(here/"list.csv", tmp_path/name, scorer)["kept"] >= 1
    with monkeypatch.context() as m:
        m.setattr("os.replace", read_only); m.setattr(Path, "unlink", read_only)
        with pytest.raises(FileError, match="p.csv: it cannot be written .Read-only"):
            predict(here/"set", "test", five, tmp_path/"p.csv", progress=False)


# ---------------------------------------------------------------- what is said beside the scores

def test_reasons_and_warnings_are_in_every_result(call, five, here, tmp_path, monkeypatch):
    "A video with one frame has no Temporal score, in each form of a result, and the status stays 0; a rerun keeps it."
    toy_clip(tmp_path/"still.mp4", (9, 99, 200), frames=1)
    monkeypatch.setattr(Scorer, "explained", lambda self, *a, real=Scorer.explained: (*real(self, *a)[:2], ("the prompt was cut",)))
    why = "the video has one frame"
    status, (r,), err = call("score", tmp_path/"still.mp4", "--prompt", "a boat", "--json")
    assert status == 0 and r["temporal"] is None and why in r["reasons"]["temporal"] and r["warnings"] == ["the prompt was cut"] and not r["error"]
    text = call("score", tmp_path/"still.mp4", "--prompt", "a boat")[1]
    assert "–  " + why in text and "note: the prompt was cut" in text
    (tmp_path/"list.csv").write_text(f"video,Prompt\nstill.mp4,a boat\n{here/'a.mp4'},a boat\n")
    for name in ("s.csv", "s.parquet", "s.csv"):
        status, about, err = call("score-set", tmp_path/"list.csv", "--model", "qualivision", "--out", tmp_path/name, "--json", "--no-isolate")
        assert status == 0 and about["failed"] == 0 and not err
    assert about["kept"] == 2
    frame = pd.read_csv(tmp_path/"s.csv")
    assert list(frame) == ["video_name", "Prompt", *MOS_COLUMNS, *ENDS, "error", "error_kind", "reasons", "warnings", "sha256"]
    for table in (frame, pd.read_parquet(tmp_path/"s.parquet")):
        first, second = table.iloc[0], table.iloc[1]
        assert pd.isna(first.Temporal_MOS) and 1 <= first.Overall_MOS <= 5 and first.reasons.startswith(f"temporal: {why}") and pd.isna(first.error)
        assert first.warnings == "the prompt was cut" and 1 <= second.Temporal_MOS <= 5 and second.reasons == f"interval: {UNKNOWN}"
    (tmp_path/"set"/"test"/"videos").mkdir(parents=True)
    (tmp_path/"still.mp4").rename(tmp_path/"set"/"test"/"videos"/"A_1.mp4")
    (tmp_path/"set"/"test"/"test_labels.csv").write_text("video_name,Prompt\nA_1.mp4,a boat\n")
    status, about, err = call("predict", "--data", tmp_path/"set", "--out", tmp_path/"p.csv", "--json")
    row, = rows_of(tmp_path/"p.csv")
    assert status == 0 and row["Temporal_MOS"] == "" and row["Overall_MOS"] and about["failed"] == []
    assert why in about["notes"][0]["reasons"]["temporal"] and why in err and "the prompt was cut" in err
    assert tuple(row) == ("video_name", "Prompt", *MOS_COLUMNS)


def test_rows_of_before_are_scored_again(five, here, tmp_path):
    "A journal whose rows know no reasons (their settings have no `judged`) is not read as if a still had been judged."
    scorer = FiveMosScorer(five)
    before = {k: v for k, v in scorer.settings.items() if k != "judged"}
    class Before(FiveMosScorer):
        def rate_many(self, views, prompts): return [dict(zip(DIMENSIONS, self.scorer.judge(v[0], p, 2)[0])) for v, p in zip(views, prompts)]
    old = Before(five); old.settings = before
    toy_clip(tmp_path/"still.mp4", (9, 99, 200), frames=1)
    videos = [("still.mp4", str(tmp_path/"still.mp4"), "a boat")]
    assert score_set(videos, tmp_path/"s.csv", old)["scored"] == 1 and rows_of(tmp_path/"s.csv")[0]["Temporal_MOS"]
    assert score_set(videos, tmp_path/"s.csv", scorer)["scored"] == 1 and not rows_of(tmp_path/"s.csv")[0]["Temporal_MOS"]


# ---------------------------------------------------------------- names and prompts that are no UTF-8

def test_names_and_prompts_that_are_no_utf8(here, tmp_path):
    "From the shell: one row each, other rows scored, and nothing that is written or printed fails over them."
    tiny.checkpoint(tmp_path/"checkpoints"/"dover")
    toy_clip(tmp_path/"a.mp4", (9, 99, 200))
    odd = os.fsdecode(b"caf\xe9.mp4")
    (tmp_path/odd).write_bytes((tmp_path/"a.mp4").read_bytes())
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
    def run(*args):
        return subprocess.run([sys.executable, "-c", "from qualivision.cli import main; main()", *args], cwd=tmp_path, env=env, capture_output=True)
    r = run("score", odd, "a.mp4", "--prompt", "a boat", "--json")
    rows = json.loads(r.stdout.decode("utf-8"))
    assert [x["video"] for x in rows] == [odd, "a.mp4"] and rows[1]["error"] is None and b"Traceback" not in r.stderr
    assert rows[0]["error"] is None and r.returncode == 0, "a name is bytes, and its video is scored like any other"
    r = run("score", "a.mp4", "--prompt", os.fsdecode(b"caf\xe9 at night"))
    assert r.returncode in (1, 2) and b"UTF-8" in r.stderr + r.stdout and b"Traceback" not in r.stderr


def test_results_with_names_and_prompts_that_are_no_utf8(five, tmp_path):
    "CSV, Parquet and journal: a byte that is no UTF-8 stands readably, and a prompt that holds one is never scored as another text."
    odd, prompt = os.fsdecode(b"caf\xe9.mp4"), os.fsdecode(b"caf\xe9 at night")
    toy_clip(tmp_path/"a.mp4", (9, 99, 200)); (tmp_path/odd).write_bytes((tmp_path/"a.mp4").read_bytes())
    videos = [(n, str(tmp_path/n), p) for n, p in ((odd, "a boat"), ("a.mp4", "a boat"), ("a.mp4", prompt), ("a.mp4", "caf\ud800"))]
    said = []
    for name in ("s.csv", "s.parquet", "s.csv"):
        about = score_set(videos, tmp_path/name, FiveMosScorer(five), report=said.append)
        table = pd.read_csv(tmp_path/"s.csv") if name == "s.csv" else pd.read_parquet(tmp_path/name)
        assert about["videos"] == 4 and about["failed"] >= 2 and table.video_name[0] == "caf\\xe9.mp4"
        assert table.Prompt[2] == "caf\\xe9 at night" and table.Prompt[3] == "caf\\ud800"
        assert table.error.isna().tolist()[1:] == [True, False, False] and table.Overall_MOS.isna().tolist()[1:] == [False, True, True]
    predictions = pd.DataFrame({"video_name": [odd], "Prompt": ["a boat"]}, dtype=object)
    dataset.write_predictions(predictions, np.full((1, 5), 3.), tmp_path/"p.csv")
    assert (tmp_path/"p.csv").read_bytes().splitlines()[1].startswith(b"caf\xe9.mp4,a boat,3.0"), "the label file's own name, byte by byte"
