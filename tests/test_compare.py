"Which of two models follows people better: against the textbook, brute force and simulation, and the command."
import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from qualivision.cli import app
from qualivision.evaluation.agreement import ALL_METRICS
from qualivision.evaluation.compare import (
    compare_frames, dependent_correlations, difference, holm, jackknife, verdict, without_each)
from qualivision.evaluation.metrics import METRICS, MetricError
from qualivision.quality import DIMENSIONS, MOS_COLUMNS

PROMPTS = np.repeat(np.arange(24), 4)


def draw(rng, noise=(.5, .5)):
    "Opinions and two models; half of every variance belongs to the prompt."
    def shared(): return .5 ** .5 * (rng.standard_normal(24)[PROMPTS] + rng.standard_normal(96))
    y = shared()
    return y, *(y + k * shared() for k in noise)


@pytest.mark.parametrize("metric", ALL_METRICS.values(), ids=lambda m: m.name)
def test_each_group_is_left_out_whole(metric):
    rng = np.random.default_rng(0)
    y, a, _ = draw(rng)
    y, a = y.round(1), a.round(1)
    metric = metric.given({"group": PROMPTS, "generator": np.array(list("wxyz") * 24), "spread": rng.uniform(.1, .5, 96)}.get(metric.beside))
    value, values = without_each(a, y, PROMPTS, metric)
    assert value == metric(a, y)
    slow = [metric.some(PROMPTS != g)(a[PROMPTS != g], y[PROMPTS != g]) for g in range(24)]
    # groups are sorted as text: the same numbers in another order; a logistic is fitted on a grid
    fitted = {"plcc_logistic": 2e-3, "rmse_mapped": 2e-3, "rmse_star": 2e-3, "outliers": 1.1 / 92}
    assert sorted(values) == pytest.approx(sorted(slow), abs=fitted.get(metric.name, 1e-10))


def test_williams_is_the_test_of_a_simulation_of_independent_clips():
    "5 % of draws without prompts are called different, and one in six of draws with prompts; 2,000 draws are in LOG.md."
    rng, alone, grouped = np.random.default_rng(1), [], []
    for _ in range(200):
        y = rng.standard_normal(96)
        for found, (t, a, b) in ((alone, (y, y + rng.standard_normal(96), y + rng.standard_normal(96))), (grouped, draw(rng))):
            r = np.corrcoef([a, b, t])
            both = dependent_correlations(r[0, 2], r[1, 2], r[0, 1], 96)
            found.append([both[k]["p"] < .05 for k in ("williams", "steiger")])
    assert (abs(np.mean(alone, 0) - .05) < .05).all() and (np.mean(grouped, 0) > .08).all()


@pytest.mark.parametrize("wrong", [(.4, 1., .1, 50), (.4, .5, .1, 3), (float("nan"), .5, .1, 50)])
def test_correlations_that_cannot_be_compared(wrong):
    with pytest.raises(MetricError, match="Four clips or more"): dependent_correlations(*wrong)


@pytest.mark.parametrize("metric", ["srocc", "rmse"])
def test_intervals_hold_the_truth(metric):
    "120 draws with wide limits; python -m benchmarks intervals --full does 2,000."
    rng, held, alarms, one = np.random.default_rng(2), [], [], []
    big = np.random.default_rng(3)
    true = np.mean([METRICS[metric][0](*draw(big)[:2]) for _ in range(200)])
    for _ in range(120):
        y, a, b = draw(rng)
        found = difference(a, b, y, PROMPTS, metric)
        held.append(found["low"] <= 0 <= found["high"])
        alarms.append(found["p"] < .05)
        _, low, high = jackknife(a, y, PROMPTS, metric)
        one.append(low <= true <= high)
    assert .90 < np.mean(held) < .99 and np.mean(alarms) == pytest.approx(1 - np.mean(held)) and .88 < np.mean(one) < .99


def test_a_worse_model_is_told_apart():
    y, a, b = draw(np.random.default_rng(4), (.3, 1.5))
    found = difference(a, b, y, PROMPTS)
    assert found["low"] > .1 and found["p"] < 1e-3 and found["low"] < found["diff"] < found["high"]
    assert difference(a, b, y, PROMPTS, "rmse")["high"] < 0                 # a smaller error


