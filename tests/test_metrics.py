"Metrics against scipy on generated data, intervals against brute force, and every way a table can be wrong."
import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from scipy.optimize import curve_fit

from qualivision.evaluation.metrics import (
    EVALUATED, METRICS, MetricError, bootstrap, evaluate_files, evaluate_frames, fit_logistic, format_metrics, krcc, logistic, mae,
    paired_bootstrap, plcc, plcc_logistic, rmse, srocc)
from qualivision.data.opinions import LabelError
from qualivision.files import FileError
from qualivision.quality import DIMENSIONS, MOS_COLUMNS


def tables(n_prompts=20, seed=0):
    rng = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(n_prompts), 5)
    names = [f"{'ABCDE'[i % 5]}_{p:03d}.mp4" for i, p in enumerate(prompts)]
    labels = pd.DataFrame({"video_name": names, "Prompt": [f"prompt {p}" for p in prompts]})
    predictions = labels[["video_name"]].copy()
    for c in MOS_COLUMNS:
        true = 3 + .5 * rng.normal(size=n_prompts)[prompts] + .6 * rng.normal(size=len(prompts))
        labels[c] = np.clip(np.round((true + .3 * rng.normal(size=len(prompts))) * 3) / 3, 1, 5)
        predictions[c] = true + .4 * rng.normal(size=len(prompts))
    return predictions.sample(frac=1, random_state=seed), labels


@pytest.mark.parametrize("seed", range(4))
def test_scipy_agrees(seed):
    rng = np.random.default_rng(seed)
    t = np.round(rng.normal(size=80) * 3) / 3
    p = np.round(t + rng.normal(size=80), 1)
    assert srocc(p, t) == pytest.approx(scipy.stats.spearmanr(p, t).statistic, abs=1e-12)
    assert plcc(p, t) == pytest.approx(np.corrcoef(p, t)[0, 1], abs=1e-12)
    assert krcc(p, t) == pytest.approx(scipy.stats.kendalltau(p, t).statistic, abs=1e-12)
    assert rmse(p, t) == pytest.approx(np.sqrt(((p - t) ** 2).mean())) and mae(p, t) == pytest.approx(abs(p - t).mean())
    assert METRICS["challenge"][0](p, t) == pytest.approx((srocc(p, t) + plcc(p, t)) / 2)


@pytest.mark.parametrize("bad", [([1, 1, 1, 1, 1], "constant"), ([1, 2, 3, np.nan, 5], "NaN"),
                                 ([1, 2, 3, np.inf, 5], "infinite"), ([1, 2, 3, 4], "one length")])
@pytest.mark.parametrize("metric", [m for m in METRICS if m not in ("rmse", "mae")])
def test_no_number_is_made_up(metric, bad):
    values, word = bad
    good = [1, 3, 2, 5, 4]
    for pair in ((values, good), (good, values)):
        with pytest.raises(MetricError, match=word): METRICS[metric][0](*pair)


@pytest.mark.parametrize("metric", METRICS)
def test_too_short(metric):
    short = 0 if metric in ("rmse", "mae") else 2
    with pytest.raises(MetricError, match="too few"): METRICS[metric][0](np.arange(short), np.arange(short))


@pytest.mark.parametrize("seed", range(3))
def test_logistic_finds_the_least_squares_fit(seed):
    "An unbounded fit from the known truth is no better than ours, which starts from nothing."
    rng = np.random.default_rng(seed)
    x = 40 + 7 * rng.normal(size=150)                                    # any scale
    y = logistic(x, 90, 20, 43, 4) + 5 * rng.normal(size=150)
    best, _ = curve_fit(logistic, x, y, p0=(90, 20, 43, 4))
    ours = fit_logistic(x, y)
    assert ((logistic(x, *ours) - y) ** 2).sum() == pytest.approx(((logistic(x, *best) - y) ** 2).sum(), rel=1e-6)
    assert plcc_logistic(x, y) == pytest.approx(np.corrcoef(logistic(x, *best), y)[0, 1], abs=1e-6)
    assert plcc_logistic(x, y) > plcc(x, y)
    assert plcc_logistic(-x, y) == pytest.approx(-plcc_logistic(x, y), abs=1e-6)
    assert plcc_logistic(x, 2 * x + 1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_resamples_equal_brute_force(metric):
    "Draw the clips of the same resamples one by one and use the plain metric: the same interval."
    from qualivision.evaluation.metrics import group_weights
    predictions, labels = tables()
    p, t = predictions.sort_index().Overall_MOS.round(1).to_numpy(), labels.Overall_MOS.to_numpy()
    weights = group_weights(labels.Prompt, len(p), 60, seed=3)
    assert (weights.reshape(60, 20, 5).std(2) == 0).all() and (weights.sum(1) == 100).all()     # whole prompts, as many as there are
    slow = [METRICS[metric][0](np.repeat(p, w), np.repeat(t, w)) for w in weights.astype(int)]
    low, high = bootstrap(p, t, labels.Prompt, [metric], n=60, seed=3)[metric]
    assert (low, high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])), abs=2e-3 if metric == "plcc_logistic" else 1e-10)


