"The tools around published models: one video, a collection that is killed and goes on, known data sets, downloads."
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import namedtuple
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from forked import Forked
from typer.testing import CliRunner

from qualivision import devices
from qualivision.cli import app
from qualivision.data.dataset import load_dataset, validate
from qualivision.official.known_sets import known_set
from qualivision.data.container import write_video
from qualivision.evaluation.metrics import srocc
from qualivision.files import FileError
from qualivision.official import scorer as official
from qualivision.data.collection import BulkError, find_videos, read_manifest
from qualivision.inference.bulk import score_set
from qualivision.official.datasets import DataError, infer_set, pull_set, set_metrics, unpack_archive
from qualivision.official.cover import COVER, CLIPImage
from qualivision.official.dover import DOVERMobile
from qualivision.models.weights import WeightsError
from qualivision.quality import QualiVisionError
from qualivision.toy import toy_prompt, toy_set

ROOT = Path(__file__).parents[1]
KEYS = ["video", "technical", "aesthetic", "fused", "ranks", "seed", "weights", "error", "error_kind"]
SETS = ["LIVE-VQC", "KoNViD-1k", "LSVQ_test", "LSVQ_1080p", "YouTube-UGC"]


class SmallCover(tiny.Mobile): views = ("semantic", "technical", "aesthetic")