def test_an_unknown_generator_is_nobodys_sibling():
    "An empty cell is no generator of its own: clips without a name say nothing of each other."
    y, a, b = draw(np.random.default_rng(6))
    names = [f"{k}.mp4" for k in range(96)]
    labels = pd.DataFrame({"video_name": names, "generator": ["w", "x"] * 44 + [None] * 8, MOS_COLUMNS[0]: y.clip(-2, 2) + 3})
    tables = {n: pd.DataFrame({"video_name": names} | dict.fromkeys(MOS_COLUMNS, x.clip(-2, 2) + 3)) for n, x in (("a", a), ("b", b))}
    found = {r["name"]: r["n"] for r in compare_frames(tables, labels)["rows"]}
    assert found == {"a": 96, "b": 96, "generator alone": 88}


def test_no_interval_from_nothing():
    y, a, b = draw(np.random.default_rng(5))
    with pytest.raises(MetricError, match="at least three groups"): jackknife(a, y, PROMPTS > 11)
    with pytest.raises(MetricError, match="exactly 1"): jackknife(y, y, PROMPTS)
    lone = np.where(PROMPTS == 0, y, 3.)                                   # constant without prompt 0
    with pytest.raises(MetricError, match="without one of the groups"): jackknife(lone, y, PROMPTS)


def test_holm_by_definition():
    "The least level at which each is rejected when one steps down."
    p = np.random.default_rng(6).uniform(size=9) ** 3
    for level in (.01, .05, .2, .5):
        rejected = set()
        for k, i in enumerate(np.argsort(p)):
            if p[i] > level / (9 - k): break
            rejected.add(int(i))
        assert rejected == {i for i, x in enumerate(holm(p)) if x <= level}


@pytest.fixture
def files(tmp_path):
    rng, frames = np.random.default_rng(7), {}
    names = [f"v{i:03d}.mp4" for i in range(96)]
    y = {c: draw(rng)[0] + 3 for c in MOS_COLUMNS}
    for name, noise in (("a", .3), ("b", .35), ("c", 3.)):
        frame = pd.DataFrame({"video_name": names} | {c: v + noise * rng.standard_normal(96) for c, v in y.items()})
        frames[name] = frame.sample(frac=1, random_state=1)
        (tmp_path/name).mkdir()
        frames[name].to_csv(tmp_path/name/"p.csv", index=False)
    labels = pd.DataFrame({"video_name": names, "Prompt": [f"p{k}" for k in PROMPTS], "generator": list("wxyz") * 24} | y)
    labels.loc[:3, "Overall_MOS"] = np.nan
    labels.to_csv(tmp_path/"labels.csv", index=False)
    return tmp_path


def run(files, *more):
    paths = [str(files/n/"p.csv") for n in "abc"]
    return CliRunner().invoke(app, ["compare", *paths, "--labels", str(files/"labels.csv"), *more])


def test_the_command(files):
    answer = run(files, "--group", "prompt", "--json", "--out", str(files/"x.png"))
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert set(found) == {"metric", "group", "rows", "pairs"} and len(found["pairs"]) == 3 * 5
    assert all(list(p) == ["a", "b", "dim", "diff", "low", "high", "p", "p_holm"] for p in found["pairs"])
    assert [p["p_holm"] for p in found["pairs"]] == holm([p["p"] for p in found["pairs"]])
    by = {(p["a"], p["b"], p["dim"]): p for p in found["pairs"]}
    assert {p["a"] for p in found["pairs"]} == {"a/p.csv", "b/p.csv"}     # the shortest end that is their own
    assert all(verdict(by["a/p.csv", "c/p.csv", d]) == "told apart" for d in DIMENSIONS)
    assert verdict(by["a/p.csv", "b/p.csv", "aesthetic"]) == "not told apart"
    rows = {(r["name"], r["dim"]): r for r in found["rows"]}
    assert rows["a/p.csv", "overall"]["n"] == 92 and rows["a/p.csv", "temporal"]["n"] == 96
    assert {r["name"] for r in found["rows"]} == {"a/p.csv", "b/p.csv", "c/p.csv", "prompt alone", "generator alone", "prompt + generator"}
    assert (files/"x.png").read_bytes().startswith(b"\x89PNG")
    shown = " ".join(run(files, "--group", "Prompt").stdout.split())        # lines are wrapped
    assert "not told apart" in shown and "no difference" not in shown
    assert "prompt alone" not in run(files).stdout                          # each clip alone: there are no siblings