def test_clusters_widen_the_interval():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    p, t = (rng.normal(size=(2, 40))[:, groups] + .3 * rng.normal(size=(2, 200)))
    alone, grouped = bootstrap(p, t), bootstrap(p, t, groups)
    for m in alone: assert grouped[m][1] - grouped[m][0] > 1.6 * (alone[m][1] - alone[m][0])


def test_paired_difference():
    predictions, labels = tables()
    t, p = labels.Aesthetic_MOS.to_numpy(), predictions.sort_index().Aesthetic_MOS.to_numpy()
    worse = p + np.random.default_rng(0).normal(size=len(p))
    ab, ba, aa = (paired_bootstrap(x, y, t, labels.Prompt, n=300) for x, y in ((p, worse), (worse, p), (p, p)))
    assert ab["srocc"][1] > 0 and ab["mae"][2] < 0                        # better: more correlation, less error
    for m in ab:
        assert ab[m][0] == METRICS[m][0](p, t) - METRICS[m][0](worse, t) and ab[m][1] <= ab[m][0] <= ab[m][2]
        assert ba[m] == pytest.approx((-ab[m][0], -ab[m][2], -ab[m][1])) and aa[m] == (0, 0, 0)


def test_interval_does_not_depend_on_row_order_and_needs_groups():
    predictions, labels = tables()
    p, t = predictions.sort_index().Overall_MOS.to_numpy(), labels.Overall_MOS.to_numpy()
    order = np.random.default_rng(1).permutation(len(p))
    assert bootstrap(p[order], t[order], labels.Prompt.to_numpy()[order])["plcc"] == pytest.approx(bootstrap(p, t, labels.Prompt)["plcc"], abs=1e-12)
    assert bootstrap(p, t, labels.Prompt, seed=1) != bootstrap(p, t, labels.Prompt, seed=0)
    with pytest.raises(MetricError, match="one group"): bootstrap(p, t, ["same"] * len(p))
    with pytest.raises(MetricError, match="resamples have no value"): bootstrap([1, 2, 3], [1, 3, 2])


def test_five_columns():
    predictions, labels = tables()
    result = evaluate_frames(predictions, labels, group="Prompt")
    assert list(result) == list(DIMENSIONS)
    by_name = predictions.set_index("video_name").loc[labels.video_name]
    for d, c in zip(DIMENSIONS, MOS_COLUMNS):
        assert list(result[d]) == ["n", *EVALUATED, "ci", "reasons"] and not result[d]["reasons"] and result[d]["n"] == 100
        assert result[d]["krcc"] == scipy.stats.kendalltau(by_name[c], labels[c]).statistic
        for m in EVALUATED: assert result[d]["ci"][m][0] < result[d][m] < result[d]["ci"][m][1]
    assert json.loads(json.dumps(result)) == result
    assert result["overall"]["ci"] != evaluate_frames(predictions, labels)["overall"]["ci"]   # without a group every row is alone
    assert "overall" in format_metrics(result)


