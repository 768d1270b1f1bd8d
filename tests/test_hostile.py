"Files that do harm, names that do harm, disks that are full: one row each, and the others are scored."
import os
import time
from pathlib import Path

import psutil
import pytest
from victims import Victim, decode

from qualivision import devices
from qualivision.data.apart import Apart
from qualivision.data.container import Limits
from qualivision.files import read_table
from qualivision.inference.bulk import score_set

pytestmark = pytest.mark.usefixtures("one_thread")
CHEAP = Limits(time=1, memory=.25)


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
    for name, words in {"hang": "longer than 1 s", "segv": "died (SIGSEGV)", "eat": "more than 0.25 GB", "odd": "ZeroDivisionError"}.items():
        assert words in table.error[f"{name}.mp4"] and f"{name}.mp4" in table.error[f"{name}.mp4"]
    assert "Traceback" in "".join(said) and 'raise ZeroDivisionError("odd")' in "".join(said)
    assert [float(x) for x in table.overall[["good.mp4", "last.mp4"]]] == [4, 4] and not decoders()
    for p in (tmp_path/"set").glob("*d.mp4"): p.unlink()
    about = score_set(tmp_path/"set", tmp_path/"o.csv", Victim(), limits=CHEAP, fail_fast=True)
    assert about["failed"] == 1 and about["scored"] == 0, "it stops at the first failure"


def test_ctrl_c_does_not_wait_for_a_decoder_that_hangs(monkeypatch):
    there = Apart(decode, Limits())
    def stopped(jobs): raise KeyboardInterrupt
    monkeypatch.setitem(devices.BATCH, "cpu", 1)
    rows = devices.flow(map(devices.Job, ["a.mp4", "hang.mp4"]), lambda job: there(job.item), stopped, workers=2, stop=there.close)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt): list(rows)
    assert time.monotonic() - began < 9 and not decoders()
