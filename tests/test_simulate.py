"The embedded data set: every byte as pinned, labels as planned, no prompt in two splits, and a simulator that repeats itself."
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from qualivision.data.draw import CAUSES, clean
from qualivision.data.simulate import (
    LABELS, SEED, SPLITS, causes_table, labels, plan, plan_clip, simulate)
from qualivision.data.video import probe, read_frames

ROOT = Path(__file__).resolve().parents[1]
STORE = ROOT/"dvcstore"/"files"/"md5"


@pytest.fixture(scope="module")
def clips(): return plan()


def stored() -> dict[str, Path]:
    "{path under data/: its object in the embedded remote}, from data.dvc: what a fresh clone restores."
    top = yaml.safe_load((ROOT/"data.dvc").read_text())["outs"][0]["md5"]
    listing = json.loads((STORE/top[:2]/top[2:]).read_text())
    return {e["relpath"]: STORE/e["md5"][:2]/e["md5"][2:] for e in listing}


def test_every_file_has_the_checksum_that_git_holds():
    lines = dict(reversed(line.split("  ", 1)) for line in (ROOT/"tests"/"fixtures"/"data.sha256").read_text().splitlines())
    files = stored()
    assert set(lines) == {f"data/{name}" for name in files}
    wrong = [name for name, path in files.items() if hashlib.sha256(path.read_bytes()).hexdigest() != lines[f"data/{name}"]]
    assert not wrong, f"not the bytes that data.sha256 names: {wrong[:5]}"


def test_size_and_splits(clips):
    files = stored()
    assert len([f for f in files if f.endswith(".mp4")]) == len(clips) == 1000
    assert sum(p.stat().st_size for p in files.values()) <= 32e6
    prompts = {s: {c.prompt for c in clips if c.split == s} for s in SPLITS}
    assert {s: len(p) for s, p in prompts.items()} == SPLITS and len(prompts["test"]) >= 40
    assert len(set.union(*prompts.values())) == sum(SPLITS.values()), "a prompt stands in two splits"
    assert all(6 <= len(p.split()) <= 20 for p in set.union(*prompts.values()))


def test_the_labels_are_those_of_the_plan(clips):
    files = stored()
    for split in SPLITS:
        planned = labels([c for c in clips if c.split == split])
        pd.testing.assert_frame_equal(pd.read_csv(files[LABELS[split]]), planned, check_dtype=False)
    known = pd.read_csv(files["simulation/causes.csv"])
    assert np.allclose(known["latent_overall"], causes_table(clips)["latent_overall"])
    mos = np.array([c.mos for c in clips])
    assert ((mos >= 1) & (mos <= 5)).all() and np.allclose(mos * 3, (mos * 3).round())


def test_a_clip_comes_out_the_same_alone(clips, tmp_path):
    "Frames and encoder settings in the store are today's. Bytes may differ with encoder, processor and memory (chapter data/11_draw)."
    c = clips[333]
    alone = plan_clip(c.prompt, c.scene, c.generator, SEED, c.name, c.split)
    there = read_frames(stored()[f"{c.split}/videos/{c.name}"], range(48))
    here = read_frames(alone.write(tmp_path), range(48))
    assert np.abs(there.astype(int) - here).mean() < 4, "the simulator draws another clip than the one in the store"   # others: 88 and more
    said = [re.search(rb"x264 - core.*?options: ([ -~]+)", p.read_bytes())[1] for p in (stored()[f"{c.split}/videos/{c.name}"], tmp_path/c.name)]
    assert said[0] == said[1], "x264 was told something else when the set was frozen"
    assert np.array_equal(alone.frames(), c.frames())


def test_more_of_it_for_another_seed(tmp_path):
    embedded = {c.prompt for c in plan()}
    table = simulate(tmp_path/"more", {"train": 1, "test": 1}, seed=9, exclude=embedded, workers=1)
    assert len(table) == 10 and not set(pd.read_csv(tmp_path/"more"/LABELS["train"])["Prompt"]) & embedded
    info = probe(tmp_path/"more"/"train"/"videos"/"A_0000.mp4")
    assert (info.frames, info.width, info.height, info.codec, info.fps) == (48, 144, 144, "h264", 24)


@pytest.mark.parametrize("cause", [c for group in CAUSES.values() for c in group])
def test_every_cause_changes_what_is_decoded(cause, clips, tmp_path):
    "A cause that the codec removes would be a label without a reason."
    c = clips[0]
    change = []
    for k, level in enumerate((0., .5, 1.)):
        causes = replace(clean(c.scene), severity=clean(c.scene).severity | {cause: level})
        name = f"{k}.mp4"
        change.append(read_frames(replace(c, name=name, causes=causes).write(tmp_path), range(0, 48, 4)).astype(int))
    assert 0 < np.abs(change[1] - change[0]).mean() < 1.5 * np.abs(change[2] - change[0]).mean()
