"The frames model on opinions of one's own: figures of prompts that were not seen, a checkpoint that scores, and what is refused."
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from qualivision.cli import app
from qualivision.evaluation.conformal import half_width
from qualivision.evaluation.protocol import figure, held_out, siblings
from qualivision.models import frames_mos
from qualivision.models.five_mos import on_scale
from qualivision.models.frames_mos import FramesMos, logit_of
from qualivision.models.weights import load_checkpoint
from qualivision.toy import toy_clip, toy_prompt
from qualivision.training import own


class Colours(nn.Module):
    "A tower that sees the mean colour of a frame and nothing else."
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for name, width in {"features": 1280, "logits": 1000, **{f"stage{k}": 16 for k in range(7)}}.items():
            self.register_buffer(name, torch.randn(3, width, generator=g))

    def forward(self, frames) -> dict:
        colour = frames.float().mean((2, 3)) / 64                  # (N,3)
        return {name: colour @ self.get_buffer(name) for name in ("features", "logits", *(f"stage{k}" for k in range(7)))}


@pytest.fixture
def call(tmp_path, monkeypatch):
    "A command among 24 clips of 12 prompts, two by two; Traditional follows the red in them. The tower is a small one."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(frames_mos, "load_tower", lambda name=None: Colours().eval())
    rng, rows = np.random.default_rng(0), []
    for k in range(24):
        colour = rng.integers(20, 236, 3)
        toy_clip(tmp_path/f"{k:02}.mp4", colour)
        red = 1 + 4 * colour[0] / 255
        rows.append((f"{k:02}.mp4", toy_prompt(k % 12), 3, red, 1 + k % 5, "" if k > 11 else 3 + k % 2, red))
    table = pd.DataFrame(rows, columns=["video", "prompt", "raters", "static_quality", "alignment", "temporal", "overall"])
    table.to_csv("mine.csv", index=False)

    def run(*args):
        r = CliRunner().invoke(app, [*map(str, args)])
        assert r.exception is None or isinstance(r.exception, SystemExit), r.exception
        return r.exit_code, json.loads(r.stdout) if "--json" in args and r.stdout else r.stdout, " ".join(r.stderr.split())
    return run


TRANSFER = "transfer", "--model", "frames", "--data", "mine.csv", "--out", "own", "--device", "cpu"