def texture(path: Path, seed=0, frames=12, height=260, width=320):
    "A clip of coarse noise that wanders: its patches and its frames differ."
    cells = np.random.default_rng(seed).integers(0, 256, (height // 20 + 4, width // 20 + 4, 3))
    picture = np.kron(cells, np.ones((20, 20, 1))).astype(np.uint8)
    write_video(path, np.stack([picture[k % 40:k % 40 + height, k % 30:k % 30 + width] for k in range(frames)]))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "Clips, broken files, weights of the small models."
    folder = tmp_path_factory.mktemp("tools")
    for k in range(4): texture(folder/f"{k}.mp4", k, frames=130 if k == 0 else 12)
    (folder/"broken.mp4").write_bytes(b"no video")
    torch.manual_seed(0)
    torch.save(tiny.Mobile().state_dict(), folder/"small.pth")
    torch.save(SmallCover().state_dict(), folder/"cover.pth")
    torch.save(CLIPImage(width=64, layers=1, heads=1, patch=32, size=64).state_dict(), folder/"clip.pth")
    return folder


@pytest.fixture
def call(here, monkeypatch, tmp_path):
    "The command, among the clips, with small models in place of the large ones; no weights were pulled."
    monkeypatch.chdir(here)
    monkeypatch.setenv("QUALIVISION_WEIGHTS", str(tmp_path/"w"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"hub"))
    small = {"dover": tiny.Mobile, "dover-mobile": tiny.Mobile, "cover": SmallCover}
    for name, kind in small.items(): monkeypatch.setitem(official.NETWORKS, name, kind)
    def run(*args):
        r = CliRunner().invoke(app, [*map(str, args)])
        assert r.exception is None or isinstance(r.exception, SystemExit), r.exception
        return r.exit_code, json.loads(r.stdout) if "--json" in args and r.stdout else r.stdout, r.stderr
    return run


# ---------------------------------------------------------------- one video

def test_dover_json(call):
    "Good and bad files; the same bytes twice; another seed, other scores."
    args = "dover", "0.mp4", "broken.mp4", "gone.mp4", "http://a/b.mp4", "--weights", "small.pth"
    status, rows, _ = call(*args, "--json")
    assert status == 1 and [list(r) for r in rows] == [KEYS] * 4 and [r["error"] is None for r in rows] == [True, False, False, False]
    r = rows[0]
    assert list(r["ranks"]) == SETS and all(set(v) == {"technical", "aesthetic"} for v in r["ranks"].values())
    assert 0 < r["fused"] < 1 and r["seed"] == 0 and r["weights"]["file"] == "small.pth" and "non-commercial" in r["weights"]["licence"]
    assert r["weights"]["sha256"] == sha256(Path("small.pth").read_bytes()).hexdigest()
    for bad in rows[1:]: assert bad["video"] in bad["error"] and bad["technical"] is bad["fused"] is bad["ranks"] is None
    one = [CliRunner().invoke(app, ["dover", "0.mp4", "--weights", "small.pth", "--json", "--seed", s]).stdout for s in ("0", "0", "7")]
    assert one[0] == one[1] and json.loads(one[0])[0] == r
    other = json.loads(one[2])[0]
    assert other["seed"] == 7 and all(other[b] != r[b] for b in ("technical", "aesthetic", "fused"))
    fixed = call("dover", "0.mp4", "--weights", "small.pth", "--json", "--fused", "corrected")[1][0]
    assert fixed["technical"] == r["technical"] and fixed["fused"] != r["fused"]


@pytest.mark.parametrize("model", [tiny.Mobile, SmallCover])
def test_official_scores_in_a_batch(here, monkeypatch, model):
    "Two and one: the records of the clips alone, to 1e-5, the broken file in its place."
    torch.manual_seed(0)
    name, about = "cover" if model is SmallCover else "dover", dict.fromkeys(("file", "sha256", "licence", "trained_on"), "")
    scorer, clips = official.OfficialScorer(model(), name, about), [str(here/n) for n in ("1.mp4", "broken.mp4", "2.mp4", "3.mp4")]
    alone = {c: scorer.rate(scorer.prepare(c)) for c in clips if "broken" not in c}
    sizes, real = [], model.forward
    monkeypatch.setattr(model, "forward", lambda self, views: sizes.append(len(next(iter(views.values())))) or real(self, views))
    one = scorer.prepare(clips[0])
    monkeypatch.setitem(devices.BATCH, "cpu", 3 * sum(x.numel() for x in one.values()))
    records = list(scorer.score_many(clips))
    assert [r["video"] for r in records] == clips and [bool(r["error"]) for r in records] == [False, True, False, False]
    assert len(sizes) == 2 and sizes[0] == 2 * sizes[1]
    for r in records:
        if not r["error"]: assert [r[c] for c in scorer.columns] == pytest.approx([alone[r["video"]][c] for c in scorer.columns], abs=1e-5)


def test_weights_that_were_saved_in_a_wrapper(call, tmp_path):
    "DataParallel, torch.compile, a training framework, and two of them: the same scores, and a word; a prefix of some names stays."
    state = torch.load("small.pth", weights_only=True)
    plain = call("dover", "1.mp4", "--weights", "small.pth", "--json")[1][0]
    for prefix in ("module.", "_orig_mod.", "model.", "module._orig_mod."):
        torch.save({prefix + k: v for k, v in state.items()}, tmp_path/"w.pth")
        status, (r,), err = call("dover", "1.mp4", "--weights", tmp_path/"w.pth", "--json")
        assert status == 0 and r["technical"] == plain["technical"] and f"began with {prefix}, which was taken off" in err
        status, about, err = call("weights", "inspect", tmp_path/"w.pth", "--json")
        assert about["prefix"] == prefix and set(about["parts"]) == {k.split(".")[0] for k in state}
    assert "begin with module._orig_mod., which is taken off" in call("weights", "inspect", tmp_path/"w.pth")[1]
    torch.save({f"module.{k}" if i else k: v for i, (k, v) in enumerate(state.items())}, tmp_path/"w.pth")
    status, (r,), err = call("dover", "1.mp4", "--weights", tmp_path/"w.pth", "--json")
    assert status == 1 and "do not fit" in r["error"] and "taken off" not in err


def test_dover_for_people(call):
    status, text, err = call("dover", "1.mp4", "--weights", "small.pth")
    assert status == 0 and not err and all(word in text for word in (*SETS, "technical", "fused", "non-commercial", "small.pth", "better than"))
    status, text, _ = call("dover", "broken.mp4", "--weights", "small.pth")
    assert status == 1 and "not scored" in text


def test_mobile_has_no_ranks_until_one_builds_them(call, here, tmp_path):
    status, (r,), _ = call("dover", "1.mp4", "--mobile", "--weights", "small.pth", "--json")
    assert status == 0 and list(r) == [*KEYS[:5], "why_no_ranks", *KEYS[5:]] and r["ranks"] is None and "dover-mobile" in r["why_no_ranks"]
    assert call("score-set", here, "--model", "dover-mobile", "--weights", "small.pth", "--out", tmp_path/"s.csv", "--pattern", "[1-3].mp4")[0] == 0
    assert call("ranks", "build", tmp_path/"s.csv", "--name", "mine", "--model", "dover-mobile", "--out", tmp_path/"sets.json")[0] == 0
    status, (r,), _ = call("dover", "1.mp4", "--mobile", "--weights", "small.pth", "--json", "--ranks", tmp_path/"sets.json")
    assert status == 0 and list(r) == KEYS and set(r["ranks"]["mine"]) == {"technical", "aesthetic", "fused"}


def test_the_real_mobile_network(call, tmp_path, monkeypatch):
    "Official layout of a weight file, the network in its own size; another model's file is refused with a report."
    monkeypatch.setitem(official.NETWORKS, "dover-mobile", DOVERMobile)
    torch.manual_seed(0)
    torch.save({"state_dict": DOVERMobile().state_dict(), "validation_results": [0.5]}, tmp_path/"m.pth")
    status, (r,), _ = call("dover", "1.mp4", "--mobile", "--weights", tmp_path/"m.pth", "--json")
    assert status == 0 and r["error"] is None and np.isfinite([r["technical"], r["aesthetic"]]).all()
    status, (r,), err = call("dover", "1.mp4", "--mobile", "--weights", "small.pth", "--json")
    assert status == 1 and r["error"].startswith("small.pth: these weights do not fit DOVERMobile") and "missing" in err and r["weights"] is None


@pytest.mark.parametrize("args,pull", [("dover", "dover"), ("dover --mobile", "dover-mobile"), ("cover", "cover"),
                                       ("cover --weights cover.pth", official.IMAGE_ENCODER)])
def test_without_weights_the_answer_is_the_command(call, args, pull):
    command, *rest = args.split()
    status, rows, err = call(command, "1.mp4", "2.mp4", *rest, "--json")
    assert status == 1 and len(rows) == 2 and all(f"qualivision weights pull {pull}`" in r["error"] for r in rows) and pull in err
    status, text, err = call(command, "1.mp4", *rest)
    assert status == 1 and not text and f"weights pull {pull}" in err


def test_cover_and_pictures(call, here, tmp_path, monkeypatch):
    "The network in its own size with a small image encoder on a picture; the small one on a clip in 4K."
    from PIL import Image
    clip = COVER(CLIPImage(width=64, layers=1, heads=1, patch=32, size=64))
    torch.save({"state_dict": clip.state_dict()}, tmp_path/"c.pth")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(tmp_path/"a.png")
    write_video(tmp_path/"4k.mp4", np.full((3, 2160, 3840, 3), 90, np.uint8))
    monkeypatch.setitem(official.NETWORKS, "cover", COVER)
    status, (r,), _ = call("cover", tmp_path/"a.png", "--weights", tmp_path/"c.pth", "--clip", "clip.pth", "--json")
    assert status == 0 and r["error"] is None and r["overall"] == pytest.approx(r["semantic"] + r["technical"] + r["aesthetic"])
    assert r["ranks"] is None and r["weights"]["licence"] == "MIT"
    monkeypatch.setitem(official.NETWORKS, "cover", SmallCover)
    (tmp_path/"b.png").write_bytes(b"no picture")
    status, rows, _ = call("cover", tmp_path/"4k.mp4", tmp_path/"b.png", "--weights", "cover.pth", "--clip", "clip.pth", "--json")
    assert status == 1 and rows[0]["error"] is None and "b.png" in rows[1]["error"]
    assert "qualivision cover" in call("dover", tmp_path/"a.png", "--weights", "small.pth", "--json")[1][0]["error"]
    with pytest.raises(official.OfficialError, match="^small.pth: .*no image encoder"): official.load_model("cover", "cover.pth", "small.pth")


SEEDED = ["dover 0.mp4 --weights small.pth --json", "dover 0.mp4 --weights small.pth", "dover 0.mp4 --mobile --weights small.pth --json",
          "cover 0.mp4 --weights cover.pth --clip clip.pth --json", "infer-datasets KoNViD.txt --weights small.pth --out OUT/scores --json",
          "score-set list.txt --model dover --weights small.pth --out OUT/s.csv",
          "score-set list.txt --model dover --weights small.pth --out OUT/s.csv --format dover --workers 3",
          "score-set list.txt --model dover-mobile --weights small.pth --out OUT/s.parquet",
          "score-set list.txt --model cover --weights cover.pth --clip clip.pth --out OUT/s.csv --format cover"]


@pytest.mark.parametrize("command", SEEDED)
def test_same_seed_same_bytes(call, here, tmp_path, command):
    "Every command that draws: twice the same bytes on stdout and in its files, others with another seed."
    (here/"list.txt").write_text("1.mp4\n2.mp4\n")
    (here/"KoNViD.txt").write_text("".join(f"{k}.mp4, -1, -1, {m}\n" for k, m in enumerate((2.5, 3.5, 1.5, 4.))))
    def run(seed):
        shutil.rmtree(tmp_path/"out", ignore_errors=True)
        args = command.replace("OUT", str(tmp_path/"out")).split()
        r = CliRunner().invoke(app, [*args, "--seed", str(seed)])
        assert r.exit_code == 0, r.output
        files = {p.name: p.read_bytes() for p in tmp_path.rglob("out/**/*") if p.suffix in (".csv", ".parquet")}
        assert bool(files) == ("OUT" in command)
        return r.stdout.replace(f'"seed": {seed}', "").replace(f"seed {seed}", ""), files
    first, again, other = run(3), run(3), run(4)
    assert first == again
    assert first[0] != other[0] if not first[1] else all(first[1][name] != other[1][name] for name in first[1])


WRONG = ["dover", "dover 1.mp4 --seed -1", "dover 1.mp4 --fused best", "cover", "score-set . --model dover", "score-set . --model nr --out a.csv",
         "score-set . --model dover --out a.txt", "score-set . --model dover --out a.csv --format cover", "data pull", "infer-datasets",
         "score-set . --model qualivision --out a.csv --format dover", "score-set . --model dover --out a.csv --format dover --fused corrected",
         "infer-datasets a b --name LSVQ", "infer-datasets a --model qualivision"]


def test_wrong_use_is_status_2(call):
    for args in WRONG:
        status, out, err = call(*args.split())
        assert status == 2 and err, args


# ---------------------------------------------------------------- a collection

def rows_of(path):
    with open(path, newline="") as f: return list(csv.DictReader(f, skipinitialspace=True))


def test_score_set_of_a_folder(call, here, tmp_path, monkeypatch):
    folder = tmp_path/"set"
    (folder/"more").mkdir(parents=True)
    for name, source in {"b.mp4": "1.mp4", "more/a.MOV": "2.mp4", "bad.mp4": "broken.mp4", "note.txt": "broken.mp4"}.items():
        shutil.copy(here/source, folder/name)
    args = "score-set", folder, "--model", "dover", "--weights", "small.pth", "--out", tmp_path/"s.csv"
    status, about, err = call(*args, "--json")
    assert status == 1 and about == dict(out=str(tmp_path/"s.csv"), model="dover", videos=3, scored=2, kept=0, failed=1,
                                            failed_by={"unreadable": 1}, passed_over={".txt": 1}, seconds=about["seconds"]) and "bad.mp4" in err
    rows, first = rows_of(tmp_path/"s.csv"), (tmp_path/"s.csv").read_bytes()
    assert [r["video"] for r in rows] == ["b.mp4", "bad.mp4", "more/a.MOV"]
    assert list(rows[0]) == ["video", "technical", "aesthetic", "fused", "error", "error_kind", "sha256"]
    assert rows[1]["fused"] == "" and "bad.mp4" in rows[1]["error"] and rows[0]["sha256"] == sha256((folder/"b.mp4").read_bytes()).hexdigest()
    one = call("dover", folder/"b.mp4", "--weights", "small.pth", "--json")[1][0]
    assert all(rows[0][b] == f"{one[b]:.6f}" for b in ("technical", "aesthetic", "fused"))
    again = call(*args, "--json")[1]
    assert (again["scored"], again["kept"], again["failed"]) == (0, 2, 1) and (tmp_path/"s.csv").read_bytes() == first
    shutil.copy(here/"3.mp4", folder/"b.mp4")
    again = call(*args, "--workers", 3, "--json")[1]
    assert (again["scored"], again["kept"]) == (1, 1) and rows_of(tmp_path/"s.csv")[2] == rows[2] and rows_of(tmp_path/"s.csv")[0] != rows[0]
    assert call(*args, "--seed", 5, "--json")[1]["scored"] == 2 and rows_of(tmp_path/"s.csv")[2]["technical"] != rows[2]["technical"]
    status, text, _ = call(*args[:-1], tmp_path/"m.csv", "--pattern", "*.mov", "--format", "dover")
    lines = (tmp_path/"m.csv").read_text().splitlines()
    assert status == 0 and "1 videos" in text and lines[0] == "path, aesthetic score, technical score, overall/final score"
    t, a, fused = (float(rows[2][b]) for b in ("technical", "aesthetic", "fused"))
    percent = [100 / (1 + np.exp(-(a + .08285) / .03774)), 100 / (1 + np.exp(-(t - .1107) / .07355)), 100 * fused]    # the official script's
    name, *cells = lines[1].split(", ")
    assert name == "more/a.MOV" and [float(c) for c in cells] == pytest.approx(percent, abs=2e-3)
    assert call("score-set", tmp_path/"w", "--model", "dover", "--weights", "small.pth", "--out", tmp_path/"x.csv", "--json")[0] == 1
    status, said, _ = call(*args[:-1], tmp_path/"none.csv", "--pattern", "*.avi", "--json")
    assert status == 1 and "no video" in said["error"] and not (tmp_path/"none.csv").exists()


def test_parquet_and_the_form_of_cover(call, here, tmp_path):
    (tmp_path/"list.txt").write_text(f"{here/'1.mp4'}\n\n{here/'broken.mp4'}\n")
    args = "score-set", tmp_path/"list.txt", "--model", "cover", "--weights", "cover.pth", "--clip", "clip.pth", "--out"
    assert call(*args, tmp_path/"c.csv", "--format", "cover")[0] == 1
    lines = (tmp_path/"c.csv").read_text().splitlines()
    assert lines[0] == "Filename,Semantic,Technical,Aesthetic,Overall" and lines[2] == f"{here/'broken.mp4'},,,,"
    assert all(len(cell.split(".")[1]) == 4 for cell in lines[1].split(",")[1:])
    for name in ("a.parquet", "b.parquet"): assert call(*args, tmp_path/name)[0] == 1
    table = pd.read_parquet(tmp_path/"a.parquet")
    assert list(table) == ["video", "semantic", "technical", "aesthetic", "overall", "error", "error_kind", "sha256"]
    assert table["error"].notna().tolist() == [False, True]
    assert f"{table['overall'][0]:.4f}" == lines[1].split(",")[-1] and (tmp_path/"a.parquet").read_bytes() == (tmp_path/"b.parquet").read_bytes()


def test_pseudo_labels(call, tmp_path):
    "Five MOS for the rows of a manifest are a label file that training reads."
    root = toy_set(tmp_path/"set", train=2, val=0)
    tiny.checkpoint(tmp_path/"c")
    label = root/"train"/"labels"/"train_labels.csv"
    label.rename(tmp_path/"set"/"train"/"wanted.csv")
    args = "--model", "qualivision", "--checkpoint", tmp_path/"c", "--device", "cpu", "--json"
    status, about, _ = call("score-set", root/"train"/"wanted.csv", "--out", label, *args)
    assert status == 0 and about["scored"] == 4
    frame = validate(load_dataset(root))
    assert len(frame) == 4 and frame["Prompt"].iloc[0] == toy_prompt(0) and frame["Overall_MOS"].between(1, 5).all()
    (tmp_path/"bare.csv").write_text("video\na.mp4\n")
    assert "prompts" in call("score-set", tmp_path/"bare.csv", "--out", tmp_path/"x.csv", *args)[1]["error"]
    assert "prompts" in call("score-set", root/"train"/"videos", "--out", tmp_path/"x.csv", *args)[1]["error"]


class Length:
    "Scores a file by its length; stands in for a network."
    name, columns, settings = "length", ("overall",), {"seed": 0}
    def __init__(self, pause=0.): self.done, self.pause = [], pause
    def prepare(self, path): return Path(path)
    def rate(self, path, prompt):
        time.sleep(self.pause)
        self.done.append(path.name)
        return {"overall": path.stat().st_size / 7}


def test_killed_and_started_again(tmp_path):
    "SIGKILL in the middle: the rerun scores what was not finished, and the bytes are those of an undisturbed run."
    (tmp_path/"set").mkdir()
    for k in range(60): (tmp_path/"set"/f"{k:02}.mp4").write_text("x" * k)
    process = Forked(lambda: score_set("set", "out.csv", Length(.2)), cwd=tmp_path)
    out = tmp_path/"out.csv"
    try:
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 4): time.sleep(.05)
        with pytest.raises(BulkError, match="another process"): score_set(tmp_path/"set", out, Length())
    finally: process.send_signal(signal.SIGKILL); process.wait()
    before = out.read_text().splitlines()
    assert process.returncode == -signal.SIGKILL and 4 <= len(before) < 60
    scorer = Length()
    about = score_set(tmp_path/"set", out, scorer)
    assert about["kept"] >= len(before) - 1 and about["kept"] + about["scored"] == 60 and len(scorer.done) == about["scored"]
    score_set(tmp_path/"set", tmp_path/"whole.csv", Length(), workers=4)
    assert out.read_bytes() == (tmp_path/"whole.csv").read_bytes() and out.read_text().splitlines()[:len(before)] == before
    assert not list(tmp_path.glob("*.new")) and not list(tmp_path.glob("*-wal"))


def test_names_that_are_awkward(tmp_path):
    "No UTF-8, commas, quotes, a link in a circle; hidden files and other endings stay out."
    folder = tmp_path/"set"
    folder.mkdir()
    names = [os.fsdecode(b"\xff.mp4"), 'a, "b".mp4', " c.mp4"]
    for n in (*names, ".hidden.mp4", "d.txt"): (folder/n).write_text("x")
    (folder/"circle").symlink_to(folder)
    assert sorted(n for n, _, _ in find_videos(folder)) == sorted(names)
    score_set(folder, tmp_path/"o.csv", Length())
    rows = rows_of(tmp_path/"o.csv")
    assert [r["video"] for r in rows] == [r"\xff.mp4" if n == names[0] else n for n in sorted(names, key=os.fsencode)]
    assert not any(r["error"] for r in rows)
    score_set(folder, tmp_path/"o.parquet", Length())
    assert "\\xff.mp4" in pd.read_parquet(tmp_path/"o.parquet")["video"].tolist()


PEAKS = """
import tracemalloc
from test_tools import Length, score_set
for n in (300, 3000):
    with open("long.txt", "w") as f: f.writelines(f"folder/of/a/video/with/a/long/name/{k:09}.mp4\\n" for k in range(n))
    tracemalloc.start()
    assert score_set("long.txt", f"{n}.csv", Length())["failed"] == n
    print(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""


def test_memory_does_not_grow_with_the_set(tmp_path):
    "Names that are not there: everything but the network; in a process where no other test's threads are traced too."
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = [int(line) for line in done.stdout.split()]
    assert peak[1] < peak[0] + 300_000, peak


def test_what_stops_a_run_says_so(tmp_path):
    (tmp_path/"a.mp4").write_text("x")
    (tmp_path/"o.csv.journal").write_text("this is no database, and it is longer than the head of one" * 20)
    with pytest.raises(BulkError, match="no journal"): score_set(tmp_path, tmp_path/"o.csv", Length())
    for out, said in ((tmp_path/"o.txt", "neither"), (tmp_path/"a.mp4"/"x.csv", "nothing can be written")):
        with pytest.raises(QualiVisionError, match=said): score_set(tmp_path, out, Length())
    with pytest.raises(BulkError, match="no such scores"): score_set(tmp_path, tmp_path/"p.csv", Length(), form="cover")
    with pytest.raises(FileError, match="cannot be read"): list(read_manifest(tmp_path/"gone.csv"))
    class Greedy(Length):
        def prepare(self, path): raise MemoryError
    assert score_set(tmp_path, tmp_path/"g.csv", Greedy())["failed"] == 1 and "memory ran out" in (tmp_path/"g.csv").read_text()


# ---------------------------------------------------------------- known data sets

def test_infer_datasets(call, here, tmp_path):
    "Through the command: the numbers follow from the scores that lie in the file beside them."
    mos = [2.5, 3.5, 1.5, 4.0]
    label = tmp_path/"KoNViD"/"labels.txt"
    label.parent.mkdir()
    label.write_text("".join(f"{k}.mp4, -1, -1, {m}\n" for k, m in enumerate(mos)) + "gone.mp4, -1, -1, 3\n")
    args = "infer-datasets", label, "--videos", here, "--weights", "small.pth", "--out", tmp_path/"scores"
    status, (r,), err = call(*args, "--json")
    assert status == 1 and (r["set"], r["weight"], r["videos"], r["scored"], r["failed"]) == ("KoNViD-1k", .54, 5, 4, 1) and "gone.mp4" in err
    assert r["why"] == "its path names it (konvid): 5 of 1200 videos, MOS from 1.5 to 4"
    rows = rows_of(tmp_path/"scores"/"KoNViD-1k-dover.csv")[:4]
    t, a = (np.array([float(x[b]) for x in rows]) for b in ("technical", "aesthetic"))
    fused = .54 * (t - t.mean()) / t.std() + .46 * (a - a.mean()) / a.std()
    assert r["srocc"] == pytest.approx(srocc(fused, mos)) and r["plcc"] == pytest.approx(np.corrcoef(fused, mos)[0, 1])
    same = (fused - fused.mean()) / fused.std() * np.std(mos) + np.mean(mos)
    assert r["rmse"] == pytest.approx(np.sqrt(np.mean((same - mos) ** 2))) and set(r["branches"]) == {"technical", "aesthetic"}
    status, text, _ = call(*args, "--name", "cvd2014", "--weight", ".3")
    assert status == 1 and all(word in text for word in ("CVD2014", "SROCC", "PLCC", "KRCC", "RMSE"))
    status, said, _ = call("infer-datasets", label, "--videos", tmp_path, "--weights", "small.pth", "--out", tmp_path/"scores", "--json")
    assert status == 1 and "0 of 5" in said["error"]


def test_labels_of_views(tmp_path):
    for k in range(3): (tmp_path/"acd"[k]).write_text("x" * (10 + k))
    class Two(Length):
        columns = ("technical", "aesthetic", "fused")
        def rate(self, path, prompt): return dict(technical=-path.stat().st_size, aesthetic=path.stat().st_size, fused=.5)
    (tmp_path/"divide.txt").write_text("a,1,3,1\nc,2,2,2\nd,3,1,3\n")
    r = infer_set(tmp_path/"divide.txt", None, Two(), tmp_path/"o", known_set("DIVIDE-3k"), weight=0.)
    found = [r["plcc"], *(r["branches"][b]["srocc"] for b in ("technical", "aesthetic"))]
    assert r["set"] == "DIVIDE-3k" and found == pytest.approx([1, 1, 1]) and r["plcc_logistic"] is None
    scores = {b: np.array([1., 2, 4]) for b in ("semantic", "technical", "aesthetic", "overall")}
    assert set_metrics(scores, {"overall": [1, 2, 4]})["rmse"] == pytest.approx(0, abs=1e-9)


def test_a_path_is_no_proof(tmp_path):
    "Six films with opinions from .6 to 5.1 are not CVD2014, and lengths and frame rates are no opinions; the answer says so."
    for k in range(6): (tmp_path/f"v{k}.mp4").write_text("x" * (k + 1))
    class Two(Length):
        columns = ("technical", "aesthetic", "fused")
        def rate(self, path, prompt): return dict(technical=path.stat().st_size, aesthetic=-1 / path.stat().st_size, fused=.5)
    said = {"AIGC_VD": "no known data set", "divided": "no known data set", "CVD2014": "names CVD2014 .cvd2014., but MOS of",
            "divide": "--set DIVIDE-3k"}
    for folder, words in said.items():
        (tmp_path/folder).mkdir()
        rows = "".join(f"v{k}.mp4,{200 + k},{25 - k},{m}\n" for k, m in enumerate((5.1, 4.2, 3.3, 2.4, 1.5, .6)))
        (tmp_path/folder/"labels.txt").write_text(rows)
        r = infer_set(tmp_path/folder/"labels.txt", tmp_path, Two(), tmp_path/folder/"o")
        assert r["set"] == ("DIVIDE-3k" if folder == "divide" else "labels") and r["weight"] == .6104 and re.search(words, r["why"]), r
        assert r["branches"]["technical"]["srocc"] == pytest.approx(-1), "compared with the overall opinion, not with a frame rate"


def test_one_undefined_number_hides_no_other(call, here, tmp_path):
    "A branch that is constant, opinions that are, four videos: a dash with its reason, in JSON null; the rest stands."
    for k in range(5): (tmp_path/f"{k}.mp4").write_text("x" * (k + 1))
    class Flat(Length):
        columns = ("technical", "aesthetic", "fused")
        def rate(self, path, prompt): return dict(technical=1., aesthetic=path.stat().st_size, fused=.5)
    (tmp_path/"l.txt").write_text("".join(f"{k}.mp4,0,0,{m}\n" for k, m in enumerate((1, 3, 2, 5, 4))))
    r = infer_set(tmp_path/"l.txt", None, Flat(), tmp_path/"o")
    assert r["branches"]["aesthetic"] == {"srocc": pytest.approx(.8), "plcc": pytest.approx(.8), "reasons": {}}
    assert r["srocc"] is r["rmse"] is None and r["reasons"]["srocc"] == "technical: its scores are constant"
    assert r["branches"]["technical"]["plcc"] is None and "constant" in r["branches"]["technical"]["reasons"]["plcc"]
    label = tmp_path/"four.txt"
    label.write_text("".join(f"{k}.mp4,0,0,{m}\n" for k, m in enumerate((1, 3, 2, 5))))
    args = "infer-datasets", label, "--videos", here, "--weights", "small.pth", "--out", tmp_path/"p"
    status, (r,), _ = call(*args, "--json")
    assert status == 0 and r["plcc_logistic"] is None and r["reasons"] == {"plcc_logistic": "4 clips are too few"} and r["srocc"] is not None
    status, text, _ = call(*args)
    assert status == 0 and "no PLCC_LOGISTIC: 4 clips are too few" in text and "names no known data set" in " ".join(text.split())


def test_results_of_one_name_do_not_overwrite_each_other(call, here, tmp_path):
    "In one command they lie under the names of their folders; in two the second is refused before it scores."
    args = "--videos", here, "--weights", "small.pth", "--out", tmp_path/"o", "--json"
    for folder, mos in (("a", (1, 3, 2)), ("b", (3, 1, 2))):
        (tmp_path/folder).mkdir()
        (tmp_path/folder/"labels.txt").write_text("".join(f"{k}.mp4,0,0,{m}\n" for k, m in enumerate(mos, 1)))
    labels = [tmp_path/f/"labels.txt" for f in "ab"]
    status, (a, b), _ = call("infer-datasets", *labels, *args)
    assert status == 0 and [Path(r["table"]).name for r in (a, b)] == ["a-labels-dover.csv", "b-labels-dover.csv"] and a["srocc"] != b["srocc"]
    assert call("infer-datasets", labels[0], *args)[0] == 0
    before = (tmp_path/"o"/"labels-dover.csv").read_bytes()
    status, said, _ = call("infer-datasets", labels[1], *args)
    assert status == 1 and f"holds the scores of {labels[0]}" in said["error"] and (tmp_path/"o"/"labels-dover.csv").read_bytes() == before
    assert "given twice" in call("infer-datasets", labels[0], labels[0], *args)[1]["error"]


def test_what_is_passed_over_is_said(call, here, tmp_path):
    (tmp_path/"set").mkdir()
    for name in ("a.vob", "b.txt", "c.doc", "d.doc"): shutil.copy(here/"1.mp4", tmp_path/"set"/name)
    args = "score-set", tmp_path/"set", "--model", "dover", "--weights", "small.pth", "--out", tmp_path/"o.csv"
    status, about, _ = call(*args, "--json")
    assert status == 0 and about["passed_over"] == {".doc": 2, ".txt": 1} and about["scored"] == 1
    assert "passed over: 2 .doc, 1 .txt" in call(*args)[1]


class Hub(BaseHTTPRequestHandler):
    "A hub with one data set; the first answer to a file breaks off in the middle."
    files, broke, asked = {}, set(), []

    def log_message(self, *a): pass
    def do_HEAD(self): self.send_response(200); self.end_headers()
    def do_GET(self):
        Hub.asked.append((self.path, self.headers.get("Range")))
        if self.path.startswith("/api/datasets/"):
            about = [{"rfilename": n, "size": len(b), "lfs": {"sha256": h}} for n, (b, h) in Hub.files.items()]
            body = json.dumps({"siblings": about + [{"rfilename": ".gitattributes", "size": 3}]}).encode()
            self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
            return self.wfile.write(body)
        name = self.path.rsplit("/", 1)[-1]
        body, start = Hub.files[name][0], int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        if start: self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start)); self.end_headers()
        if name in Hub.broke: return self.wfile.write(body[start:])
        Hub.broke.add(name)
        self.wfile.write(body[start:start + len(body) // 2])


def archive(*members, kind="w:gz") -> bytes:
    "A tar of (name, bytes or the target of a link)."
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=kind) as t:
        for name, what in members:
            m = tarfile.TarInfo(name)
            if isinstance(what, str): m.type, m.linkname = tarfile.SYMTYPE, what
            else: m.size = len(what)
            t.addfile(m, io.BytesIO(what) if isinstance(what, bytes) else None)
    return made.getvalue()


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.files, Hub.broke, Hub.asked = {}, set(), []
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    def put(name, body): Hub.files[name] = (body, sha256(body).hexdigest())
    yield put
    server.shutdown(); server.server_close()


def test_pull(call, hub, tmp_path, monkeypatch):
    "Broken off and taken up, checked, unpacked, removed; a second run fetches nothing; a changed file is fetched again."
    noise = os.urandom(50_000)
    hub("ia-batch1.tar.gz", archive(("ia/a.mp4", noise), ("ia/b.mp4", b"second")))
    hub("README.md", b"a data set")
    status, about, err = call("data", "pull", "lsvq", "--to", tmp_path/"lsvq", "--json")
    assert status == 0 and about["files"] == about["fetched"] == 2 and "PatchVQ" in err
    assert (tmp_path/"lsvq"/"ia"/"a.mp4").read_bytes() == noise
    assert {p.name for p in (tmp_path/"lsvq").iterdir()} == {"ia", "README.md", ".pulled.json", ".pulled.lock"}
    assert [r for _, r in Hub.asked if r], "the broken connection was taken up where it broke"
    count = len(Hub.asked)
    assert call("data", "pull", "LSVQ", "--to", tmp_path/"lsvq", "--json")[1]["fetched"] == 0 and len(Hub.asked) == count + 1
    hub("README.md", b"another text")
    assert call("data", "pull", "LSVQ", "--to", tmp_path/"lsvq", "--json")[1]["fetched"] == 1
    Hub.files["README.md"] = (b"forged text!", sha256(b"other").hexdigest())
    with pytest.raises(DataError, match="SHA-256"): pull_set("LSVQ", tmp_path/"lsvq", progress=False)
    assert not (tmp_path/"lsvq"/"README.md").exists()
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: Usage(10, 9, 1))
    with pytest.raises(DataError, match="GB are free"): pull_set("LSVQ", tmp_path/"new", progress=False)
    assert {p.name for p in (tmp_path/"new").iterdir()} <= {".pulled.lock"}


def test_one_process_pulls_into_a_folder(hub, tmp_path):
    "Two would write into one part; the second is told, and the first is not disturbed. A list of what was pulled that is none is refused."
    from filelock import FileLock
    hub("README.md", b"a data set")
    with FileLock(tmp_path/".pulled.lock"):
        with pytest.raises(DataError, match="another process pulls"): pull_set("LSVQ", tmp_path, progress=False)
    assert {p.name for p in tmp_path.iterdir()} == {".pulled.lock"} and pull_set("LSVQ", tmp_path, progress=False)["fetched"] == 1
    for text in ("no JSON", "[1, 2]", "3"):
        (tmp_path/".pulled.json").write_text(text)
        with pytest.raises(DataError, match="not the list"): pull_set("LSVQ", tmp_path, progress=False)
    with pytest.raises(FileError, match="nothing can be written"): pull_set("LSVQ", tmp_path/"README.md"/"x", progress=False)


def test_pull_that_cannot_be(call, hub, tmp_path, monkeypatch):
    status, said, _ = call("data", "pull", "live-vqc", "--json")
    assert status == 1 and "live.ece.utexas.edu" in said["error"]
    hub("../evil.txt", b"x")
    with pytest.raises(DataError, match="leads out"): pull_set("LSVQ", tmp_path/"a"/"b", progress=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="no way"): pull_set("LSVQ", tmp_path/"c", progress=False)
    status, rows, _ = call("data", "list", "--json")
    assert status == 0 and {"LSVQ", "KoNViD-1k", "LIVE-VQC", "YouTube-UGC", "CVD2014", "DIVIDE-3k"} <= {r["name"] for r in rows}
    assert all(r["address"].startswith("https://") and r["licence"] for r in rows) and "PatchVQ" in call("data", "list")[1]


EVIL = {"up": [("../evil", b"x")], "absolute": [("/evil", b"x")], "windows": [("C:\\evil", b"x")], "back": [("a\\..\\..\\evil", b"x")],
        "link": [("l", ".."), ("l/evil", b"x")]}


@pytest.mark.parametrize("case", EVIL)
def test_hostile_archives(case, tmp_path):
    (tmp_path/"a.tar.gz").write_bytes(archive(*EVIL[case]))
    with pytest.raises(DataError, match="Do not use"): unpack_archive(tmp_path/"a.tar.gz", tmp_path/"in"/"here")
    with zipfile.ZipFile(tmp_path/"a.zip", "w") as z:
        for name, what in EVIL[case]:
            m = zipfile.ZipInfo(name)
            if isinstance(what, str): m.external_attr = 0o120777 << 16
            z.writestr(m, what)
    with pytest.raises(DataError, match="Do not use"): unpack_archive(tmp_path/"a.zip", tmp_path/"in"/"here")
    assert not list(tmp_path.rglob("*evil*"))


def test_links_that_were_there_and_damaged_archives(tmp_path):
    (tmp_path/"in").mkdir(); (tmp_path/"out").mkdir()
    (tmp_path/"in"/"l").symlink_to(tmp_path/"out")
    (tmp_path/"a.tar").write_bytes(archive(("l/evil", b"x"), kind="w"))
    with pytest.raises(DataError, match="through a link"): unpack_archive(tmp_path/"a.tar", tmp_path/"in")
    assert not list((tmp_path/"out").iterdir())
    whole = archive(("a.mp4", os.urandom(9000)))
    for name, body in {"cut.tar.gz": whole[:5000], "text.zip": b"no zip", "text.tar.gz": b"no tar"}.items():
        (tmp_path/name).write_bytes(body)
        with pytest.raises(DataError, match="cannot be unpacked"): unpack_archive(tmp_path/name, tmp_path/"d")
    assert not list((tmp_path/"d").glob("*.mp4"))


def test_weights_of_another_form_are_refused(here):
    with pytest.raises(WeightsError): official.load_model("dover-mobile", here/"clip.pth")
    with pytest.raises(official.OfficialError, match="There are: dover"): official.load_model("fast-vqa")
