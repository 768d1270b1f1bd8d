"Collections in trouble: damaged journals, two processes, results that would eat their manifest, names and forms from elsewhere."
import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from test_tools import Length

from qualivision.evaluation.ranks import RankError, build_set, fused_score
from qualivision.files import FileError
from qualivision.inference.bulk import BulkError, read_manifest, score_set

ROOT = Path(__file__).parents[1]


def folder(tmp_path, n=8) -> Path:
    (tmp_path/"set").mkdir()
    for k in range(n): (tmp_path/"set"/f"{k:02}.mp4").write_text("x" * (k + 1))
    return tmp_path/"set"


def names(path) -> list[str]:
    with open(path, newline="") as f: return [r["video"] for r in csv.DictReader(f)]


def start(cwd, pause: float) -> subprocess.Popen:
    "score_set in a process of its own, slowly."
    code = f"from test_tools import Length, score_set; score_set('set', 'out.csv', Length({pause}))"
    path = os.pathsep.join([str(ROOT), str(ROOT/"tests")])
    return subprocess.Popen([sys.executable, "-c", code], cwd=cwd, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE)


def until(process, out: Path, lines: int):
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < lines): time.sleep(.02)


def test_every_piece_of_a_killed_run_can_be_lost(tmp_path):
    "Killed, then journal or log cut off somewhere: the rerun ends with the bytes of an undisturbed run, or says which file to remove."
    videos, out = folder(tmp_path, 12), tmp_path/"out.csv"
    process = start(tmp_path, .1)
    try: until(process, out, 7)
    finally: process.send_signal(signal.SIGKILL); process.wait()
    left = {p.name: p.read_bytes() for p in tmp_path.glob("out.csv*")}
    assert process.returncode == -signal.SIGKILL and set(left) == {"out.csv", "out.csv.journal", "out.csv.journal-wal"}
    score_set(videos, tmp_path/"whole.csv", Length())
    whole, kept, refused = (tmp_path/"whole.csv").read_bytes(), [], 0
    for name in ("out.csv", "out.csv.journal", "out.csv.journal-wal"):
        for share in (0, .1, .35, .6, .85, .99):
            for p in tmp_path.glob("out.csv*"): p.unlink()
            for n, content in left.items(): (tmp_path/n).write_bytes(content[:int(share * len(content))] if n == name else content)
            try: kept.append(score_set(videos, out, Length())["kept"])
            except BulkError as e:
                assert "out.csv.journal" in str(e) and "Remove it" in str(e)
                refused += 1
                for p in tmp_path.glob("out.csv.journal*"): p.unlink()
                score_set(videos, out, Length())
            assert out.read_bytes() == whole, (name, share)
    assert max(kept) >= 5 and min(kept) < 5, "whole journals keep rows; cut ones lose some"


def test_a_finished_journal_that_is_cut_off(tmp_path):
    "A journal without a log, of several pages: never other bytes, and what cannot be read is named with its remedy."
    videos, out = folder(tmp_path, 200), tmp_path/"out.csv"
    score_set(videos, out, Length())
    journal, whole, said = (tmp_path/"out.csv.journal").read_bytes(), out.read_bytes(), []
    for share in (.05, .2, .4, .6, .8, .97):
        (tmp_path/"out.csv.journal").write_bytes(journal[:int(share * len(journal))])
        try: score_set(videos, out, Length())
        except BulkError as e: said.append(str(e))
        else: assert out.read_bytes() == whole
        for p in tmp_path.glob("out.csv.journal?*"): p.unlink()
    assert said and all("out.csv.journal" in s and "Remove it" in s for s in said) and not any("Make room" in s for s in said)
    (tmp_path/"out.csv.journal").unlink()
    score_set(videos, out, Length())
    assert out.read_bytes() == whole