def test_one_file_any_scale_and_either_name(tmp_path):
    predictions, labels = tables()
    both = pd.DataFrame({"video": labels.video_name, "raw": predictions.sort_index().Overall_MOS * 20 - 7, "dmos": labels.Overall_MOS * 25})
    both.to_csv(tmp_path / "both.csv", index=False)
    result = evaluate_files(tmp_path / "both.csv", tmp_path / "both.csv", pred="raw", target="dmos")
    assert list(result) == ["dmos"]
    reference = evaluate_frames(predictions, labels)["overall"]
    for m in ("srocc", "plcc", "plcc_logistic", "krcc", "challenge"): assert result["dmos"][m] == pytest.approx(reference[m], abs=1e-6)
    labels.to_csv(tmp_path / "labels.csv", index=False)                   # `video` in one file, `video_name` in the other
    assert evaluate_files(tmp_path / "both.csv", tmp_path / "labels.csv", "raw", "Overall_MOS", "Prompt")["Overall_MOS"]["n"] == 100


def test_names_stay_text(tmp_path):
    for f, names in (("a.csv", ["001", "01", "1", "2", "3", "4"]), ("b.csv", ["4", "3", "2", "1", "01", "001"])):
        pd.DataFrame({"video": names, "x": [1, 2, 4, 3, 5, 6.5] if f == "a.csv" else [6.5, 5, 3, 4, 2, 1]}).to_csv(tmp_path / f, index=False)
    assert evaluate_files(tmp_path / "a.csv", tmp_path / "b.csv", "x", "x")["x"]["srocc"] == pytest.approx(1)


def spoil(frame, column, value):
    frame = frame.copy(); frame[column] = frame[column].astype(object); frame.loc[frame.index[3], column] = value
    return frame


@pytest.mark.parametrize("case", {
    "row missing in predictions": (lambda p, t: (p[:-1], t, {}), "missing in the other file"),
    "row missing in labels": (lambda p, t: (p, t[1:], {}), "A_000.mp4"),
    "twice": (lambda p, t: (p, pd.concat([t, t[:1]]), {}), "twice"),
    "text": (lambda p, t: (spoil(p, "Overall_MOS", "three"), t, {}), "no number"),
    "infinite": (lambda p, t: (spoil(p, "Overall_MOS", np.inf), t, {}), "no number"),
    "nothing is left": (lambda p, t: (p.assign(Overall_MOS=np.nan), t, dict(pred="Overall_MOS", target="Overall_MOS")), "there is no score.*Not one"),
    "no pair is left": (lambda p, t: (p.sort_index().assign(x=[1, None] * 50), t.assign(x=[None, 1] * 50), dict(pred="x", target="x")),
                        "score and a label"),
    "nameless": (lambda p, t: (p.drop(columns="video_name"), t, {}), "no column `video_name`"),
    "lost name": (lambda p, t: (spoil(p, "video_name", None), t, {}), "have no video_name"),
    "no dimension": (lambda p, t: (p.drop(columns="Alignment_MOS"), t, {}), "no column `Alignment_MOS`"),
    "half a pair": (lambda p, t: (p, t, dict(pred="Overall_MOS")), "--target"),
    "no group": (lambda p, t: (p, t, dict(group="Scene")), "no column `Scene`"),
    "lost group": (lambda p, t: (p, spoil(t, "Prompt", None), dict(group="Prompt")), "is empty"),
    "empty": (lambda p, t: (p[:0], t[:0], {}), "too few"),
}.items(), ids=lambda c: c[0])
def test_bad_tables_are_errors(case):
    _, (make, message) = case
    p, t, options = make(*tables())
    with pytest.raises(MetricError, match=message): evaluate_frames(p, t, **options)


HOLES = {"constant predictions": lambda p, t: (p.assign(Temporal_MOS=3.), t), "constant labels": lambda p, t: (p, t.assign(Temporal_MOS=3.)),
         "no relation": lambda p, t: (p.assign(Temporal_MOS=[1, 1, 2, 2, 3] * 20), t.assign(Temporal_MOS=[4.5, 1.5, 4, 2, 3] * 20)),
         "no predictions": lambda p, t: (p.assign(Temporal_MOS=np.nan), t), "no labels": lambda p, t: (p, t.assign(Temporal_MOS=""))}


