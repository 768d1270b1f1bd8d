"Order inside groups, pairs and errors beyond the doubt: against scipy, loops and an independent fit, and what has no value."
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from scipy.optimize import curve_fit

from qualivision.evaluation.agreement import (
    ALL_METRICS, accuracy, doubt_of, mapped, metric_of, outliers, rmse_mapped, rmse_star, spread_of, srocc_within)
from qualivision.evaluation.metrics import MetricError, krcc, logistic
from qualivision.evaluation.ranks import pair_accuracy

BESIDE = [m for m in ALL_METRICS.values() if m.beside]


def drawn(seed, sizes=(5, 3, 1, 4, 2, 6, 1)):
    rng = np.random.default_rng(seed)
    keys = np.repeat([f"k{i}" for i in range(len(sizes))], sizes)
    t = np.round(3 + rng.standard_normal(len(keys)), 1 + seed % 2 - 1)           # with many ties, and with few
    return np.round(t + rng.standard_normal(len(keys)), 1), t, keys


@pytest.mark.parametrize("seed", range(6))
def test_ranks_inside_groups(seed):
    "Pearson's r of scipy's ranks, centred in each group; with one group it is Spearman's."
    p, t, keys = drawn(seed)
    a, b = (np.concatenate([(r := scipy.stats.rankdata(x[keys == k])) - r.mean() for k in dict.fromkeys(keys)]) for x in (p, t))
    assert srocc_within(p, t, keys) == pytest.approx(a @ b / (a @ a * (b @ b)) ** .5, abs=1e-12)
    assert srocc_within(p, t, np.full(len(p), "all")) == pytest.approx(scipy.stats.spearmanr(p, t).statistic, abs=1e-12)
    order = np.random.default_rng(0).permutation(len(p))
    assert srocc_within(p[order], t[order], keys[order]) == pytest.approx(srocc_within(p, t, keys), abs=1e-12)
    assert srocc_within(p, t, np.where(keys == "k0", "", keys)) == pytest.approx(srocc_within(p[5:], t[5:], keys[5:]), abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_pairs_of_one_group(seed):
    "Every pair in a loop; and chapter 38 says the same of them."
    p, t, keys = drawn(seed)
    pairs = [(i, j) for i in range(len(p)) for j in range(i) if keys[i] == keys[j]]
    apart, choice = np.array([(p[i] - p[j], np.sign(t[i] - t[j])) for i, j in pairs]).T
    right = [x * c > 0 for x, c in zip(apart, choice) if c]
    found = pair_accuracy(apart, choice, n=2)
    assert accuracy(p, t, keys) == pytest.approx(np.mean(right)) == found["accuracy"]
    assert accuracy(p, t, keys, ties=True) == pytest.approx(found["accuracy_with_ties"])
    distinct = np.arange(len(p)) + .1 * p                                        # without ties it is Kendall's
    assert accuracy(distinct, np.argsort(p), np.full(len(p), "all")) == pytest.approx((krcc(distinct, np.argsort(p)) + 1) / 2)


def test_errors_after_an_independent_fit():
    rng = np.random.default_rng(0)
    x = rng.normal(size=150)
    y, doubt = logistic(x, 4.6, 1.4, .3, .5) + .3 * rng.normal(size=150), rng.uniform(.05, .4, 150)
    best, _ = curve_fit(logistic, x, y, p0=(4.6, 1.4, .3, .5))
    error = np.abs(logistic(x, *best) - y)
    assert rmse_mapped(x, y) == pytest.approx((error @ error / 146) ** .5, rel=1e-6)
    beyond = np.maximum(error - doubt, 0)
    assert rmse_star(x, y, doubt) == pytest.approx((beyond @ beyond / 146) ** .5, rel=1e-4) and outliers(x, y, doubt) == (error > doubt).mean()
    assert rmse_mapped(10 - 7 * x, y) == pytest.approx(y.std(ddof=0) * (150 / 146) ** .5) and np.ptp(mapped(-x, y)) == 0     # may only rise
    assert rmse_mapped(10 + 7 * x, y) == pytest.approx(rmse_mapped(x, y), rel=1e-5)


def test_half_widths_are_those_of_the_raters():
    answers = np.random.default_rng(1).integers(1, 6, (24, 9))
    low, high = scipy.stats.t.interval(.95, 23, answers.mean(0), scipy.stats.sem(answers))
    assert doubt_of(answers.std(0, ddof=1), 24) == pytest.approx((high - low) / 2)
    assert np.isnan(doubt_of([1, 1, np.nan, -1], [1, np.nan, 3, 3])).all() and doubt_of(0, 3) == 0
    labels = pd.DataFrame({"video_name": list("ab"), "OVERALL_SD": [1., .5], "Raters": [3, 4], "temporal_sd": [1., 1.], "temporal_n": [9, 1]})
    assert spread_of(labels, "overall", "l.csv") == pytest.approx(doubt_of([1, .5], [3, 4]))
    assert np.isnan(spread_of(labels, "temporal", "l.csv")).tolist() == [False, True] and np.isnan(spread_of(labels, "alignment", "l.csv")).all()


@pytest.mark.parametrize("metric", BESIDE, ids=lambda m: m.name)
@pytest.mark.parametrize("wrong, word", [("unknown", "is not known"), ("NaN", "NaN"), ("nothing", "no |raters"), ("short", "too few"),
                                         ("constant", "constant|different|beyond|neither")])
def test_no_number_is_made_up(metric, wrong, word):
    p, t, keys = drawn(0)
    spread, n = np.full(len(p), .3), 2 if metric.beside != "group" or "srocc" in metric.name else 0
    column = spread if metric.beside == "spread" else keys
    if wrong == "unknown": column = None
    if wrong == "NaN": p = np.where(keys == "k0", np.nan, p)
    if wrong == "nothing": column = spread * np.nan if metric.beside == "spread" else np.arange(len(p)).astype(str)
    if wrong == "short": p, t, column = p[:n], t[:n], column[:n]
    if wrong == "constant": t = np.full(len(t), 3.)
    if wrong == "constant" and metric.name == "accuracy_with_ties": return          # "neither" is then right
    with pytest.raises(MetricError, match=word): metric.given(column)(p, t)


def test_an_unknown_metric_is_told_all_that_there_are():
    with pytest.raises(MetricError, match="srocc, plcc, .* outliers"): metric_of("r2")
    assert metric_of(m := ALL_METRICS["outliers"]) is m