def test_a_full_disk_is_not_a_damaged_journal(tmp_path, monkeypatch):
    "What the disk refuses is told as such; with room, the same command goes on."
    videos, out = folder(tmp_path, 8), tmp_path/"out.csv"
    from qualivision.inference import bulk
    real = bulk._open_journal
    def small(file):
        db = real(file)
        db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
        return db
    monkeypatch.setattr(bulk, "_open_journal", small)
    class Wordy(Length):
        def rate(self, path, prompt): return {"overall": 1., "note": "x" * 5000}
    with pytest.raises(BulkError, match="full.*Make room"): score_set(videos, out, Wordy())
    monkeypatch.undo()
    assert score_set(videos, out, Length())["videos"] == 8 and names(out) == [f"{k:02}.mp4" for k in range(8)]


def test_two_processes_on_one_result(tmp_path):
    "The second is refused at once and touches nothing; the first ends as if alone."
    videos, out = folder(tmp_path), tmp_path/"out.csv"
    process = start(tmp_path, .4)
    until(process, out, 3)
    second = Length()
    with pytest.raises(BulkError, match="another process"): score_set(videos, out, second)
    assert not second.done and process.wait(60) == 0, process.stderr.read().decode()
    score_set(videos, tmp_path/"alone.csv", Length())
    assert out.read_bytes() == (tmp_path/"alone.csv").read_bytes() and len(set(names(out))) == 8


def test_no_row_twice_however_often_it_is_killed(tmp_path):
    "SIGKILL again and again, at other places: each video has one row, in order, and the bytes of an undisturbed run."
    videos, out = folder(tmp_path, 9), tmp_path/"out.csv"
    for lines in (2, 4, 6, 8):
        process = start(tmp_path, .1)
        try: until(process, out, lines)
        finally: process.send_signal(signal.SIGKILL); process.wait()
    score_set(videos, out, Length())
    score_set(videos, tmp_path/"whole.csv", Length())
    assert out.read_bytes() == (tmp_path/"whole.csv").read_bytes() and names(out) == [f"{k:02}.mp4" for k in range(9)]


# ---------------------------------------------------------------- what is asked of it

def test_a_manifest_is_never_overwritten(tmp_path):
    folder(tmp_path)
    manifest = tmp_path/"list.csv"
    manifest.write_text("video,Prompt\nset/00.mp4,a cat\n")
    (tmp_path/"link.csv").symlink_to(manifest)
    for out in (manifest, tmp_path/"set"/".."/"list.csv", tmp_path/"link.csv"):
        with pytest.raises(BulkError, match="manifest itself"): score_set(manifest, out, Length())
    assert manifest.read_text() == "video,Prompt\nset/00.mp4,a cat\n" and not list(tmp_path.glob("*.journal"))


def test_a_pattern_chooses_from_a_manifest(tmp_path):
    folder(tmp_path)
    (tmp_path/"list.txt").write_text("set/00.mp4\nset/01.mp4\nset/02.mp4\n")
    (tmp_path/"list.csv").write_text("video\nset/00.mp4\nset/01.mp4\nset/02.mp4\n")
    for name in ("list.txt", "list.csv"):
        assert score_set(tmp_path/name, tmp_path/"o.csv", Length(), patterns=["0[02].MP4"])["videos"] == 2
        assert names(tmp_path/"o.csv") == ["set/00.mp4", "set/02.mp4"]


def test_what_is_refused_leaves_nothing_behind(tmp_path):
    (tmp_path/"empty").mkdir()
    (tmp_path/"v.mp4").write_bytes(b"ftyp\0\0isom")
    (tmp_path/"v.csv").write_bytes(b"\0\0\0\x18ftypmp42\0\0\n\0\0\0")
    (tmp_path/"bad.csv").write_text("clip\na.mp4\n")
    (tmp_path/"list.txt").write_text("a.mp4\n")
    told = {"empty": "no video in it", "gone": "cannot be read", "v.mp4": "a video or a picture", "v.csv": "no text", "bad.csv": "no column"}
    for source, said in told.items():
        with pytest.raises(BulkError, match=said) as e: score_set(tmp_path/source, tmp_path/"o.csv", Length())
        assert str(e.value).isprintable()
    with pytest.raises(BulkError, match="no video in it"): score_set(tmp_path/"list.txt", tmp_path/"o.csv", Length(), patterns=["*.mov"])
    assert not list(tmp_path.glob("o.csv*"))
    with pytest.raises(BulkError, match="a video or a picture"): list(read_manifest(tmp_path/"v.JPG"))


