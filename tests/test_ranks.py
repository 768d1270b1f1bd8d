"Ranks: the published ones come out, built sets rank as counting does, and what cannot be ranked is refused."
import json
import math
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest

from chapters import ROOT
from qualivision.official.fused import SET_SCRIPT, SET_WEIGHTS, fuse_set, fused_score, zscore
from qualivision.evaluation.ranks import (
    Distribution, RankError, build_set, read_sets, relative_ranks, why_no_ranks, write_sets)

CLIP = {"technical": -0.07885, "aesthetic": 0.1483}
PUBLISHED = {"LIVE-VQC": [(43, .10), (64, .51)], "KoNViD-1k": [(75, .77), (91, 1.21)], "LSVQ_test": [(69, .59), (79, .85)],
             "LSVQ_1080p": [(53, .25), (54, .25)], "YouTube-UGC": [(71, .65), (80, .86)]}


def test_the_twenty_published_ranks():
    ranks = relative_ranks(CLIP, "dover")
    assert {k: [(v[b]["percent"], v[b]["normalised"]) for b in CLIP] for k, v in ranks.items()} == PUBLISHED and list(ranks) == list(PUBLISHED)
    assert all(isinstance(v["percent"], int) for r in ranks.values() for v in r.values()) and json.dumps(ranks, allow_nan=False)


@pytest.mark.parametrize("model", ["dover-mobile", "dover++", "cover"])
def test_scores_of_another_model_have_no_rank_and_a_reason(model):
    assert relative_ranks(CLIP, model) is None and model in why_no_ranks(model) and "only those of dover" in why_no_ranks(model)
    assert why_no_ranks("dover") is None and relative_ranks({}, "dover") is None


@pytest.mark.parametrize("n", [2, 5, 300])
def test_ranks_are_what_counting_gives(n):
    "Percent and normalised score by the words of the official tool: the new score goes into the set first."
    rng = np.random.default_rng(n)
    x = rng.normal(size=n).round(1)
    x[0], x[1] = -1.1, 1.2
    d = Distribution.of(x)
    for score in [-9, 9, *x[:20], *rng.normal(size=20)]:
        larger = np.append(x, score)
        assert d.rank(score) == {"percent": int(100 * (x < score).sum() / (n + 1)), "normalised": round((score - larger.mean()) / larger.std(), 2)}


def test_fused_score():
    assert 0.6925 < fused_score(**CLIP) < 0.6931
    official = 1 / (1 + np.exp(-(0.6104 * (CLIP["technical"] - 0.1107) / 0.07355 + 0.3896 * (CLIP["aesthetic"] + 0.08285) / 0.03774)))
    corrected = 1 / (1 + np.exp(-(0.6104 * (CLIP["technical"] + 0.08285) / 0.03774 + 0.3896 * (CLIP["aesthetic"] - 0.1107) / 0.07355)))
    assert fused_score(**CLIP) == pytest.approx(official, abs=1e-12) and fused_score(**CLIP, form="corrected") == pytest.approx(corrected, abs=1e-12)
    assert fused_score(-1e9, -1e9) == 0 and fused_score(1e9, 1e9) == 1
    with pytest.raises(RankError): fused_score(float("nan"), 0.1)


# technical, aesthetic and overall as the authors of DOVER published them, of three videos
PREDICTIONS = {"KoNViD-1k": [(-0.11277783, 0.03816929, -0.06812862), (-0.14608663, 0.01227463, -0.64122397), (-0.08620118, 0.00543008, 0.09806486)]}


def test_fusion_of_a_set_is_the_published_one():
    "Overall = w·z(technical) + (1−w)·z(aesthetic), with mean and deviation of the whole set."
    sets = {s.name: s.branches for s in read_sets()}
    for name, rows in PREDICTIONS.items():
        t, a, w = sets[name]["technical"], sets[name]["aesthetic"], SET_WEIGHTS[name]
        for technical, aesthetic, overall in rows:
            assert w * (technical - t.mean) / t.std + (1 - w) * (aesthetic - a.mean) / a.std == pytest.approx(overall, abs=2e-6)


def test_fusion_of_a_set():
    rng = np.random.default_rng(0)
    t, a, mos = rng.normal(size=(3, 50))
    assert np.allclose(fuse_set(t, a, 0.3), 0.3 * zscore(t) + 0.7 * zscore(a)) and np.allclose(fuse_set(t, a, 1), zscore(t))
    moved = fuse_set(t, a, labels=mos)
    assert moved.mean() == pytest.approx(mos.mean()) and moved.std() == pytest.approx(mos.std())
    for wrong in ((t, a[:9]), (t, a * 0), (t, a * np.nan), (t, a, 1.2), (t[:1], a[:1])):
        with pytest.raises(RankError): fuse_set(*wrong)