def test_a_few_opinions_make_a_scorer(call, tmp_path):
    "The report, the checkpoint, and the three commands that take it."
    status, report, _ = call(*TRANSFER, "--json")
    found = report["dimensions"]
    assert status == 0 and report["clips"] == 24 and report["prompts"] == 12
    assert {d: v["learned"] for d, v in found.items()} == dict(traditional=True, alignment=True, aesthetic=False, temporal=False, overall=True)
    assert "no opinions" in found["aesthetic"]["reason"] and "12 clips are rated; it takes 20" in found["temporal"]["reason"]
    rows = found["traditional"]["rows"]
    assert rows["frames"]["srocc"] > .8 and rows["frames"]["interval"][0] > .5 and rows["constant"]["srocc"] == 0 and "prompt" in rows
    assert [p["share"] for p in report["curve"]] == [.25, .5, 1.] and report["curve"][2]["srocc"]["traditional"] == rows["frames"]["srocc"]
    assert json.loads((tmp_path/"own"/"report.json").read_text()) == report

    state, meta = load_checkpoint("own")
    FramesMos().load_state_dict(state)
    about = meta["learned_on"]
    assert about["traditional"] == dict(data="mine.csv", raters=3, clips=24, judged="new_prompts", srocc=rows["frames"]["srocc"],
                                        interval=rows["frames"]["interval"])
    assert "scale: mine.csv" in about["alignment"]["data"] and about["aesthetic"] is about["temporal"] is None
    assert state["heads.match.weight"][1] > 0 and not state["heads.picture.weight"][1].any()       # a rising line of the match alone

    red, blue = (200, 30, 30), (30, 30, 200)
    for name, colour in {"red.mp4": red, "blue.mp4": blue}.items(): toy_clip(tmp_path/name, colour)
    status, (r, b), _ = call("score", "red.mp4", "blue.mp4", "--prompt", "a red boat", "--checkpoint", "own", "--device", "cpu", "--json")
    assert status == 0 and r["traditional"] > b["traditional"] + 1 and r["aesthetic"] is r["temporal"] is None and r["reasons"]["temporal"]
    known = meta["intervals"]["dimensions"]
    for d in ("traditional", "alignment", "overall"):         # the errors on prompts that were held out
        assert known[d]["clips"] == 24 and known[d]["prompts"] == 12
        assert r["interval"][d] == pytest.approx([max(1, r[d] - known[d]["half_width"]), min(5, r[d] + known[d]["half_width"])])
    assert known["traditional"]["half_width"] < 1.5 < known["alignment"]["half_width"] and "interval" not in r["reasons"]
    text = " ".join(call("score", "red.mp4", "--prompt", "a red boat", "--checkpoint", "own", "--device", "cpu")[1].split())
    assert "traditional: mine.csv (3 raters a clip); on 24 clips of new prompts: SROCC" in text
    (tmp_path/"set"/"videos").mkdir(parents=True)
    (tmp_path/"red.mp4").rename(tmp_path/"set"/"videos"/"red.mp4")
    (tmp_path/"set"/"labels.csv").write_text("video,prompt\nred.mp4,a red boat\n")
    assert call("predict", "--data", "set", "--out", "p.csv", "--checkpoint", "own", "--device", "cpu")[0] == 0
    assert pd.read_csv("p.csv").Traditional_MOS[0] == pytest.approx(r["traditional"], abs=1e-3)
    assert call("score-set", "set/labels.csv", "--model", "qualivision", "--out", "s.csv", "--checkpoint", "own", "--device", "cpu")[0] == 0
    assert pd.read_csv("s.csv").Traditional_MOS[0] == pytest.approx(r["traditional"], abs=1e-3)


def test_what_is_refused(call):
    "Too few clips, too few prompts, opinions off the scale, options that would be ignored."
    table = pd.read_csv("mine.csv")
    table.iloc[:19].to_csv("mine.csv", index=False)
    status, _, err = call(*TRANSFER)
    assert status == 1 and "19 clips are rated; it takes 20" in err and "Rate 20 clips or more" in err
    table.assign(prompt="a red boat").to_csv("mine.csv", index=False)
    assert "of 1 prompts. Rate clips of 5 prompts or more" in call(*TRANSFER)[2]
    table.assign(overall=20 * table.overall).to_csv("mine.csv", index=False)
    status, _, err = call(*TRANSFER)
    assert status == 1 and "not from 1 to 5" in err and "--scale 0-100" in err and "line 2" in err
    table.rename(columns={"video": "what"}).to_csv("mine.csv", index=False)
    assert "no column of videos" in call(*TRANSFER)[2]
    for option in ("--epochs 3", "--end-to-end", "--fresh-heads", "--set KoNViD-1k"):
        status, _, err = call(*TRANSFER, *option.split())
        assert status == 2 and option.split()[0] in err and "closed form" in err


def test_without_prompts(call):
    "Each clip stands alone; Alignment is null with the reason, and Overall does not ask the match."
    table = pd.read_csv("mine.csv").drop(columns=["prompt", "raters"])
    percent = {c: 25 * (table[c] - 1) for c in ("overall", "static_quality")}
    table.assign(**percent, alignment=50, temporal=50).to_csv("mine.csv", index=False)
    status, report, _ = call(*TRANSFER, "--scale", "0-100", "--json")
    assert status == 0 and report["prompts"] == 0 and report["learned_on"]["overall"]["raters"] is None and "0–100" in report["trained_on"]
    assert report["dimensions"]["temporal"]["reason"] == "all opinions on it are the same"
    assert report["dimensions"]["overall"]["rows"]["frames"]["srocc"] > .8 and not load_checkpoint("own")[0]["heads.match.weight"].any()
    table.assign(alignment=table.alignment).to_csv("mine.csv", index=False)
    assert call(*TRANSFER, "--json")[1]["dimensions"]["alignment"]["reason"] == "the data do not name the prompts"


