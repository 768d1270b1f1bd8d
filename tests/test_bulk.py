"Collections in trouble: damaged journals, two processes, results that would eat their manifest, names and forms from elsewhere."
import csv
import errno
import io
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from forked import Forked
from test_tools import Length

from qualivision.evaluation.ranks import RankError, build_set
from qualivision.official.fused import SET_SCRIPT, fused_score
from qualivision.official.scorer import OfficialScorer
from qualivision.files import FileError, read_table
from qualivision.data.collection import BulkError, find_videos, read_manifest
from qualivision.inference.bulk import score_set
from qualivision.quality import QualiVisionError

ROOT = Path(__file__).parents[1]


def folder(tmp_path, n=8) -> Path:
    (tmp_path/"set").mkdir()
    for k in range(n): (tmp_path/"set"/f"{k:02}.mp4").write_text("x" * (k + 1))
    return tmp_path/"set"


def names(path) -> list[str]:
    with open(path, newline="") as f: return [r["video"] for r in csv.DictReader(f)]


def start(cwd, pause: float) -> Forked:
    "score_set in a process of its own, slowly."
    return Forked(lambda: score_set("set", "out.csv", Length(pause)), cwd=cwd)


def until(process, out: Path, lines: int):
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < lines): time.sleep(.02)


def test_every_piece_of_a_killed_run_can_be_lost(tmp_path):
    "Killed, then journal or log cut off somewhere: the rerun ends with the bytes of an undisturbed run, or says which file to remove."
    videos, out = folder(tmp_path, 12), tmp_path/"out.csv"
    process = start(tmp_path, .1)
    try: until(process, out, 7)
    finally: process.send_signal(signal.SIGKILL); process.wait()
    left = {p.name: p.read_bytes() for p in tmp_path.glob("out.csv*")}
    assert process.returncode == -signal.SIGKILL and set(left) == {"out.csv", "out.csv.journal", "out.csv.journal-wal", "out.csv.journal-owner"}
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
    "The second is refused at once, with the number of the first, and touches nothing; the first ends as if alone."
    videos, out = folder(tmp_path), tmp_path/"out.csv"
    process = start(tmp_path, .4)
    until(process, out, 3)
    second = Length()
    with pytest.raises(BulkError, match=f"another process writes this result: {process.pid} on .*, since"): score_set(videos, out, second)
    assert not second.done and process.wait(60) == 0, process.communicate()[1]
    score_set(videos, tmp_path/"alone.csv", Length())
    assert out.read_bytes() == (tmp_path/"alone.csv").read_bytes() and len(set(names(out))) == 8


def killed_at_random(tmp_path, times: int, seed=0):
    "SIGKILL at random moments, and started again each time. What is to be seen meanwhile is whole rows, never fewer; in the end all, once."
    videos, out, chance = folder(tmp_path, 15 * times), tmp_path/"out.csv", random.Random(seed)
    score_set(videos, tmp_path/"whole.csv", Length())
    whole, seen = (tmp_path/"whole.csv").read_bytes(), 0
    for _ in range(times):
        process = start(tmp_path, .03)
        time.sleep(chance.uniform(0, .4))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        found = out.read_bytes() if out.exists() else b""
        assert whole.startswith(found) and found[-1:] in (b"", b"\n") and len(found) >= seen
        seen = len(found)
    score_set(videos, out, Length())
    assert out.read_bytes() == whole and len(set(names(out))) == 15 * times


def test_no_row_twice_however_often_it_is_killed(tmp_path):
    "Each video has one row, in order, and the bytes of an undisturbed run."
    killed_at_random(tmp_path, 3)


@pytest.mark.slow
def test_twenty_kills(tmp_path): killed_at_random(tmp_path, 20)


def full(*a, **k): raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place,name", [("os.replace", "out.csv"), ("os.replace", "out.parquet"), ("os.fsync", "out.parquet"),
                                        ("pyarrow.parquet.ParquetWriter.write_table", "out.parquet"), ("write", "out.csv")])
def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch, place, name):
    "Wherever the disk refuses: one typed error, the bytes of before or more rows, no half row; with room the same command goes on."
    videos, out = folder(tmp_path, 4), tmp_path/name
    score_set(videos, out, Length())
    before = out.read_bytes()
    (videos/"09.mp4").write_text("new")
    class Full(io.BufferedWriter):
        def write(self, data): return super().write(data) if b"09.mp4" not in data else (super().write(data[:5]), self.flush(), full())
    def opened(f, mode="r", *a, real=open, **k): return Full(io.FileIO(f, mode)) if mode in ("wb", "ab") else real(f, mode, *a, **k)
    monkeypatch.setattr(*(("builtins.open", opened) if place == "write" else (place, full)))
    with pytest.raises(QualiVisionError, match=f"{name}: .*No space left"): score_set(videos, out, Length())
    monkeypatch.undo()
    assert out.read_bytes() == before and not [p for end in ("new", "tmp*", "*-owner") for p in tmp_path.glob(f"*.{end}")]
    assert score_set(videos, out, Length())["failed"] == 0 and read_table(out).video.tolist() == ["00.mp4", "01.mp4", "02.mp4", "03.mp4", "09.mp4"]


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
    told = {"empty": "no video in it", "gone": "cannot be read", "v.mp4": "a video or a picture", "v.csv": "not text in UTF-8",
            "bad.csv": "no column"}
    for source, said in told.items():
        with pytest.raises(QualiVisionError, match=said) as e: score_set(tmp_path/source, tmp_path/"o.csv", Length())
        assert str(e.value).isprintable()
    with pytest.raises(BulkError, match="no video in it"): score_set(tmp_path/"list.txt", tmp_path/"o.csv", Length(), patterns=["*.mov"])
    assert not list(tmp_path.glob("o.csv*"))
    with pytest.raises(BulkError, match="a video or a picture"): list(read_manifest(tmp_path/"v.JPG"))