HEADERS = {"dover": "path,aesthetic score,technical score,overall/final score", "plain": "video,aesthetic,technical,fused"}


@pytest.mark.parametrize("style", HEADERS)
def test_sets_of_one_s_own(tmp_path, style):
    rng = np.random.default_rng(1)
    raw = [(t, a, fused_score(t, a)) for t, a in rng.normal((-.1, .05), (.04, .08), (40, 2))]
    seen = [(100 / (1 + math.exp(-(t - .1107) / .07355)), 100 / (1 + math.exp(-(a + .08285) / .03774)), 100 * f) for t, a, f in raw]
    rows = [f"v{i}.mp4,{a:.9f},{t:.9f},{f:.9f}" for i, (t, a, f) in enumerate(seen if style == "dover" else raw)]
    (tmp_path/"a.csv").write_text("\n".join([HEADERS[style], *rows[:25]]))
    (tmp_path/"b.csv").write_text("\n".join([HEADERS[style], *rows[25:]]))
    mine, lost = build_set([tmp_path/"a.csv", tmp_path/"b.csv"], "mine", "dover-mobile", scripts=(SET_SCRIPT,))
    assert lost == 0 and mine.branches["technical"].n == 40 and list(mine.branches) == ["technical", "aesthetic", "fused"]
    assert read_sets(write_sets(tmp_path/"sets"/"mine.json", [mine, *read_sets()])) == [mine, *read_sets()]
    sets = read_sets(tmp_path/"sets"/"mine.json")
    for k, b in enumerate(mine.branches): assert mine.branches[b].quantiles == pytest.approx(sorted(r[k] for r in raw), abs=1e-6)
    place = Distribution.of([t for t, _, _ in raw]).rank(-.1)
    assert relative_ranks({"technical": -.1}, "dover-mobile", sets) == {"mine": {"technical": place}}
    assert list(relative_ranks(CLIP, "dover", sets)) == list(PUBLISHED)


def test_sets_of_other_models_and_formats(tmp_path):
    scores = pd.DataFrame({"Filename": list("abc"), "Semantic": [1., 2, 3], "Technical": [3., 2, 1], "Aesthetic": [1., 5, 2], "Overall": [5., 9, 6]})
    scores.to_csv(tmp_path/"cover.csv", index=False)
    assert list(build_set(tmp_path/"cover.csv", "x", "cover")[0].branches) == ["semantic", "technical", "aesthetic", "overall"]
    mos = pd.DataFrame({"video_name": list("abcd"), "Overall_MOS": [1., 2, 3, None], "Traditional_MOS": [3., 2, 1, None]})
    mos["error"] = [None, None, None, "gone"]
    mos.to_parquet(tmp_path/"five.parquet")
    five, lost = build_set(tmp_path/"five.parquet", "x", "qualivision")
    assert lost == 1 and five.branches["overall"].n == 3 and list(five.branches) == ["overall", "traditional"]


@pytest.mark.parametrize("text,said", [
    ("video,mean\na,1\nb,2", "no column holds scores"), ("video,technical\na,1\nb,", "1 scores in technical are no numbers"),
    ("video,technical\na,1\nb,1", "two different scores"), ("video,technical,Technical_MOS\na,1,2", "two columns"),
    ("video,technical\na,inf\nb,2", "no numbers"),
    *((f"{HEADERS['dover']}\na,{bad},50,50\nb,20,30,40", "1 scores in aesthetic are not between 0 and 100") for bad in (-1, 0, 100, 101, "x")),
    ("video,technical,error\na,,bad\nb,,bad", "two different scores")])
def test_score_files_that_make_no_set(tmp_path, text, said):
    (tmp_path/"a.csv").write_text(text)
    with pytest.raises(RankError, match=said): build_set(tmp_path/"a.csv", "x", "dover", scripts=(SET_SCRIPT,))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sets": {"x": {}}}', '{"sets": {"x": {"model": "m", "branches": {"t": {"n": 3}}}}}'])
def test_files_that_are_no_sets(tmp_path, text):
    (tmp_path/"a.json").write_text(text)
    with pytest.raises(RankError, match=r"a\.json"): read_sets(tmp_path/"a.json")
    with pytest.raises(RankError, match=r"b\.json"): read_sets(tmp_path/"b.json")


def test_the_published_sets_travel_with_the_package(tmp_path):
    "What pip installs holds the file, not only this checkout."
    if find_spec("setuptools") is None: pytest.skip("setuptools is not installed")
    build = [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "build_py", "-d", tmp_path/"lib"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path/"lib"/"qualivision"/"evaluation"/"reference_scores.json").read_bytes() == \
        (ROOT/"qualivision"/"evaluation"/"reference_scores.json").read_bytes()