# ---------------------------------------------------------------- reference sets from results

class Both(Length):
    name, columns = "dover", ("technical", "aesthetic", "fused")
    def rate(self, path, prompt):
        n = path.stat().st_size / 50
        return dict(technical=-n, aesthetic=n, fused=fused_score(-n, n))
    def prepare(self, path):
        if Path(path).name.startswith("03"): raise BulkError(path, "it is damaged", "Copy it again.")
        return Path(path)


@pytest.mark.parametrize("form,name", [("own", "o.csv"), ("dover", "o.csv"), ("own", "o.parquet"), ("dover", "o.PARQUET")])
def test_ranks_from_every_form_of_a_result(tmp_path, form, name):
    "With a video that failed and a name that is no UTF-8: both are in the file, and the set is built from the others."
    videos = folder(tmp_path)
    shutil.copy(videos/"01.mp4", os.fsencode(videos) + b"/\xff.mp4")
    score_set(videos, tmp_path/name, Both(), form=form)
    made, lost = build_set(tmp_path/name, "mine", "dover")
    assert lost == 1 and list(made.branches) == ["technical", "aesthetic", "fused"]
    raw = sorted(-(k + 1) / 50 for k in (0, 1, 1, 2, 4, 5, 6, 7))
    assert made.branches["technical"].quantiles == pytest.approx(raw, abs=2e-6), "raw scores, whatever the form"


def test_the_official_form_has_official_numbers(tmp_path):
    "Percentages with the exchanged constants, as the official script for sets writes them; corrected ones have no such form."
    score_set(folder(tmp_path), tmp_path/"o.csv", Both(), form="dover")
    rows = [[float(c) if k else c for k, c in enumerate(r)] for r in csv.reader(open(tmp_path/"o.csv"), skipinitialspace=True) if r[1][:1].isdigit()]
    for name, aesthetic, technical, fused in rows:
        n = (int(name[:2]) + 1) / 50
        assert aesthetic == pytest.approx(100 / (1 + math.exp(-(n + .08285) / .03774)), abs=1e-5)
        assert technical == pytest.approx(100 / (1 + math.exp(-(-n - .1107) / .07355)), abs=1e-5)
        assert fused == pytest.approx(100 * fused_score(-n, n), abs=1e-5)
    other = Both()
    other.form = "corrected"
    with pytest.raises(BulkError, match="official constants"): score_set(tmp_path/"set", tmp_path/"p.csv", other, form="dover")


def test_half_a_row_is_no_failed_video(tmp_path):
    for text in ("path, aesthetic score, technical score\na, 1, 2\nb, 2, 3\nc, 1, \n", "video,technical,error\na,1,\nb,2,\nc,,\n"):
        (tmp_path/"s.csv").write_text(text)
        with pytest.raises(RankError, match="1 scores in technical are no numbers"): build_set(tmp_path/"s.csv", "mine", "dover")
    (tmp_path/"s.csv").write_text("")
    with pytest.raises(FileError, match="empty"): build_set(tmp_path/"s.csv", "mine", "dover")
    pd.DataFrame({"video": ["a", "b"], "technical": [1., None], "error": [None, "gone"]}).to_parquet(tmp_path/"s.parquet")
    with pytest.raises(RankError, match="two different scores"): build_set(tmp_path/"s.parquet", "mine", "dover")
