"Intervals: how often they hold where clips share prompts, what the results show, and how they reach every form of a score."
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from qualivision.data.dataset import load_labels
from qualivision.evaluation.conformal import LEAST, calibrated, half_width, intervals_file, measured
from qualivision.inference.bulk import ENDS
from qualivision.inference.score import Helper, Scorer
from qualivision.pipeline import evaluate
from qualivision.quality import DIMENSIONS, MOS_COLUMNS
from qualivision.toy import toy_clip, toy_set


def drawn(prompts, seed, spread=(.4, .4, .4, .4, .8)):
    "Scores, opinions, prompts and generators of five clips a prompt; half of each error is the prompt's; generator E is harder to judge."
    rng = np.random.default_rng(seed)
    scores = rng.uniform(2, 4, (prompts * 5, 5))
    error = rng.standard_normal((prompts, 5)).repeat(5, 0) + rng.standard_normal(scores.shape)
    mos = (scores + error * np.tile(spread, prompts)[:, None] / 2 ** .5).clip(1, 5)
    return scores, mos, np.repeat([f"{seed} {k}" for k in range(prompts)], 5), np.tile(list("ABCDE"), prompts)


def test_nine_opinions_in_ten():
    "Over many calibrations with prompts in common, and over resplits of one pool; a generator that is harder to judge is named."
    held = []
    for seed in range(120):
        (a, b, *_), (c, d, *_) = drawn(20, 2 * seed), drawn(20, 2 * seed + 1)
        held.append((np.abs(c - d)[:, 0] <= half_width(np.abs(a - b)[:, 0])).mean())
    assert .88 < np.mean(held) < .92 and np.quantile(held, .05) < .85
    found = measured(drawn(48, 1), drawn(20, 2))
    for d in DIMENSIONS:
        assert .89 <= found[d]["resplits"]["mean"] <= .92 and found[d]["n"] == 240 and found[d]["width"] <= 2 * found[d]["half_width"] + 1e-4
        assert sum(g["n"] for g in found[d]["generators"].values()) == 240
        assert found[d]["generators"]["E"]["held"] < min(found[d]["generators"][g]["held"] for g in "ABCD")
    assert measured(drawn(48, 1), drawn(20, 2)) == found


def test_missing_opinions_count_dimension_by_dimension():
    scores, mos, groups, _ = drawn(20, 0)
    gaps = mos.copy()
    gaps[:, 2], gaps[LEAST - 1:, 3], gaps[50:, 4] = np.nan, np.nan, np.nan
    whole, some = (calibrated(scores, y, groups, "invented")["dimensions"] for y in (mos, gaps))
    assert [some[d] for d in DIMENSIONS[:2]] == [whole[d] for d in DIMENSIONS[:2]]
    assert some["overall"]["clips"] == 50 and some["overall"]["prompts"] == 10 and some["overall"] == calibrated(
        scores[:50], mos[:50], groups[:50], "invented")["dimensions"]["overall"]
    assert "no opinions" in some["aesthetic"]["reason"] and "8 rated clips are too few" in some["temporal"]["reason"]


@pytest.fixture
def room(tmp_path, monkeypatch):
    "Weights whose Temporal is not calibrated, and one clip."
    monkeypatch.chdir(tmp_path)
    tiny.checkpoint(tmp_path/"mine")
    about = {d: {"half_width": .5 + k, "clips": 100, "prompts": 20} for k, d in enumerate(DIMENSIONS)} | {"temporal": {"reason": "too few"}}
    record = {"level": .9, "source": "invented", "dimensions": about, "weights": json.loads((tmp_path/"mine"/"model.json").read_text())["sha256"]}
    intervals_file("mine").write_text(json.dumps(record))
    (tmp_path/"set"/"videos").mkdir(parents=True)
    toy_clip(tmp_path/"set"/"videos"/"a.mp4", (200, 30, 30))
    (tmp_path/"set"/"labels.csv").write_text("video,prompt\na.mp4,a red boat\n")
    return record


ONE = "score", "set/videos/a.mp4", "--prompt", "a red boat", "--checkpoint", "mine", "--device", "cpu"


