"qualivision ranks: reference sets from a user's own score files."
import errno
import json
import os

from typer.testing import CliRunner

from qualivision.cli import app
from qualivision.evaluation.ranks import read_sets


def call(*args):
    r = CliRunner().invoke(app, ["ranks", *map(str, args)])
    assert r.exception is None or isinstance(r.exception, SystemExit), r.exception
    return r.exit_code, json.loads(r.stdout) if "--json" in args and r.stdout else r.stdout, r.stderr


def test_build_and_list(tmp_path):
    (tmp_path/"a.csv").write_text("video,technical,aesthetic,error\na,1,2,\nb,2,4,\nc,,,gone\n")
    status, about, err = call("build", tmp_path/"a.csv", "--name", "mine", "--model", "dover-mobile", "--out", tmp_path/"sets.json", "--json")
    assert status == 0 and about["left_out"] == 1 and about["branches"]["technical"] == {"n": 2, "mean": 1.5, "std": 0.5} and "1 rows left out" in err
    first = (tmp_path/"sets.json").read_bytes()
    for name in ("other", "mine"): assert call("build", tmp_path/"a.csv", "--name", name, "--model", "cover", "--out", tmp_path/"sets.json")[0] == 0
    assert [(s.name, s.model) for s in read_sets(tmp_path/"sets.json")] == [("other", "cover"), ("mine", "cover")]        # one of each name
    assert call("build", tmp_path/"a.csv", "--name", "mine", "--model", "dover-mobile", "--out", tmp_path/"again.json")[0] == 0
    assert (tmp_path/"again.json").read_bytes() == first
    status, text, _ = call("list", tmp_path/"sets.json")
    assert status == 0 and "other (cover)" in text and "2 videos" in text
    status, sets, _ = call("list", "--json")
    assert status == 0 and [s["name"] for s in sets] == ["LIVE-VQC", "KoNViD-1k", "LSVQ_test", "LSVQ_1080p", "YouTube-UGC"]


def test_what_cannot_be_built(tmp_path):
    (tmp_path/"a.csv").write_text("video,technical\na,1\nb,1\n")
    (tmp_path/"sets.json").write_text("no sets")
    made = ("--name", "x", "--model", "dover", "--out", tmp_path/"sets.json", "--json")
    for file, said in {"a.csv": "two different scores", "gone.csv": "cannot be read", "gone.parquet": "cannot be read"}.items():
        status, about, _ = call("build", tmp_path/file, *made)
        assert status == 1 and said in about["error"]
    (tmp_path/"a.csv").write_text("video,technical\na,1\nb,2\n")
    status, about, _ = call("build", tmp_path/"a.csv", *made)
    assert status == 1 and "no file of reference sets" in about["error"] and (tmp_path/"sets.json").read_text() == "no sets"
    assert call("list", tmp_path/"sets.json", "--json")[0] == 1 and call("build")[0] == 2


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    "The file that was there stays, nothing is left beside it, and the error is the first one, not that of the cleaning up."
    (tmp_path/"a.csv").write_text("video,technical\na,1\nb,2\n")
    made = ("build", tmp_path/"a.csv", "--model", "dover", "--json", "--name")
    assert call(*made, "old", "--out", tmp_path/"sets.json")[0] == 0
    before = (tmp_path/"sets.json").read_bytes()
    (tmp_path/"file").touch()
    status, about, _ = call(*made, "new", "--out", tmp_path/"file"/"sets.json")
    assert status == 1 and "nothing can be written in" in about["error"]
    def full(self, data): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    status, about, _ = call(*made, "new", "--out", tmp_path/"sets.json")
    assert status == 1 and "sets.json: it cannot be written (No space left" in about["error"] and "Free some space" in about["error"]
    assert (tmp_path/"sets.json").read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"a.csv", "file", "sets.json"}
