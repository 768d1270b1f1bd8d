"""How often intervals hold the truth and tests raise false alarms, at the embedded set's number of prompts.

Simulated opinions and two simulated models; half (or a fifth) of each variance belongs to the prompt, as part of each model's error is
shared with the other. The truth is the metric of 24,000 clips, four times. The baseline is the percentile interval of resampled prompts
(chapter 35), 500 resamples. With one seed the answer is the same on every machine.
"""
import numpy as np
from scipy.stats import norm

from benchmarks.common import Report

from qualivision.evaluation.compare import Jackknife, difference, quantile
from qualivision.evaluation.metrics import METRICS, group_weights, resampled

CASES = {       # noise of the two models, shared part of their errors, the prompts' part, are opinions coarse and skewed?
    "equal and good": ((.48, .48), .4, .5, True), "equal, much alike": ((.48, .48), .8, .2, False),
    "equal and weak": ((1.33, 1.33), .4, .5, True), "equal and very good": ((.33, .33), .4, .5, True),
    "one is better": ((.48, .75), .4, .5, True), "one is far better": ((.75, 2.3), .2, .5, False)}


def draw(rng, groups: np.ndarray, noise: tuple, shared: float, part: float, coarse: bool):
    "Opinions (N,) and two models' scores."
    def field(): return part ** .5 * rng.standard_normal(groups[-1] + 1)[groups] + (1 - part) ** .5 * rng.standard_normal(len(groups))
    y, common = field(), field()
    a, b = (y + k * (shared ** .5 * common + (1 - shared) ** .5 * field()) for k in noise)
    return (np.round(1 + 4 * norm.cdf(y) ** 3, 1) if coarse else y), a, b


def study(case: tuple, metric: str, prompts: int, draws: int) -> dict:
    "Shares: truth in the interval of one model, of the difference, false alarms (where equal); the same for percentiles."
    plain, groups, rng = METRICS[metric][0], np.repeat(np.arange(prompts), 5), np.random.default_rng(0)
    true, big = [], np.repeat(np.arange(4800), 5)
    for seed in range(4):
        y, a, b = draw(np.random.default_rng(100 + seed), big, *case)
        true.append((plain(a, y), plain(b, y)))
    one, other = np.mean(true, 0)
    if case[0][0] == case[0][1]: one = other = (one + other) / 2
    weights, held = group_weights(groups, len(groups), 500, 1), []
    for _ in range(draws):
        y, a, b = draw(rng, groups, *case)
        low, high = Jackknife(a, y, groups, metric).span(quantile(prompts))
        d = difference(a, b, y, groups, metric)
        alone, against = (resampled(metric, x, y, weights) for x in (a, b))
        p0, p1 = np.percentile(alone, [2.5, 97.5])
        q0, q1 = np.percentile(alone - against, [2.5, 97.5])
        held.append([low <= one <= high, d["low"] <= one - other <= d["high"], d["p"] < .05, p0 <= one <= p1, q0 <= one - other <= q1])
    return dict(zip(("one", "difference", "told apart", "percentile, one", "percentile, difference"), np.mean(held, 0).round(4)))


def options(parser):
    parser.add_argument("--draws", type=int, help="default: 100, with --full 2,000")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--metric", default="srocc", choices=list(METRICS))


def run(args) -> Report:
    draws = args.draws or (2000 if args.full else 100)
    rows = [{"case": name, **study(case, args.metric, args.prompts, draws)} for name, case in CASES.items()]
    return Report(rows, [f"{args.metric}, {args.prompts} prompts of five clips, {draws} draws; shares of draws"])