def test_every_form_of_a_score_has_its_interval(room, monkeypatch):
    "JSON, text in wide and narrow windows, predict, score-set; weights of another training, or a damaged record."
    (r,) = tiny.command(*ONE, "--json")[1]
    for k, d in enumerate(DIMENSIONS):
        if d == "temporal": assert r["interval"][d] is None
        else: assert r["interval"][d] == pytest.approx([max(1, r[d] - .5 - k), min(5, r[d] + .5 + k)])
    assert r["reasons"] == {"interval": "temporal: too few"}
    shown = "{:5.2f} [{:.1f}, {:.1f}]".format(r["traditional"], *r["interval"]["traditional"])
    for columns, bar in ((80, True), (40, False)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = tiny.command(*ONE)[1].splitlines()
        assert lines[1].startswith(f"  traditional {shown}") and ("█" in lines[1]) == bar
        assert "[" not in lines[4] and max(map(len, lines)) <= columns
        assert "No interval: temporal: too few." in " ".join(lines) and "nine in ten" in " ".join(lines)

    rest = "--checkpoint", "mine", "--device", "cpu", "--json"
    about = tiny.command("predict", "--data", "set", "--out", "p.csv", *rest)[1]
    assert about["half_widths"] == {d: None if d == "temporal" else .5 + k for k, d in enumerate(DIMENSIONS)} and about["notes"] == []
    assert about["no_interval"] == "temporal: too few"
    text = " ".join(tiny.command("predict", "--data", "set", "--out", "p.csv", *rest[:-1])[1].split())
    assert "overall ± 4.50. No interval: temporal: too few." in text
    for again in range(2):
        count = tiny.command("score-set", "set/labels.csv", "--model", "qualivision", "--out", "s.csv", *rest)[1]
        with open("s.csv", newline="") as f: row, = csv.DictReader(f)
        ends = iter(ENDS)
        for d, low, high in zip(DIMENSIONS, ends, ends):
            assert [row[low], row[high]] == (["", ""] if d == "temporal" else [f"{x:.6f}" for x in r["interval"][d]])
        assert row["reasons"] == "interval: temporal: too few" and count["kept"] == again

    intervals_file("mine").write_text(json.dumps(room | {"weights": "of another training"}))
    (r,) = tiny.command(*ONE, "--json")[1]
    assert set(r["interval"].values()) == {None} and "other weights" in r["reasons"]["interval"]
    intervals_file("mine").write_text(json.dumps(room | {"dimensions": room["dimensions"] | {"traditional": {"half_width": .25}}}))
    assert tiny.command("score-set", "set/labels.csv", "--model", "qualivision", "--out", "s.csv", *rest)[1]["kept"] == 1
    with open("s.csv", newline="") as f: row, = csv.DictReader(f)
    assert float(row[ENDS[1]]) - float(row[ENDS[0]]) == pytest.approx(.5, abs=1e-5)              # of the record that lies there now
    intervals_file("mine").write_text("{")
    status, _, err = tiny.command(*ONE)
    assert status == 1 and "mine.intervals.json: this is not JSON" in " ".join(err.split())


def test_another_scorers_number_is_not_inside_the_models_interval(room, monkeypatch):
    "In a record, and where `predict` says half widths."
    seen = Helper({"overall": {"data": "invented"}}, "a helper", "1", Scorer.from_checkpoint("mine", "cpu").sampling, id, lambda *_: {"overall": 2.})
    monkeypatch.setattr(Scorer, "helpers_for", lambda *a: (seen,))
    why = "temporal: too few; overall: a helper's score was not calibrated"
    r = Scorer.from_checkpoint("mine", "cpu").score("set/videos/a.mp4", "a red boat")
    assert r.overall == 2 and r.interval["overall"] is None and r.interval["aesthetic"] and r.reasons == {"interval": why}
    about = tiny.command("predict", "--data", "set", "--out", "p.csv", "--checkpoint", "mine", "--device", "cpu", "--json")[1]
    assert about["half_widths"]["overall"] is None and about["half_widths"]["aesthetic"] == 2.5 and about["no_interval"] == why


def test_a_stills_reasons_are_not_those_of_all(room):
    toy_clip("still.mp4", (9, 99, 200), frames=1)
    shown = " ".join(tiny.command("score", "still.mp4", *ONE[1:])[1].split())
    assert "the video has one frame" in shown and "No interval: temporal: too few." in shown


def test_clips_are_scored_once_where_validation_is_judged(room, monkeypatch):
    "The scores that stand in predictions.csv are those of the record."
    toy_set("data", val=6, test=1, rated=("train", "val"))
    tiny.checkpoint("checkpoints/dover")
    data = {"root": "data", "seed": 0, "val_fraction": .1, "test_fraction": .1}
    Path("params.yaml").write_text(json.dumps({"profile": "embedded", "data": data, "embedded": {"evaluate": {"device": "cpu"}}}))
    asked = []
    monkeypatch.setattr(evaluate, "model_scores", lambda where, clips, device: asked.append(1) or np.full((len(clips), 5), 2.5))
    assert evaluate.main("dover")["split"] == "val" and len(asked) == 1
    record = json.loads(intervals_file("checkpoints/dover").read_text())
    val = load_labels("data", "val")
    assert record["dimensions"] == calibrated(np.full((12, 5), 2.5), val[list(MOS_COLUMNS)].to_numpy(float), val["Prompt"], "")["dimensions"]


def test_weights_without_a_record_say_so(room):
    "As all did before there were records."
    intervals_file("mine").unlink()
    (r,) = tiny.command(*ONE, "--json")[1]
    assert set(r["interval"].values()) == {None} and "not calibrated" in r["reasons"]["interval"] and r["overall"] is not None
    assert "No interval: these weights were not calibrated" in " ".join(tiny.command(*ONE)[1].split())


def test_ratings_too_few_to_put_any_aside():
    "The record of heads in closed form comes from clips of whose prompt and generator they saw nothing: what they know by heart does not count."
    from qualivision.experiments.real import held_out_errors
    rng, (prompts, generators) = np.random.default_rng(0), np.divmod(np.arange(24), 2)
    mos = np.full((24, 5), np.nan)
    mos[:, 0], mos[:8, 3] = rng.uniform(1, 5, 24), 2
    record, tried = held_out_errors(lambda rows: np.where(rows[:, None], mos, 3.), mos, prompts, generators)
    due = half_width(np.abs(mos[:, 0] - 3))
    assert record["dimensions"]["traditional"] == dict(half_width=pytest.approx(due, abs=1e-6), clips=24, prompts=12) and 0 < due < 2
    assert set(tried) == {"traditional", "temporal"} and .8 < tried["traditional"]["held"] <= 1 and tried["temporal"]["held"] is None
    assert "8 rated clips" in record["dimensions"]["temporal"]["reason"] and "no opinions" in record["dimensions"]["overall"]["reason"]
