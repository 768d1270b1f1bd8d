"A gate and the best of several clips: what has no score never passes, and is never first."
import csv
import json

import pytest
import tiny

from qualivision.commands import choose
from qualivision.commands.choose import BELOW, ranked, ranked_lines, verdict
from qualivision.quality import DIMENSIONS, ScoreRecord
from qualivision.toy import toy_clip

ABOUT = dict(model="m", checkpoint="c", trained_on="opinions")


def record(name, scores, prompt="a ball", **rest) -> ScoreRecord:
    reasons = {d: "no opinions" for d, s in zip(DIMENSIONS, scores) if s is None}
    return ScoreRecord.of(name, prompt, scores, reasons=reasons, **ABOUT, **rest)


GOOD = record("good.mp4", [4, 4, 4, 4, 4])
DULL = record("dull.mp4", [4, 4, 4, 2, 3])
HALF = record("half.mp4", [4, 4, None, 4, None])
GONE = ScoreRecord.failed("gone.mp4", "a ball", "gone.mp4: there is no such file", **ABOUT)


@pytest.mark.parametrize("r, least, passed, words", [
    (GOOD, {"temporal": 4, "overall": 4}, True, "pass"), (DULL, {"temporal": 2.01, "overall": 3}, False, "temporal 2.00 of 2.01"),
    (HALF, {"temporal": 4}, True, "pass"), (HALF, {"temporal": 1, "overall": 1}, None, "no overall score: no opinions"),
    (HALF, {"temporal": 5, "overall": 1}, None, "not judged"), (GONE, {"temporal": 1}, None, "there is no such file")])
def test_what_has_no_score_never_passes(r, least, passed, words):
    v = verdict(r, least)
    assert v["passed"] is passed and words in " ".join(choose.verdict_line(r.video, v).split())


@pytest.fixture
def room(tmp_path, monkeypatch):
    "Two clips, and the records that a scorer would have made of them, by name."
    monkeypatch.chdir(tmp_path)
    (tmp_path/"clips").mkdir()
    for name in ("good.mp4", "dull.mp4"): toy_clip(tmp_path/"clips"/name, (200, 30, 30))
    known = {r.video: r for r in (GOOD, DULL, HALF, GONE)}
    monkeypatch.setattr(choose, "scored", lambda found, *_: ((name, known[name]) for name, *_ in found))
    return tmp_path


def manifest(*names):
    with open("list.csv", "w", newline="") as f: csv.writer(f).writerows([("video", "Prompt"), *((n, "a ball") for n in names)])
    return "list.csv"


@pytest.mark.parametrize("names, status", [(["good.mp4"], 0), (["good.mp4", "dull.mp4"], BELOW), (["good.mp4", "half.mp4"], 1),
                                           (["dull.mp4", "gone.mp4"], 1)])
def test_a_gate_says_it_by_its_status(room, names, status):
    found, rows, _ = tiny.command("gate", manifest(*names), "--min-overall", 3.5, "--json")
    assert found == status and [r["video"] for r in rows] == names
    assert {r["passed"] for r in rows} == {0: {True}, BELOW: {True, False}}.get(status, {r["passed"] for r in rows} | {None})
    found, text, _ = tiny.command("gate", "list.csv", "--min-overall", 3.5)
    assert found == status and f"of {len(names)} pass" in text


@pytest.mark.parametrize("words, said", [
    ("gate clips --prompt ball", "give one or more"), ("gate clips --min-overall 3", "--prompt"),
    ("gate clips --prompt ball --min-overall 6", "--min-overall"),
    ("best list.csv --prompt ball", "prompts of its own"), ("best clips --prompt ball --by beauty", "beauty is none of")])
def test_wrong_uses(room, words, said):
    manifest("good.mp4")
    status, _, err = tiny.command(*words.split())
    assert status == 2 and said in err