def test_tables_are_read_strictly(tmp_path):
    "A prompt in another encoding is refused with its line and the remedy, whatever the table; with the encoding it is read as it was meant."
    folder(tmp_path, 3)
    rows = [("00.mp4", "a café at night"), ("NA", "一只红色的船"), ("null", "None")]
    text = "video,Prompt\n" + "".join(f"set/{n},{p}\n" for n, p in rows)
    for name in ("NA", "null"): (tmp_path/"set"/name).write_text("x")
    manifest = tmp_path/"m.csv"
    manifest.write_bytes(text.encode("gb18030"))
    with pytest.raises(FileError, match="m.csv line 2: it is not text in UTF-8 .*--encoding"):
        score_set(manifest, tmp_path/"o.csv", Length())
    assert not list(tmp_path.glob("o.csv*"))
    for code, say in (("gb18030", "gb18030"), ("utf-16", None), ("utf-8-sig", None), ("utf-8", "utf8")):
        manifest.write_bytes(text.encode(code))
        assert [(Path(n).name, p) for n, _, p in read_manifest(manifest, True, say)] == rows
        assert score_set(manifest, tmp_path/"o.csv", Length(), encoding=say)["failed"] == 0
        assert names(tmp_path/"o.csv") == [f"set/{n}" for n, _ in rows]
    manifest.write_text("Video,Prompt,video\na,b,c\n")
    with pytest.raises(FileError, match="'Video' is there twice"): list(read_manifest(manifest))


def test_names_that_are_no_utf8_are_found(tmp_path):
    "In a .txt and in a column of names, between others that are."
    folder(tmp_path, 1)
    shutil.copy(tmp_path/"set"/"00.mp4", os.fsencode(tmp_path/"set") + b"/caf\xe9.mp4")
    (tmp_path/"l.txt").write_bytes("set/caf".encode() + b"\xe9.mp4\r\nset/00.mp4\n")
    (tmp_path/"l.csv").write_bytes("note,video\nplain,set/caf".encode() + b"\xe9.mp4\n\"a, b\",set/00.mp4\n")
    for name in ("l.txt", "l.csv"):
        assert score_set(tmp_path/name, tmp_path/"o.csv", Length())["failed"] == 0
        assert names(tmp_path/"o.csv") == [r"set/caf\xe9.mp4", "set/00.mp4"]
        (tmp_path/"o.csv.journal").unlink()


def test_an_address_is_told_to_be_one(tmp_path):
    folder(tmp_path, 1)
    for name, text in (("l.txt", "https://x.org/00.mp4\nset/00.mp4\n"), ("l.csv", "video\ns3://b/00.mp4\nset/00.mp4\n")):
        (tmp_path/name).write_text(text)
        said = []
        about = score_set(tmp_path/name, tmp_path/"o.csv", Length(), report=said.append)
        assert (about["failed"], about["scored"] + about["kept"]) == (1, 1)
        assert "00.mp4: it is an address, not a file" in said[0] and str(tmp_path) not in said[0]


def test_two_rows_never_share_a_film(tmp_path):
    "By a name that was found elsewhere, or by writing it in another way; one film with two prompts is two rows."
    (tmp_path/"videos"/"cam2").mkdir(parents=True)
    for name in ("x.mp4", "cam2/y.mp4"): (tmp_path/"videos"/name).write_text("x")
    for first, second in (("x.mp4", "videos/x.mp4"), ("x.mp4", "./x.mp4"), ("cam2/y.mp4", "videos/cam2/../cam2/y.mp4"), ("x.mp4", "x.mp4")):
        (tmp_path/"l.csv").write_text(f"video,Prompt\n{first},a\n\ngone.mp4,a\n{second},a\n")
        with pytest.raises(BulkError, match=f"l.csv line 5: '{second}' is the film of '{first}' in line 2"):
            score_set(tmp_path/"l.csv", tmp_path/"o.csv", Length())
        assert not (tmp_path/"o.csv").exists()
    (tmp_path/"l.csv").write_text("video,Prompt\nx.mp4,a boat\nx.mp4,a cat\ncam3/y.mp4,a\n")
    about = score_set(tmp_path/"l.csv", tmp_path/"o.csv", Length())
    assert about["scored"] == 2 and about["failed"] == 1, "cam3/y.mp4 is not cam2/y.mp4"