def test_a_prompts_clips_stay_together():
    "Opinions that hang on the prompt alone, and features that name it: siblings know all, a figure on new prompts is chance."
    rng, g = np.random.default_rng(0), torch.Generator().manual_seed(0)
    prompts = np.repeat(np.arange(40).astype(str), 4)
    mos = torch.full((160, 5), torch.nan, dtype=torch.float64)
    mos[:, 0] = torch.from_numpy(np.repeat(rng.uniform(1, 5, 40), 4))
    known = {k: torch.randn(40, w, generator=g).repeat_interleave(4, 0) for k, w in dict(picture=1280, change=48, words=384).items()}
    y, text, model = mos[:, 0].numpy(), torch.randn(40, 384, generator=g).repeat_interleave(4, 0), FramesMos().eval()
    assert figure(siblings(y, prompts), y, prompts, 50)["srocc"] == 1
    assert abs(figure(held_out(model, known, text, mos, prompts)[0][:, 0], y, prompts, 50)["srocc"]) < .35
    alone = np.arange(160).astype(str)
    assert figure(held_out(model, known, text, mos, alone)[0][:, 0], y, alone, 50)["srocc"] > .9        # what a split by clip would claim


def test_a_constant_is_no_skill():
    "Without anything to see, left-out means do not pull the figure below zero: all scores are equal, so it is undefined."
    g = torch.Generator().manual_seed(0)
    known = dict(picture=torch.ones(40, 1280), change=torch.ones(40, 48), words=torch.ones(40, 384))
    mos = torch.full((40, 5), torch.nan, dtype=torch.float64)
    mos[:, 0] = 1 + 4 * torch.rand(40, generator=g)
    prompts = np.arange(40).astype(str)
    x = held_out(FramesMos().eval(), known, torch.ones(40, 384), mos, prompts)[0][:, 0]
    assert np.ptp(x) < 1e-5


def test_an_interval_owes_nothing_to_the_clips_it_is_judged_by(call, monkeypatch):
    "Five prompts, heads that see nothing: a prompt's clips get the mean of the other four's, and miss by 5/4 of what the mean of all would."
    known = dict(picture=torch.ones(40, 1280), change=torch.ones(40, 48), words=torch.ones(40, 384))
    monkeypatch.setattr(own, "known_clips", lambda *a, **k: known)
    kinds, files = np.arange(40) % 5, [Path(f"{k}.mp4") for k in range(40)]
    for file in files: file.touch()
    mine = pd.DataFrame({"video": files, "prompt": [toy_prompt(k % 5) for k in range(40)]})
    said = np.array([2.6, 2.8, 3., 3.2, 3.4])[kinds]
    mine.assign(overall=said, alignment=said).to_csv("mine.csv", index=False)
    call(*TRANSFER)
    def told(x): return float(on_scale(logit_of(torch.tensor(x)).mean()))
    honest, leaky = (half_width(np.abs(said - [told(said[rows]) for rows in shown]))
                     for shown in ([kinds != k for k in kinds], [kinds >= 0] * 40))
    found = load_checkpoint("own")[1]["intervals"]["dimensions"]
    assert honest > 1.2 * leaky and all(found[d]["half_width"] == pytest.approx(honest, abs=1e-4) for d in ("alignment", "overall"))

    one = np.arange(40) < 20                    # Alignment and Overall are rated on one prompt alone
    few = {d: np.where(one, said, np.nan) for d in ("alignment", "overall")}
    mine.assign(prompt=np.where(one, "snow", mine.prompt), traditional=said, **few).to_csv("mine.csv", index=False)
    status, text, _ = call(*TRANSFER)
    meta = load_checkpoint("own")[1]
    found = meta["intervals"]["dimensions"]
    assert status == 0 and "SROCC undefined" in text and all(meta["learned_on"][d] for d in few) and found["traditional"]["clips"] == 40
    assert all("no opinions" in found[d]["reason"] for d in few)