def test_one_file_twice_and_equal_scores(files):
    (files/"b"/"p.csv").write_bytes((files/"a"/"p.csv").read_bytes())
    pairs = [p for p in json.loads(run(files, "--json").stdout)["pairs"] if p["b"] == "b/p.csv"]
    assert len(pairs) == 5 and all(p["p"] == p["p_holm"] == 1 and p["diff"] == p["low"] == p["high"] == 0 for p in pairs)
    assert " ".join(run(files).stdout.split()).count("no difference") == 5
    same = str(files/"a"/"p.csv")
    answer = CliRunner().invoke(app, ["compare", same, same, "--labels", str(files/"labels.csv")])
    assert answer.exit_code == 1 and "named twice" in answer.output


def test_what_cannot_be_compared(files):
    assert "there is no such metric" in run(files, "--metric", "r2").output
    assert "no column `scene`" in run(files, "--group", "scene").output
    table = pd.read_csv(files/"c"/"p.csv")
    table.iloc[1:].to_csv(files/"c"/"p.csv", index=False)
    assert "missing in the other file" in run(files).output
    table.assign(Temporal_MOS=3.).to_csv(files/"c"/"p.csv", index=False)
    found = json.loads(run(files, "--json").stdout)
    bad = [p for p in found["pairs"] if p["p"] is None]
    assert {(p["b"], p["dim"]) for p in bad} == {("c/p.csv", "temporal")} and all("constant" in p["reason"] for p in bad)
    assert [p["p_holm"] for p in found["pairs"] if p["p"] is not None] == holm([p["p"] for p in found["pairs"] if p["p"] is not None])


def test_a_clip_counts_where_all_models_have_a_score(files):
    table = pd.read_csv(files/"c"/"p.csv")
    table.loc[table.video_name.isin(["v010.mp4", "v011.mp4"]), "Temporal_MOS"] = np.nan
    frames = {n: pd.read_csv(files/n/"p.csv") for n in "ab"} | {"c": table}
    found = compare_frames(frames, pd.read_csv(files/"labels.csv"), "Prompt")
    assert {r["n"] for r in found["rows"] if r["dim"] == "temporal"} == {94}


def test_metrics_that_know_more_of_a_clip():
    "Within a prompt, within a generator, in pairs, and beyond the doubt; and why not, where it is not known."
    y, a, b = draw(np.random.default_rng(8), (.2, 2.))
    names = [f"{k}.mp4" for k in range(96)]
    labels = pd.DataFrame({"video_name": names, "Prompt": PROMPTS, "generator": list("wxyz") * 24, "temporal": y + 3})
    tables = {n: pd.DataFrame({"video_name": names} | dict.fromkeys(MOS_COLUMNS, x)) for n, x in (("a", a), ("b", b))}
    def found(metric, group="Prompt", labels=labels):
        result = compare_frames(tables, labels, group, metric)
        return {r["name"]: r for r in result["rows"]}, result["pairs"][0]
    for metric, baseline in (("srocc_in_group", "generator"), ("accuracy", "generator"), ("srocc_in_generator", "prompt")):
        rows, pair = found(metric)
        assert list(rows) == ["a", "b", f"{baseline} alone"]                                   # no prompt within a prompt
        assert rows["b"]["high"] < rows["a"]["low"] < rows["a"]["value"] < rows["a"]["high"] and pair["p"] < 1e-3 and pair["low"] > 0
    rows, pair = found("accuracy_with_ties", None)
    assert pair["p"] is rows["a"]["value"] is None and "one group" in rows["a"]["reason"] == pair["reason"]
    assert "raters" in found("outliers")[0]["b"]["reason"]
    rows, pair = found("rmse_star", labels=labels.assign(raters=24, temporal_sd=.5))
    assert rows["a"]["high"] < rows["b"]["low"] and pair["high"] < 0