@pytest.mark.parametrize("hole", HOLES)
def test_what_is_not_defined_hides_nothing(hole, tmp_path):
    "Through files: one dimension has a hole, the other four are what they were, and what of it is defined stands."
    predictions, labels = tables()
    predictions, labels = HOLES[hole](predictions.sort_index(), labels)
    predictions.to_csv(tmp_path/"p.csv", index=False), labels.to_csv(tmp_path/"l.csv", index=False)
    result, whole = evaluate_files(tmp_path/"p.csv", tmp_path/"l.csv", n=100), evaluate_frames(*tables(), n=100)
    for d in DIMENSIONS:
        if d != "temporal": assert result[d] == whole[d]
    r = result["temporal"]
    undefined = {m for m in EVALUATED if r[m] is None}
    assert undefined == ({"plcc_logistic"} if hole == "no relation" else set(EVALUATED) - {"rmse"} if "constant" in hole else set(EVALUATED))
    assert set(r["reasons"]) == undefined | {f"ci {m}" for m in EVALUATED if r[m] is not None and r["ci"][m] is None}
    text = format_metrics(result)
    assert all(reason in text for reason in r["reasons"].values()) and len(text.splitlines()) == (31 if r["n"] else 26)
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("whose", [0, 1])
@pytest.mark.parametrize("group", [None, "Prompt"])
def test_an_empty_cell_is_left_out_of_its_dimension_alone(whose, group):
    "In predictions or labels, with or without groups: the numbers of the tables without that row."
    pair = [f.sort_index() for f in tables()]
    without = [f.drop(index=3) for f in pair]
    pair[whose] = spoil(pair[whose], "Temporal_MOS", np.nan)
    result, whole, rest = (evaluate_frames(*f, group=group, n=50) for f in (pair, tables(), without))
    for d in DIMENSIONS: assert result[d] == (rest if d == "temporal" else whole)[d]
    assert result["temporal"]["n"] == 99 and result["overall"]["n"] == 100


def of_another_set():
    "Predictions of five MOS, and labels of three dimensions under other names, with an empty cell in each."
    predictions, labels = tables()
    theirs = pd.DataFrame({"video": labels.video_name, "prompt": labels.Prompt, "bitrate": 1, "Static_Quality": labels.Traditional_MOS,
                           "temporal_quality": labels.Temporal_MOS, "alignment": labels.Alignment_MOS})
    for i, c in enumerate(theirs.columns[3:]): theirs.loc[i, c] = np.nan
    return predictions.assign(Prompt=labels.Prompt), theirs


@pytest.mark.parametrize("group", ["prompt", "Prompt", "PROMPT"])
def test_labels_of_another_set(group, tmp_path):
    predictions, theirs = of_another_set()
    predictions.to_csv(tmp_path/"p.csv", index=False), theirs.to_csv(tmp_path/"l.csv", index=False)
    result, by_name = evaluate_files(tmp_path/"p.csv", tmp_path/"l.csv", group=group, n=100), predictions.sort_index()
    assert list(result) == list(DIMENSIONS) and json.loads(json.dumps(result)) == result
    for d, c, empty in (("traditional", "Static_Quality", 0), ("temporal", "temporal_quality", 1), ("alignment", "alignment", 2)):
        assert result[d]["n"] == 99 and not result[d]["reasons"]
        assert result[d]["srocc"] == scipy.stats.spearmanr(by_name[f"{d.capitalize()}_MOS"].drop(empty), theirs[c].drop(empty)).statistic
    for d in ("aesthetic", "overall"):
        assert result[d]["n"] == 0 and all(result[d][m] is None and result[d]["reasons"][m] == "there is no label" for m in EVALUATED)
    assert "aesthetic    left out: there is no label" in format_metrics(result)
    theirs.drop(columns="prompt").to_csv(tmp_path/"l.csv", index=False)                  # the group of the predictions
    assert evaluate_files(tmp_path/"p.csv", tmp_path/"l.csv", group=group, n=100) == result


def test_a_group_is_taken_from_the_column_of_that_very_name():
    predictions, labels = tables()
    labels["prompt"] = labels.video_name.str[:1]
    assert evaluate_frames(predictions, labels, group="Prompt", n=50) == evaluate_frames(*tables(), group="Prompt", n=50)
    assert evaluate_frames(predictions, labels, group="prompt", n=50) != evaluate_frames(*tables(), group="Prompt", n=50)


