"Baselines that cannot leak and cannot wobble, and a results table whose numbers are those of the metrics."
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from qualivision.data.container import write_video
from qualivision.evaluation.lowlevel import HAND_CRAFTED, LOW_LEVEL, clip_features, feature_table
from qualivision.evaluation.metrics import MetricError, bootstrap, mae, paired_bootstrap, srocc
from qualivision.evaluation.protocol import (
    BASELINES, CEILING, Clips, Constant, GeneratorLookup, HandCrafted, results_markdown,
    results_table, run_baselines, save_results)
from qualivision.evaluation.plots import plot_curves, plot_rows, plot_scatter, save_figure
from qualivision.quality import DIMENSIONS, MOS_COLUMNS, QualiVisionError


def clips(prompts, seed, dims=8):
    "Every dimension is prompt + generator + one feature of its own + noise."
    rng = np.random.default_rng(seed)
    p, g = np.repeat(np.arange(prompts), 5), np.tile(np.arange(5), prompts)
    hidden = rng.normal(size=(prompts, 5))
    features = rng.normal(size=(5 * prompts, len(HAND_CRAFTED)))
    features[:, HAND_CRAFTED.index("sharpness")] *= 10                    # scales differ
    own = np.stack([features[:, HAND_CRAFTED.index("jitter")], *[features[:, HAND_CRAFTED.index(f)] for f in LOW_LEVEL]], 1)
    own[:, 1] /= 10
    mos = 3 + .4 * hidden[p] + .3 * np.linspace(-1, 1, 5)[g][:, None] + .5 * own + .2 * rng.normal(size=(5 * prompts, 5))
    text = (hidden @ np.random.default_rng(7).normal(size=(5, dims)))[p]
    frame = pd.DataFrame(np.clip((mos * 3).round() / 3, 1, 5), columns=list(MOS_COLUMNS))
    frame = frame.assign(video_name=[f"{'ABCDE'[i]}_{j + 1000 * seed:05d}.mp4" for i, j in zip(g, p)], Prompt=[f"{seed} prompt {j}" for j in p])
    return Clips(frame, text, pd.DataFrame(features, columns=list(HAND_CRAFTED)))


@pytest.fixture(scope="module")
def split(): return clips(40, 1), clips(24, 2)


@pytest.fixture(scope="module")
def rows(split): return run_baselines(*split)


def test_each_baseline_knows_what_it_may_and_no_more(split, rows):
    train, test = split
    def score(row, d): return srocc(rows[row][:, d], test.mos[:, d])
    assert np.array_equal(rows["constant"], np.tile(train.mos.mean(0), (120, 1)))
    for i, g in enumerate("ABCDE"):
        assert np.allclose(rows["generator"][i::5], train.mos[[n[0] == g for n in train.frame.video_name]].mean(0))
    assert all(len(np.unique(rows["text"][5 * k:5 * k + 5], axis=0)) == 1 for k in range(24))       # ties within a prompt stay ties
    for d in range(5):
        assert score("text_generator", d) > score("text", d) > .3 and score("text_generator", d) > score("generator", d)
    assert all(score("low_level", d) > .45 for d in range(1, 5)) and score("low_level", 0) < .3     # jitter is not among the four
    assert all(score("hand_crafted", d) > .45 for d in range(5))


def test_baselines_ignore_the_labels_and_order_of_the_test_set(split, rows):
    train, test = split
    order = np.random.default_rng(0).permutation(len(test))
    blind = Clips(test.frame.iloc[order].assign(**dict.fromkeys(MOS_COLUMNS, 1.0)), test.text[order], test.features.iloc[order])
    for name, pred in run_baselines(train, blind, [b for b in BASELINES if b != "hand_crafted"]).items():
        np.testing.assert_allclose(pred, rows[name][order], atol=2e-6, err_msg=name)
    forest, again = HandCrafted(trees=20).fit(train), HandCrafted(trees=20).fit(train)
    np.testing.assert_array_equal(forest.predict(blind), forest.predict(test)[order])
    np.testing.assert_array_equal(forest.predict(test), again.predict(test))


