"Files that do harm, names that do harm, disks that are full: one row each, and the others are scored."
import csv
import os
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tiny
from victims import Victim, decode

from qualivision import devices
from qualivision.inference.apart import Apart
from qualivision.data.collection import read_manifest
from qualivision.data.container import Limits
from qualivision.data.video import probe
from qualivision.files import csv_line, read_table, readable
from qualivision.inference import bulk
from qualivision.inference.bulk import score_set
from qualivision.inference.score import Scorer
from qualivision.official.views import is_picture, read_picture
from qualivision.quality import DIMENSIONS, QualiVisionError
from qualivision.toy import toy_clip

pytestmark = pytest.mark.usefixtures("one_thread")
CHEAP = Limits(time=3, memory=.1)


def write(folder: Path, *names) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names: (folder/name).write_bytes(b"x")
    return folder


def decoders() -> list:
    "Processes that decode, of all that this one has begun."
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE and "forkserver" in " ".join(p.cmdline())
            and p.ppid() != os.getpid()]


def test_what_hangs_dies_or_eats_memory_is_a_row(tmp_path):
    "Each with its kind and its reason; the others are scored, an unforeseen exception keeps its traceback, and no process is left."
    names = ["good.mp4", "hang.mp4", "segv.mp4", "fine.mp4", "eat.mp4", "kill.mp4", "odd.mp4", "last.mp4"]
    said = []
    about = score_set(write(tmp_path/"set", *names), tmp_path/"o.csv", Victim(), workers=2, report=said.append, limits=CHEAP)
    table = read_table(tmp_path/"o.csv").set_index("video")
    assert dict(table.error_kind) == {"good.mp4": "", "hang.mp4": "timeout", "segv.mp4": "crash", "fine.mp4": "", "eat.mp4": "memory",
                                      "kill.mp4": "crash", "odd.mp4": "fault", "last.mp4": ""}
    assert about["failed_by"] == {"crash": 2, "fault": 1, "memory": 1, "timeout": 1} and (about["scored"], about["failed"]) == (3, 5)
    for name, words in {"hang": "longer than 3 s", "segv": "died (SIGSEGV)", "eat": "more than 0.1 GB", "odd": "ZeroDivisionError"}.items():
        assert words in table.error[f"{name}.mp4"] and f"{name}.mp4" in table.error[f"{name}.mp4"]
    assert "Traceback" in "".join(said) and 'raise ZeroDivisionError("odd")' in "".join(said)
    assert [float(x) for x in table.overall[["good.mp4", "last.mp4"]]] == [4, 4] and not decoders()
    for p in (tmp_path/"set").glob("*d.mp4"): p.unlink()
    about = score_set(tmp_path/"set", tmp_path/"o.csv", Victim(), limits=CHEAP, fail_fast=True)
    assert about["failed"] == 1 and about["scored"] == 0, "it stops at the first failure"


def test_ctrl_c_does_not_wait_for_a_decoder_that_hangs(monkeypatch):
    there = Apart(decode, Limits())
    there("first.mp4")                              # the server is there: its start is not what is timed
    def stopped(jobs): raise KeyboardInterrupt
    monkeypatch.setitem(devices.BATCH, "cpu", 1)
    rows = devices.flow(map(devices.Job, ["a.mp4", "hang.mp4"]), lambda job: there(job.item), stopped, workers=2, stop=there.close)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt): list(rows)
    assert time.monotonic() - began < 9 and not decoders()


# ---------------------------------------------------------------- what is no file, and names that do harm

NAMES = ["=1+1.mp4", "+a.mp4", "-b.mp4", "@c.mp4", "\td.mp4", "'=e.mp4", 'q"u,o\'te.mp4', "new\nline.mp4", " space.mp4", os.fsdecode(b"caf\xe9.mp4")]


def test_kinds_of_files_are_refused_before_they_are_opened(tmp_path):
    "A pipe nobody writes to, a device that never ends, a folder, links to nowhere and to a device: their kind is the reason."
    os.mkfifo(tmp_path/"pipe.mp4")
    (tmp_path/"folder.mp4").mkdir()
    for name, target in {"zero.mp4": "/dev/zero", "lost.mp4": "gone", "round.mp4": "round.mp4"}.items(): (tmp_path/name).symlink_to(target)
    said = {"pipe.mp4": "it is a pipe", "folder.mp4": "it is a folder", "zero.mp4": "it is a device", "lost.mp4": "it is a link to gone, which is",
            "round.mp4": "it is a link to round.mp4", "gone.mp4": "there is no such file", "https://x.org/a.mp4": "it is an address"}
    for call in (probe, read_picture, is_picture, lambda p: bulk._content(p, None, None)):
        for name, cause in said.items():
            path = name if "://" in name else str(tmp_path/name)
            if call is is_picture: assert not call(path)
            else:
                with pytest.raises(QualiVisionError) as e: call(path)
                assert (cause in str(e.value) or call is read_picture) and e.value.kind == "unreadable", (name, str(e.value))