def test_places_without_a_clip(room):
    (room/"none").mkdir()
    (room/"none"/"notes.txt").touch()
    for place in ("none", "nowhere.csv"):
        status, _, err = tiny.command("best", place, *(["--prompt", "ball"] if place == "none" else []))
        assert status == 1 and place in err and (place != "none" or "passed over: 1 .txt" in err)


def test_the_best_of_a_folder(room):
    status, found, _ = tiny.command("best", "clips", "--prompt", "a ball", "--json")
    [prompt], = [found["prompts"]]
    assert status == 0 and found["by"] == list(DIMENSIONS)
    assert [(c["video"], c["score"]) for c in prompt["clips"]] == [("good.mp4", 4), ("dull.mp4", 3.4)]
    _, text, _ = tiny.command("best", "clips", "--prompt", "a ball", "--by", "temporal")
    assert "  1  4.00  good.mp4\n  2  2.00  dull.mp4" in text and "By temporal." in text


def test_what_cannot_be_ranked_stands_below(room):
    status, found, _ = tiny.command("best", manifest("half.mp4", "gone.mp4", "dull.mp4"), "--by", "overall", "--json")
    [prompt], = [found["prompts"]]
    assert status == 1 and [c["video"] for c in prompt["clips"]] == ["dull.mp4"]
    assert {c["video"]: c["reason"] for c in prompt["not_ranked"]} == {"half.mp4": "no overall score: no opinions", "gone.mp4": GONE.error}
    status, text, _ = tiny.command("best", manifest("gone.mp4"))
    assert status == 1 and "no clip has a score" in " ".join(text.split())


def test_what_cannot_be_told_apart_is_marked():
    def one(name, score): return name, record(name, [score] * 5, interval={d: [score - .5, score + .5] for d in DIMENSIONS})
    found = ranked([one("c", 2.9), one("b", 3.9), one("a", 3.9), one("d", 3.0)], ["overall"])
    assert [(c["video"], c["told_apart"]) for c in found["clips"]] == [("a", False), ("b", False), ("d", False), ("c", False)]
    found = ranked([one("c", 2.8), one("a", 4.)], ["overall", "temporal"])
    assert [(c["video"], c["told_apart"], c["interval"]) for c in found["clips"]] == [("a", False, [3.5, 4.5]), ("c", True, [2.3, 3.3])]
    lines = list(ranked_lines("a ball", ranked([one("a", 4.), one("b", 3.5), one("c", 2.)], ["overall"])))
    assert lines == ["a ball", "  1  4.00 [3.5, 4.5]  a", "  2  3.50 [3.0, 4.0]  ≈ 1  b", "  3  2.00 [1.5, 2.5]  c"]
    assert ranked([one("a", 4.), ("half", GOOD)], ["overall"])["clips"][1]["told_apart"] is None, "no interval, nothing said"


def test_a_model_scores_them(tmp_path, monkeypatch):
    "The whole way, with a small checkpoint."
    monkeypatch.chdir(tmp_path)
    (tmp_path/"clips").mkdir()
    for name in ("a.mp4", "b.mp4"): toy_clip(tmp_path/"clips"/name, (200, 30, 30))
    (tmp_path/"clips"/"broken.mp4").write_bytes(b"no video")
    folder = tiny.checkpoint(tmp_path/"m")
    use = ("clips", "--prompt", "a ball", "--checkpoint", folder, "--device", "cpu")
    status, found, _ = tiny.command("best", *use, "--json")
    [prompt], = [found["prompts"]]
    assert status == 1 and sorted(c["video"] for c in prompt["clips"]) == ["a.mp4", "b.mp4"] and prompt["not_ranked"][0]["video"] == "broken.mp4"
    status, rows, _ = tiny.command("gate", *use, "--min-temporal", 1, "--json")
    assert status == 1 and {r["video"]: r["passed"] for r in rows} == {"a.mp4": True, "b.mp4": True, "broken.mp4": None}
    json.dumps(found, allow_nan=False)