def test_labels_that_are_not_clear(tmp_path):
    predictions, theirs = of_another_set()
    for labels, message in ((theirs.assign(visual_quality=3), "l.csv: the columns Static_Quality and visual_quality are both traditional"),
                            (theirs[["video", "bitrate"]], r"l.csv: no column holds opinions .*it has: video, bitrate")):
        labels.to_csv(tmp_path/"l.csv", index=False), predictions.to_csv(tmp_path/"p.csv", index=False)
        with pytest.raises(LabelError, match=message): evaluate_files(tmp_path/"p.csv", tmp_path/"l.csv")
    with pytest.raises(MetricError, match="alignment, srocc: there is no score"):      # not: traditional has no label
        evaluate_frames(predictions.assign(Alignment_MOS=""), theirs[["video", "alignment"]])
    for wrong in ("good", "inf"):
        spoil(theirs, "temporal_quality", wrong).to_csv(tmp_path/"l.csv", index=False)      # the fourth row, below the header
        with pytest.raises(MetricError, match="l.csv line 5: `temporal_quality` holds no number for D_000.mp4"):
            evaluate_files(tmp_path/"p.csv", tmp_path/"l.csv")


def test_five_known_columns_come_before_any_other_name():
    predictions, labels = tables()
    assert evaluate_frames(predictions, labels.assign(score="x", static_quality=1), n=50) == evaluate_frames(predictions, labels, n=50)


def test_an_interval_may_be_undefined_alone():
    r = evaluate_frames(*(pd.DataFrame({"video": list("abc"), "x": x}) for x in ([1, 2, 3], [1, 3, 2])), "x", "x")["x"]
    assert r["srocc"] == pytest.approx(.5) and r["ci"]["srocc"] is None and "resamples have no value" in r["reasons"]["ci srocc"] and r["ci"]["rmse"]
    assert "too few" in r["reasons"]["plcc_logistic"] and "ci plcc_logistic" not in r["reasons"]


def test_names_like_holes(tmp_path):
    "NA, null, None and nan are names; an empty cell, nan and NaN are holes where a number is expected."
    names = ["NA", "null", "nan", "None", "NULL", "n/a", "a"]
    (tmp_path/"p.csv").write_text("video,x\n" + "".join(f"{n},{i}\n" for i, n in enumerate(names)))
    assert evaluate_files(tmp_path/"p.csv", tmp_path/"p.csv", "x", "x", group="video")["x"]["n"] == 7
    for hole in ("", "nan", "NaN"):
        (tmp_path/"q.csv").write_text("video,x,y\n" + "".join(f"{n},{i},{hole if i == 2 else i}\n" for i, n in enumerate(names)))
        result = evaluate_files(tmp_path/"q.csv", tmp_path/"q.csv", "x", "y")["y"]
        assert result["n"] == 6 and result["srocc"] == pytest.approx(1)
    (tmp_path/"q.csv").write_text("video,x,y\n" + "".join(f"{n},{i},{'NA' if i == 2 else i}\n" for i, n in enumerate(names)))
    with pytest.raises(MetricError, match="q.csv line 4: `y` holds no number for nan. Correct it"):
        evaluate_files(tmp_path/"q.csv", tmp_path/"q.csv", "x", "y")


def test_bad_files_are_errors(tmp_path):
    (tmp_path/"empty.csv").write_text("")
    (tmp_path/"binary.csv").write_bytes(b"\x00\xff\xfe" * 50)
    (tmp_path/"twice.csv").write_text("video,x,x\na,1,2\n")
    (tmp_path/"latin.csv").write_bytes(b"video,x,scene\na,1,caf\xe9\nb,2,z\nc,3,z\n")
    for name in ("gone.csv", "empty.csv", "binary.csv", "twice.csv", "latin.csv"):
        with pytest.raises(FileError, match=name): evaluate_files(tmp_path/name, tmp_path/name, "x", "x")
    assert evaluate_files(tmp_path/"latin.csv", tmp_path/"latin.csv", "x", "x", encoding="latin-1")["x"]["n"] == 3