def test_names_survive_every_table(tmp_path):
    "CSV, Parquet and what is read back; a spreadsheet finds no formula in the CSV, and finds its numbers."
    folder = write(tmp_path/"set", *NAMES)
    shown = sorted(map(readable, NAMES))
    for name in ("o.csv", "o.parquet"):
        score_set(folder, tmp_path/name, Victim())
        assert sorted(read_table(tmp_path/name).video) == shown
    class Prompted(Victim):
        name, columns, prompts, scorer = "prompted", DIMENSIONS, True, SimpleNamespace(intervals={})
        def rate(self, views, prompt): return dict.fromkeys(DIMENSIONS, -.0789) | {"warnings": ["=warned"]}
    score_set(((n, str(folder/n), f"={n}") for n in NAMES), tmp_path/"p.csv", Prompted())
    raw = list(csv.reader(open(tmp_path/"p.csv", newline="", encoding="utf-8")))
    assert not [c for row in raw for c in row if c[:1] in ("=", "+", "@", "\t", "\r") or c[:1] == "-" and c != "-0.078900"]
    table = read_table(tmp_path/"p.csv")
    assert table.Prompt.tolist() == [readable(f"={n}") for n in NAMES] and set(table.Overall_MOS) == {"-0.078900"} and table.warnings[2] == "=warned"
    (tmp_path/"l.csv").write_text(csv_line(["video", "mos"]) + "".join(csv_line([n, 3]) for n in NAMES[:6]))
    assert [name for name, *_ in read_manifest(tmp_path/"l.csv")] == [n.strip() for n in NAMES[:6]]


def test_limits_and_kinds_in_the_answer_of_a_command(tmp_path, monkeypatch):
    "By the readers of a real scorer, apart and not: kinds in JSON, their count in the last line, what is allowed and what is beyond it."
    toy_clip(tmp_path/"-x.mp4", (9, 99, 200))
    (tmp_path/"text.mp4").write_text("no video")
    monkeypatch.chdir(tmp_path)
    scorer = Scorer.from_checkpoint(tiny.checkpoint(tmp_path/"checkpoints"/"dover"), "cpu")
    monkeypatch.setattr(Scorer, "from_checkpoint", lambda *a, **k: scorer)
    def kinds(*args): return [r["error_kind"] for r in tiny.command("score", "--prompt", "a boat", "--json", *args)[1]]
    assert kinds("--", "-x.mp4", "text.mp4") == [None, "unreadable"] and kinds("--fail-fast", "text.mp4", "./-x.mp4") == ["unreadable"]
    assert kinds("--limit", "frames=5", "./-x.mp4") == ["limit"] and kinds("--limit", "frames=6", "./-x.mp4") == [None]
    for limit in ("size=1e-9", "megapixels=0.001", "duration=.1"): assert kinds("--limit", limit, "./-x.mp4") == ["limit"], limit
    status, out, _ = tiny.command("score", "text.mp4", "./-x.mp4", "--prompt", "a boat", "--isolate")
    assert status == 1 and "1 of 2 videos scored (1 unreadable)." in out
    assert scorer.score_many([("./-x.mp4", " ")]).__next__().error_kind == "prompt"
    (tmp_path/"l.csv").write_text("video,Prompt\ntext.mp4,a boat\n./-x.mp4,a boat\n")
    status, about, _ = tiny.command("score-set", "l.csv", "--model", "qualivision", "--out", "o.csv", "--json")
    assert status == 1 and about["failed_by"] == {"unreadable": 1} and about["seconds"] > 0 and about["scored"] == 1
    assert "1 failed (1 unreadable)" in tiny.command("score-set", "l.csv", "--model", "qualivision", "--out", "o.csv", "--no-isolate")[1]


def test_a_decoder_that_starts_while_all_end_is_ended_too(monkeypatch):
    "Starting one takes seconds, outside of the lock: others go on, and what comes up too late does not stay behind."
    ended = []

    class Late:
        def __init__(self, call, limits):
            assert apart.lock.acquire(blocking=False), "nobody else gets a decoder meanwhile"
            apart.lock.release()
            apart.close()

        def end(self): ended.append(self)
    monkeypatch.setattr("qualivision.inference.apart._Decoder", Late)
    apart = Apart(len, Limits())
    with pytest.raises(RuntimeError, match="decoding has ended"): apart("a.mp4")
    assert len(ended) == 1 and not apart.busy