# ---------------------------------------------------------------- folders

CODECS = {".mp4": "h264", ".mov": "h264", ".m4v": "h264", ".f4v": "h264", ".3gp": "h264", ".3g2": "h264", ".mkv": "h264", ".webm": "libvpx-vp9",
          ".avi": "mpeg4", ".mpg": "mpeg2video", ".m2v": "mpeg2video", ".m1v": "mpeg1video", ".vob": "mpeg2video", ".ts": "h264", ".flv": "flv",
          ".wmv": "wmv2", ".asf": "wmv2", ".mxf": "mpeg2video", ".nut": "mpeg4", ".h264": "h264", ".hevc": "hevc", ".ivf": "libvpx-vp9",
          ".y4m": "rawvideo", ".gif": "gif", ".apng": "apng"}


def encode(path: Path, codec: str, frames: int = 4):
    import av
    pixels = {"gif": "rgb8", "apng": "rgb24"}.get(codec, "yuv420p")
    with av.open(str(path), "w", format={"m1v": "mpeg1video", "m2v": "mpeg2video"}.get(path.suffix[1:])) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 352, 288, pixels
        for k in range(frames):
            picture = np.full((288, 352, 3), 40 + 40 * k, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture).reformat(format=pixels)))
        out.mux(stream.encode())


@pytest.mark.parametrize("ending", CODECS)
def test_what_the_reader_reads_is_found(tmp_path, ending):
    from qualivision.data.video import read_frames
    encode(tmp_path/f"a{ending}", CODECS[ending])
    found = [name for name, _, _ in find_videos(tmp_path)]
    assert found == [f"a{ending}"] and len(read_frames(tmp_path/found[0], range)) == 4


def test_links_are_followed_and_what_is_passed_over_is_counted(tmp_path):
    "Folders elsewhere, circles, a folder under two names; each film once, by its real name where it has one; the result itself is not counted."
    (tmp_path/"far"/"deep").mkdir(parents=True), (tmp_path/"set"/"zoo").mkdir(parents=True)
    for name in ("far/a.mp4", "far/deep/b.VOB", "set/zoo/c.mp4", "set/notes.txt", "set/README", "set/.hidden.mp4", "set/zoo/d.Txt"):
        (tmp_path/name).write_text("x")
    links = {"linked": "../far", "again": "../far", "circle": ".", "animals": "zoo", "film.mp4": "zoo/c.mp4", "lost.mp4": "gone.mp4"}
    for link, target in links.items():
        (tmp_path/"set"/link).symlink_to(target)
    for _ in range(2):
        about = score_set(tmp_path/"set", tmp_path/"set"/"scores.csv", Length())
        assert names(tmp_path/"set"/"scores.csv") == ["again/a.mp4", "again/deep/b.VOB", "film.mp4", "lost.mp4", "zoo/c.mp4"] and about["failed"] == 1
        assert about["passed_over"] == {".txt": 2, "no ending": 1, "hidden": 1, "folder linked once more": 3}
    about = score_set(tmp_path/"set", tmp_path/"o.csv", Length(), patterns=["*.vob"])
    assert about["videos"] == 1 and about["passed_over"]["not of the pattern"] >= 6
    shutil.rmtree(tmp_path/"far"), (tmp_path/"set"/"scores.csv").unlink()
    for p in tmp_path.glob("set/**/*.mp4"): p.unlink()
    with pytest.raises(BulkError, match="no video in it .passed over: .*2 .txt"): score_set(tmp_path/"set", tmp_path/"p.csv", Length())


# ---------------------------------------------------------------- reference sets from results

class Both(Length):
    name, columns = "dover", ("technical", "aesthetic", "fused")
    form, pictures, tables = "official", False, OfficialScorer.tables
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
    made, lost = build_set(tmp_path/name, "mine", "dover", scripts=(SET_SCRIPT,))
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
    with pytest.raises(BulkError, match="no such scores with these settings"): score_set(tmp_path/"set", tmp_path/"p.csv", other, form="dover")


def test_half_a_row_is_no_failed_video(tmp_path):
    for text in ("path, aesthetic score, technical score\na, 1, 2\nb, 2, 3\nc, 1, \n", "video,technical,error\na,1,\nb,2,\nc,,\n"):
        (tmp_path/"s.csv").write_text(text)
        with pytest.raises(RankError, match="1 scores in technical are no numbers"): build_set(tmp_path/"s.csv", "mine", "dover")
    (tmp_path/"s.csv").write_text("")
    with pytest.raises(FileError, match="empty"): build_set(tmp_path/"s.csv", "mine", "dover")
    pd.DataFrame({"video": ["a", "b"], "technical": [1., None], "error": [None, "gone"]}).to_parquet(tmp_path/"s.parquet")
    with pytest.raises(RankError, match="two different scores"): build_set(tmp_path/"s.parquet", "mine", "dover")
