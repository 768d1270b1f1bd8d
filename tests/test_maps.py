"Maps and gMAD: what a cell looked at, that cells add up to the score, the files, and the commands on real weights' form."
import errno
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from qualivision.cli import app
from qualivision.official.views import DOVER_VIEWS, dover_views, view_indices
from qualivision.data.video import frame_times, probe, read_frames
from qualivision.data.container import write_video
from qualivision.official.gmad import PairError, gmad_pairs
from qualivision.official.maps import (
    MapError, ScoreMaps, at_frame, cell_boxes, divergence, draw_moments, draw_times, overlay, patch_boxes, region_table, score_maps,
    shrink, standardised, time_table, unseen, write_maps)
from qualivision.evaluation.ranks import read_sets
from qualivision.files import FileError
from qualivision.official.scorer import NETWORKS
from weights_formula import fill

FILES = {"times.csv", "regions.csv", "times.png", "divergence.png", "divergence.mp4"}


class Brightness(nn.Module):
    "A model whose map is the mean brightness of what each cell looked at."
    views = ("technical", "aesthetic")

    def forward(self, views): return {name: F.avg_pool3d(x.mean(1, keepdim=True), (2, 32, 32)) for name, x in views.items()}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    "80 frames of 252×392: brightness grows with time, from left to right, and from the top down."
    t, y, x = np.mgrid[:80, :252, :392]
    frames = np.repeat((t * 1.5 + y * .25 + x * .15)[..., None], 3, -1).astype(np.uint8)
    return write_video(tmp_path_factory.mktemp("video")/"ramp.mp4", frames, fps=20, crf=4)


def call(*args):
    r = CliRunner().invoke(app, [*map(str, args)])
    assert r.exception is None or isinstance(r.exception, SystemExit), r.exception
    return r.exit_code, json.loads(r.stdout) if "--json" in args and r.stdout else r.stdout, r.stderr