def test_clips_of_one_prompt_stay_tied():
    "A product with 384 columns may differ in the last bit from row to row; ties broken by chance would move SROCC."
    train, test = clips(40, 1, dims=384), clips(40, 2, dims=384)
    for n in (200, 199, 123, 7):
        pred = run_baselines(train, Clips(test.frame[:n], test.text[:n]), ["text"])["text"]
        assert [len(np.unique(column)) for column in pred.T] == [-(-n // 5)] * 5


def test_the_ridge_chooses_its_strength(split):
    "With noise for an embedding the strongest pull wins; with a clean one a weak pull does."
    from qualivision.evaluation.protocol import GroupedRidge
    train, _ = split
    noise = Clips(train.frame, np.random.default_rng(3).normal(size=(40, 300))[np.repeat(np.arange(40), 5)])
    ridge = GroupedRidge(lambda c: c.known("text"))
    assert (ridge.fit(noise).alpha >= 1e3).all() and (GroupedRidge(lambda c: c.known("text")).fit(train).alpha <= 1e3).all()


def test_leaks_and_holes_are_errors(split):
    train, test = split
    with pytest.raises(MetricError, match="40 prompts are in training and test"): run_baselines(train, train)
    mixed = Clips(test.frame.assign(Prompt=["1 prompt 3", *test.frame.Prompt[1:]]), test.text, test.features)
    with pytest.raises(MetricError, match="1 prompts are in training and test"): run_baselines(train, mixed)
    with pytest.raises(MetricError, match="by kling"): GeneratorLookup().fit(train).predict(Clips(test.frame.assign(video_name="kling_1.mp4")))
    with pytest.raises(MetricError, match="without text"): run_baselines(Clips(train.frame), test, ["text"])
    with pytest.raises(MetricError, match="not finite"): run_baselines(Clips(train.frame, train.text * np.nan), test, ["text"])
    with pytest.raises(MetricError, match="shape"): run_baselines(Clips(train.frame, train.text[:-1]), test, ["text"])
    with pytest.raises(MetricError, match="not finite"): results_table({"dover": np.full((120, 5), np.nan)}, test.mos, test.groups)
    with pytest.raises(MetricError, match="no row of the model"): results_table({"text": test.mos}, test.mos, test.groups)


@pytest.fixture(scope="module")
def results(split, rows):
    _, test = split
    model = test.mos + .4 * np.random.default_rng(0).normal(size=test.mos.shape)
    second = test.mos + .8 * np.random.default_rng(1).normal(size=test.mos.shape)
    every = {"dover": model, "vjepa2": second, **rows, CEILING: test.mos + .1 * np.random.default_rng(2).normal(size=test.mos.shape)}
    return every, results_table(every, test.mos, test.groups, models=("dover", "vjepa2"), n=200)


def test_table_holds_the_numbers_of_the_metrics(split, results):
    (_, test), (every, table) = split, results
    assert list(table) == [*every, "differences"]
    assert {m: list(d) for m, d in table["differences"].items()} == {"dover": list(BASELINES), "vjepa2": ["dover", *BASELINES]}
    for k, d in enumerate(DIMENSIONS):
        p, b, t = every["dover"][:, k], every["text"][:, k], test.mos[:, k]
        cell = table["dover"][d]
        assert list(cell) == ["srocc", "plcc", "mae", "rmse", "n"] and cell["n"] == 120
        low, high = bootstrap(p, t, test.groups, ["srocc"], n=200)["srocc"]
        assert cell["srocc"] == {"value": round(srocc(p, t), 6), "low": round(low, 6), "high": round(high, 6)}
        expected = [round(v, 6) for v in paired_bootstrap(p, b, t, test.groups, ["mae"], n=200)["mae"]]
        assert list(table["differences"]["dover"]["text"][d]["mae"].values()) == expected
        assert table["ceiling"][d]["srocc"]["value"] > table["dover"][d]["srocc"]["value"] > table["vjepa2"][d]["srocc"]["value"]


def test_a_constant_has_errors_and_no_correlation(split, results):
    (train, test), (_, table) = split, results
    for k, d in enumerate(DIMENSIONS):
        for cells in (table["constant"][d], table["differences"]["dover"]["constant"][d]):
            for m in ("srocc", "plcc"):
                assert cells[m]["value"] is cells[m]["low"] is cells[m]["high"] is None and "constant" in cells[m]["reason"]
            assert cells["mae"]["low"] <= cells["mae"]["value"] <= cells["mae"]["high"]
        assert table["constant"][d]["mae"]["value"] == round(mae(np.full(120, Constant().fit(train).mean[k]), test.mos[:, k]), 6)


def test_same_results_same_bytes(split, results, tmp_path):
    (_, test), (every, table) = split, results
    save_results(table, tmp_path / "a.json")
    save_results(results_table(every, test.mos, test.groups, models=("dover", "vjepa2"), n=200), tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text()) == table
    history = pd.DataFrame({"epoch": [1, 2], "loss": [1.0, .5]})
    figures = {"rows": lambda: plot_rows(table), "scatter": lambda: plot_scatter(every["dover"], test.mos, test.generators),
               "curves": lambda: plot_curves(history, {"loss": ["loss"]})}
    for name, draw in figures.items():
        for copy in "ab": save_figure(draw(), tmp_path / f"{name}_{copy}.png", dpi=60)
        assert (tmp_path / f"{name}_a.png").read_bytes() == (tmp_path / f"{name}_b.png").read_bytes()
        assert b"Software" not in (tmp_path / f"{name}_a.png").read_bytes()
    with pytest.raises(MetricError, match="val_loss"): plot_curves(history, {"loss": ["loss", "val_loss"]})


def test_markdown_marks_what_is_proven(results):
    _, table = results
    text = results_markdown(table, metrics=("srocc", "mae"))
    lines = text.splitlines()
    assert len([x for x in lines if x.startswith("| noise ceiling")]) == 2 and len([x for x in lines if x.startswith("| text only")]) == 6
    row = next(x for x in lines if x.startswith("| constant"))
    assert row.count("–") == 5
    after = lines[lines.index(next(x for x in lines if x.startswith("| SROCC: DOVER++ minus"))):]
    cells = next(x for x in after if x.startswith("| generator lookup")).split("|")[2:-1]
    for cell, d in zip(cells, DIMENSIONS): assert ("**" in cell) == (table["differences"]["dover"]["generator"][d]["srocc"]["low"] > 0)
    after = lines[lines.index(next(x for x in lines if x.startswith("| MAE: DOVER++ minus"))):]
    cells = next(x for x in after if x.startswith("| constant")).split("|")[2:-1]
    assert all(c.strip().startswith("**-") for c in cells)                # a smaller error is better


def moving(T=20, seed=0):
    rng = np.random.default_rng(seed)
    picture = rng.integers(40, 200, (12, 12, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    return np.stack([np.roll(picture, t, 1) for t in range(T)])


def test_features_of_files_in_any_number_of_processes(tmp_path):
    for k in range(3): write_video(tmp_path / f"{k}.mp4", moving(seed=k))
    paths = [tmp_path / f"{k}.mp4" for k in (2, 0, 1)]
    table = feature_table(paths)
    assert list(table.columns) == list(HAND_CRAFTED) and list(table.index) == [str(p) for p in paths] and set(LOW_LEVEL) < set(table.columns)
    assert np.isfinite(table.to_numpy()).all()
    pd.testing.assert_frame_equal(table, feature_table(paths, workers=2))
    with pytest.raises(QualiVisionError, match="gone.mp4"): feature_table([tmp_path / "gone.mp4"])


def test_features_have_known_values():
    still = np.repeat(moving(1), 5, 0)
    f = clip_features(still)
    for name in ("frame_difference", "flicker", "moved", "shift", "jitter", "second_difference"): assert abs(f[name]) < 1e-6, name
    assert f["frozen"] == f["longest_freeze"] == 1
    f = clip_features(moving())
    assert abs(f["shift"] - 1) < .25 and f["jitter"] < .25 and f["frozen"] == 0
    lit = np.clip(moving().astype(int) + 10 * (-1) ** np.arange(20)[:, None, None, None], 0, 255).astype(np.uint8)
    assert abs(clip_features(lit)["flicker"] * 255 - 20) < .1             # ±10 every frame: differences of ±20
    for bad in (still[:2], still[..., 0], still.astype(np.float32), still[:, :8]):
        with pytest.raises(QualiVisionError, match="Give at least 3"): clip_features(bad)


def test_heavy_libraries_are_loaded_when_used():
    code = "import sys, qualivision.evaluation.protocol; print([m for m in ('sklearn', 'seaborn', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