@pytest.mark.parametrize("size", [(270, 480), (720, 406), (120, 160), (224, 224)])
def test_boxes_are_where_the_patches_were_cut(size):
    "The view holds those pixels; where the frame was enlarged, those pixels enlarged."
    frames = np.random.default_rng(0).integers(0, 256, (70, *size, 3), dtype=np.uint8)
    if min(size) < 224: frames = np.kron(frames[:, ::20, ::20], np.ones((1, 20, 20, 1), np.uint8))[:, :size[0], :size[1]]
    view, boxes = dover_views(frames, seed=5, raw=True)["technical"], patch_boxes(size, 5)
    taken = view_indices(DOVER_VIEWS, len(frames), 5)["technical"]
    assert (boxes >= 0).all() and boxes[..., 2].max() <= size[0] and boxes[..., 3].max() <= size[1]
    for k, i, j in ((0, 0, 0), (33, 6, 6), (70, 3, 1), (95, 0, 6)):
        patch = view[k, :, 32 * i:32 * i + 32, 32 * j:32 * j + 32].permute(1, 2, 0).numpy()
        top, left, bottom, right = boxes[k // 32, i, j]
        cut = frames[taken[k]][round(top):round(bottom), round(left):round(right)]
        if min(size) >= 224: assert np.array_equal(patch, cut)
        else: assert np.abs(patch.mean((0, 1)) - cut.mean((0, 1))).max() < 12, "blocks of 20 pixels, cut at most a pixel off"
    assert not np.array_equal(patch_boxes(size, 5), patch_boxes(size, 6)) or size == (224, 224)


def test_a_cell_speaks_for_its_frames_and_pixels(video):
    "Brightness at the middle of the box, at the mean of the two frames: to a grey level or two."
    maps, frames = score_maps(Brightness(), video, seed=1), read_frames(video, range(80)).astype(float)
    std = np.mean(DOVER_VIEWS[0].std)
    for name in maps.scores:
        for k, i, j in ((0, 0, 0), (7, 3, 6), (15, 6, 1), (-1, 6, 6)):
            top, left, bottom, right = maps.boxes[name][k, i, j].round().astype(int)
            seen = np.mean([(frames[f, top:bottom, left:right].mean((0, 1)) - DOVER_VIEWS[0].mean).mean() for f in maps.frames[name][k]])
            assert abs(seen - maps.scores[name][k, i, j] * std) < 2, (name, k, i, j)
    assert maps.count == 80 and np.allclose(maps.edges, np.arange(81) / 20) and maps.size == (252, 392)


def test_tables_add_up_to_the_score(video):
    model = fill(tiny.Mobile())
    maps = score_maps(model, video)
    with torch.no_grad(): expected = {name: m.double().mean().item() for name, m in model(dover_views(video)).items()}
    for table in (time_table(maps), region_table(maps)):
        means = table.groupby("view").score.mean()
        for name in expected: assert abs(means[name] - expected[name]) < 1e-9 and abs(maps.score(name) - expected[name]) < 1e-9
    times = time_table(maps)
    assert np.allclose(times.seconds, times.frame / 20) and times.groupby(["view", "clip"]).size().to_dict() == {
        ("aesthetic", 0): 16, ("technical", 0): 16, ("technical", 1): 16, ("technical", 2): 16}
    last = region_table(maps).iloc[48]
    assert (last["row"], last["column"], last["slot"]) == (6, 6, 0) and last["score"] == maps.scores["technical"][0, 6, 6]


def test_divergence(video):
    maps = score_maps(Brightness(), video)
    own = standardised(maps)
    for x in own.values(): assert abs(x.mean()) < 1e-12 and abs(x.std() - 1) < 1e-12
    at = {name: at_frame(own[name], maps.frames[name], 0) for name in own}
    assert np.allclose(divergence(maps, 0), at["aesthetic"] - at["technical"])
    reference = read_sets()[0]
    d = reference.branches["technical"]
    assert np.allclose(standardised(maps, reference)["technical"], (maps.scores["technical"] - d.mean) / d.std)
    flat = type(maps)({k: 0 * v + 3 for k, v in maps.scores.items()}, maps.frames, maps.boxes, maps.edges, maps.size)
    with pytest.raises(MapError, match="all of its cells are equal"): standardised(flat)
    standardised(flat, reference)


def test_nearest_slot():
    frames = np.array([[0, 2], [4, 6], [4, 46], [46, 0]])
    values = np.array([1., 2, 4, 8])
    for frame, mean in ((0, 4.5), (4, 3), (30, 6), (3, 7/3)): assert at_frame(values, frames, frame) == mean


def test_overlay():
    frame, values = np.full((70, 141, 3), 100, np.uint8), np.zeros((7, 7))
    assert (overlay(frame, values) == 160).all(), "at zero there is no colour, 100 + 0.6·100"
    values[2, 6], values[6, 0], values[0, 0] = 9, -9, 1
    painted = overlay(frame, values).astype(int)
    red, blue, weak = painted[25, 135], painted[65, 5], painted[5, 5]
    assert red[0] > red[2] and blue[2] > blue[0] and 0 < np.abs(weak - 160).max() < np.abs(red - 160).max()
    changed = (painted != 160).any(-1)
    assert changed[20:30, 121:].all() and changed.sum() == 10 * (20 + 21 + 21), "three blocks, and nothing beside them"
    assert shrink(frame, 640).shape == (70, 140, 3) and shrink(frame, 50).shape == (24, 50, 3)
    assert (cell_boxes((70, 141))[0, 6] == [0, 6 * 141 / 7, 10, 141]).all()


def test_stretches_that_nobody_saw():
    "Against a count of the frames that lie within a step of one that was looked at."
    for n in (1, 20, 31, 48, 80, 100, 200, 333, 1000):
        taken = view_indices(DOVER_VIEWS, n, seed=n)
        maps = ScoreMaps({}, {name: i.reshape(-1, 2) for name, i in taken.items()}, {}, np.arange(n + 1) / 25, (10, 10))
        for name, step in (("technical", 2), ("aesthetic", max(1, n // 32))):
            near = np.abs(np.arange(n)[:, None] - taken[name]).min(1) < step
            left = {f for a, b in unseen(maps, name) for f in range(a, b + 1)}
            assert all(0 <= a <= b < n for a, b in unseen(maps, name))
            assert not left & set(taken[name].tolist()) and len(left ^ set(np.flatnonzero(~near).tolist())) <= 2 * step, (n, name)


def test_film_says_where_a_view_saw_nothing(tmp_path):
    frames = np.full((300, 224, 224, 3), 90, np.uint8)
    frames[:, ::2] += np.arange(300, dtype=np.uint8)[:, None, None, None] // 4
    clip = write_video(tmp_path/"long.mp4", frames, fps=30, crf=8)
    write_maps(Brightness(), clip, tmp_path/"out", most=60)
    bar = read_frames(tmp_path/"out"/"divergence.mp4", range(60))[:, -3:].mean((1, 2, 3)) > 128
    blank = unseen(score_maps(Brightness(), clip), "technical")
    shown = np.linspace(0, 299, 60).astype(int)
    assert 10 < bar.sum() < 50 and (bar == [not any(a <= n <= b for a, b in blank) for n in shown]).all()


def test_times_are_those_of_the_frames(tmp_path):
    "Fast, then slow, then a still of four seconds: tables, pictures and film say when a frame is shown, not its number by the mean rate."
    edges = np.concatenate([np.arange(60) * .04, 2.4 + np.arange(20) * .3, [8.4, 12.4]])
    frames = np.random.default_rng(0).integers(0, 256, (len(edges) - 1, 224, 224, 3), dtype=np.uint8)
    clip = write_video(tmp_path/"uneven.mp4", frames, times=edges, preset="ultrafast")
    maps = score_maps(Brightness(), clip)
    assert np.allclose(maps.edges, edges, atol=1e-4)
    for table in (time_table(maps), region_table(maps)): assert np.allclose(table.seconds, edges[table.frame], atol=1e-4)
    times, rows = draw_times(maps).axes, time_table(maps)
    for ax, name in zip(times, ("technical", "aesthetic")):
        dots = np.concatenate([c.get_offsets()[:, 0] for c in ax.collections])
        assert sorted(dots) == sorted(rows.seconds[rows["view"] == name]) and ax.get_xlim() == pytest.approx((0, 12.4))
        grey = [(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches]
        assert np.ravel(grey) == pytest.approx(np.ravel([(edges[a], edges[b + 1]) for a, b in unseen(maps, name)]), abs=1e-4)
    labels = [ax.get_ylabel() for ax in draw_moments(maps, frames[[10, 70]], [10, 70]).axes[:8:4]]
    assert labels == [f"{edges[10]:.2f} s", f"{edges[70]:.2f} s"]
    for most in (96, 30):
        film = write_maps(Brightness(), clip, tmp_path/"out", most=most)["files"]["divergence.mp4"]
        shown = np.linspace(0, 80, min(81, most)).astype(int)
        assert np.allclose(frame_times(film), edges[shown], atol=1e-3) and probe(film).duration == pytest.approx(12.4, abs=1e-3)


def test_two_frames_at_one_time(video, tmp_path, monkeypatch):
    "What some broken files say: the second one comes a moment later, and the film can be written."
    times = frame_times(video)
    times[41], times[-1] = times[40], times[-2]
    monkeypatch.setattr("qualivision.official.maps.frame_times", lambda path: times)
    made = write_maps(Brightness(), video, tmp_path/"out")
    assert 0 < np.diff(frame_times(made["files"]["divergence.mp4"])).min() < 1e-3


def test_one_frame_has_no_time(tmp_path):
    one = write_video(tmp_path/"one.mp4", np.zeros((1, 224, 224, 3), np.uint8))
    with pytest.raises(MapError, match="one frame.*qualivision dover"): score_maps(Brightness(), one)


def test_a_folder_that_cannot_be_written(video, tmp_path, monkeypatch):
    "Told before the model runs; and where it shows only while writing, none of the five files is left, and the error is the first one."
    class Never(Brightness):
        def forward(self, views): raise AssertionError("the model ran")
    (tmp_path/"file").touch()
    with pytest.raises(FileError, match="times.csv.*nothing can be written in"): write_maps(Never(), video, tmp_path/"file"/"out")
    (tmp_path/"taken"/"divergence.mp4").mkdir(parents=True)
    with pytest.raises(FileError, match="divergence.mp4: it is a folder"): write_maps(Never(), video, tmp_path/"taken")
    for what, number in ((("os.replace",), errno.EROFS), (("qualivision.official.maps.write_video",), errno.ENOSPC)):
        with monkeypatch.context() as patch:
            def no(*args, number=number, **kwargs): raise OSError(number, os.strerror(number), str(args[0]))
            patch.setattr(*what, no)
            patch.setattr("pathlib.Path.unlink", no)                                     # a place that takes nothing takes no cleaning up
            with pytest.raises(FileError, match=os.strerror(number)) as found: write_maps(Brightness(), video, tmp_path/"out")
        assert "tmp" not in Path(found.value.what).name and not set(found.value.what.split("/")[-1:]) - FILES
        for left in (tmp_path/"out").iterdir():
            assert left.name.startswith(".")
            left.unlink()


def test_refused(video, tmp_path):
    with pytest.raises(MapError, match="DOVER"): score_maps(nn.Linear(1, 1), video)
    class Broken(Brightness):
        def forward(self, views): return {k: v / 0 for k, v in super().forward(views).items()}
    with pytest.raises(MapError, match="NaN"): write_maps(Broken(), video, tmp_path/"out")
    assert not (tmp_path/"out").exists()
    with pytest.raises(MapError, match="no frame"): write_maps(Brightness(), video, tmp_path, moments=0)


def test_command(video, tmp_path, monkeypatch):
    "The files are there and the same on a second run; a seed moves them; scores are those of the model, here a small one of its form."
    monkeypatch.setitem(NETWORKS, "dover-mobile", tiny.Mobile)
    torch.save(fill(tiny.Mobile()).state_dict(), tmp_path/"mobile.pth")
    made = {}
    for out, more in (("a", ["--model", "dover-mobile"]), ("b", ["--mobile"])):
        status, made[out], err = call("maps", video, *more, "--weights", tmp_path/"mobile.pth", "--out", tmp_path/out, "--device", "cpu", "--json")
        assert status == 0, err
    a, b = made["a"], made["b"]
    assert set(a["files"]) == FILES and a["scores"] == b["scores"]
    for name in a["files"]: assert (tmp_path/"a"/name).read_bytes() == (tmp_path/"b"/name).read_bytes(), name
    info = probe(tmp_path/"a"/"divergence.mp4")
    assert (info.frames, info.fps, info.width, info.height) == (80, 20, 392, 252)
    assert abs(pd.read_csv(tmp_path/"a"/"times.csv").groupby("view").score.mean()["technical"] - a["scores"]["technical"]) < 1e-9
    other = call("maps", video, "--mobile", "--weights", tmp_path/"mobile.pth", "--out", tmp_path/"d", "--device", "cpu", "--seed", 3, "--json")[1]
    assert other["seed"] == 3 and other["scores"]["technical"] != a["scores"]["technical"]
    assert (tmp_path/"d"/"divergence.png").read_bytes() != (tmp_path/"a"/"divergence.png").read_bytes()
    status, answer, _ = call("maps", tmp_path/"gone.mp4", "--mobile", "--weights", tmp_path/"mobile.pth", "--out", tmp_path/"c", "--json")
    assert status == 1 and "no such file" in answer["error"] and not (tmp_path/"c").exists()
    assert call("maps", video, "--model", "cover", "--out", tmp_path)[0] == 2


def test_pairs_against_all_pairs():
    "The fast search finds what trying every pair finds."
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"path": [f"v{i}" for i in range(60)], "p": rng.normal(size=60).round(1), "q": rng.normal(size=60)})
    found = gmad_pairs(table, "p", "q", pairs=3, tolerance=.2)
    for defender, attacker in (("p", "q"), ("q", "p")):
        d, a = table[defender].to_numpy(), table[attacker].to_numpy()
        rows = found[found.defender == defender]
        for r, part in zip(rows.itertuples(), np.array_split(np.argsort(d, kind="stable"), 3), strict=True):
            best = max(a[i] - a[j] for i in part for j in part if abs(d[i] - d[j]) <= .2 * d.std())
            assert np.isclose(r.gap, best / a.std()) and np.isclose(r.attacker_better - r.attacker_worse, best)
            at = {v: k for k, v in enumerate(table.path)}
            assert (a[at[r.better]], a[at[r.worse]], d[at[r.better]]) == (r.attacker_better, r.attacker_worse, r.defender_better)


def test_what_cannot_be_paired():
    table = pd.DataFrame({"video": list("abcd"), "p": [0., 1, 2, 3], "q": [1., 2, 1, 2], "flat": 1., "nan": [1, np.nan, 2, 3]})
    for args, said in (((table, "p", "r"), "no such column"), ((table, "p", "p"), "itself"), ((table, "p", "flat", 2), "all scores are equal"),
                       ((table, "p", "nan", 2), "1 of 4"), ((table, "p", "q", 3), "3 pairs of 4"), ((table, "p", "q", 0), "at least one")):
        with pytest.raises(PairError, match=said): gmad_pairs(*args)
    with pytest.raises(PairError, match="tolerance"): gmad_pairs(table.assign(q=[0, 10, 20, 31]), "p", "q", 2)


def test_gmad_command(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"video": [f"{i:03}" for i in range(40)], "a": rng.normal(size=40), "b": rng.normal(size=40), "error": None}, dtype=object)
    table.loc[3, ["a", "b", "error"]] = [None, None, "gone"]
    table.to_csv(tmp_path/"scores.csv", index=False)
    status, answer, err = call("gmad", tmp_path/"scores.csv", "--first", "a", "--second", "b", "--pairs", 2, "--out", tmp_path/"pairs.csv", "--json")
    assert status == 0 and answer["left_out"] == 1 and len(answer["pairs"]) == 4, err
    written = pd.read_csv(tmp_path/"pairs.csv", dtype={"better": str, "worse": str})
    assert written.better.tolist() == [p["better"] for p in answer["pairs"]] and "003" not in set(written.better) | set(written.worse)
    status, text, _ = call("gmad", tmp_path/"scores.csv", "--first", "a", "--second", "b", "--pairs", 2)
    assert status == 0 and answer["pairs"][0]["better"] in text
    assert call("gmad", tmp_path/"scores.csv", "--first", "a", "--second", "c", "--json")[0] == 1


def test_gmad_of_two_files(tmp_path):
    "What two runs of score-set wrote: other names of columns, another order, rows of one file only, rows with an error."
    rng = np.random.default_rng(1)
    names, a, b = [f"{i:03}.mp4" for i in range(30)], rng.normal(size=30).round(1), rng.normal(size=30)
    error = pd.Series([None] * 30, dtype=object)
    error[4] = "gone"
    one = pd.DataFrame({"video": names, "overall": a, "error": error})
    one.loc[4, "overall"] = np.nan
    one.to_csv(tmp_path/"one.csv", index=False)
    two = pd.DataFrame({"Filename": names, "overall": b}).iloc[::-1]
    two[two.Filename != "007.mp4"].to_csv(tmp_path/"two.csv", index=False)
    args = tmp_path/"one.csv", "--first", "overall", "--second", "overall", "--pairs", 2, "--json"
    status, answer, err = call("gmad", *args, "--other", tmp_path/"two.csv")
    assert status == 0 and answer["left_out"] == 2 and "by both" in err
    due = gmad_pairs(pd.DataFrame({"video": names, "one: overall": a, "two: overall": b}).drop([4, 7]), "one: overall", "two: overall", 2)
    assert answer["pairs"] == due.to_dict("records") and due.defender.tolist()[0] == "one: overall"
    two.assign(Filename="x").head(2).to_csv(tmp_path/"twice.csv", index=False)
    two.assign(Filename=two.Filename + "x").to_csv(tmp_path/"strange.csv", index=False)
    two.drop(columns="Filename").to_csv(tmp_path/"nameless.csv", index=False)
    for name, said in (("twice", "x is there twice"), ("strange", "no video of one.csv"), ("nameless", "no column video or"), ("gone", "gone.csv")):
        status, answer, _ = call("gmad", *args, "--other", tmp_path/f"{name}.csv")
        assert status == 1 and said in answer["error"], answer
    assert "cannot compete with itself" in call("gmad", *args)[1]["error"]
