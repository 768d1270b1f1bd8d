"""Data sets from the outside: damaged label files, leaks, killed and concurrent cache builds, workers."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from forked import Forked
from torch.utils.data import DataLoader

from qualivision import files
from qualivision.data.clips import (
    ClipCache, DecodeEachTime, EpochSampler, VideoQualityDataset, augmentation, collate, may_flip)
from qualivision.data.dataset import (
    checked, DatasetError, DatasetWarning, data_hash, generator_of, load_dataset, load_labels,
    resolve_splits, shared_prompts, split_by_prompt, validate, write_predictions)
from qualivision.files import FileHashes
from qualivision.data.sampling import Sampling
from qualivision.data.container import VideoError, write_video
from qualivision.files import FileError
from qualivision.quality import COLUMNS, MOS_COLUMNS

REPO = Path(__file__).parents[1]
SAMPLING = Sampling(count=4, size=32)
PROMPTS = {"train": ["a red boat, far out", "two dogs", "a candle", "a man turns left", "a field"], "val": ["rain"], "test": ["a kite"]}


def clip(path, seed):
    noise = np.random.default_rng(seed).integers(0, 255, (8, 12, 16, 3), dtype=np.uint8)
    write_video(path, noise.repeat(4, 1).repeat(4, 2), crf=30)


def label_file(root, split):
    return Path(root)/split/("test_labels.csv" if split == "test" else f"labels/{split}_labels.csv")


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("data")/"set", np.random.default_rng(0)
    for s, (split, prompts) in enumerate(PROMPTS.items()):
        (root/split/"videos").mkdir(parents=True)
        label_file(root, split).parent.mkdir(exist_ok=True)
        rows = []
        for i, prompt in enumerate(prompts):
            for g in "ABC":
                rows.append([f"{g}_{s}{i:03d}.mp4", prompt, *(rng.integers(3, 16, 5)/3).round(4)])
                clip(root/split/"videos"/rows[-1][0], len(rows) + 100*s)
        pd.DataFrame(rows, columns=COLUMNS).to_csv(label_file(root, split), index=False)
    return root


@pytest.fixture
def root(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path/"set"))


def edit(root, split, change):
    "Rewrite a label file through a function of its table."
    change(table := pd.read_csv(label_file(root, split)))
    table.to_csv(label_file(root, split), index=False)


def drop_labels(root, split):
    file = label_file(root, split)
    pd.read_csv(file).drop(columns=list(MOS_COLUMNS)).to_csv(file, index=False)


# ---- reading ----------------------------------------------------------------------------------------------------

def test_reads_the_layout(root):
    frame = validate(load_dataset(root), read=True)
    assert len(frame) == 21 and {*COLUMNS, "split", "path", "group", "generator", "labelled", "file", "row"} <= set(frame.columns)
    assert frame["labelled"].all() and frame["split"].value_counts().to_dict() == {"train": 15, "val": 3, "test": 3}
    assert frame["Prompt"][0] == "a red boat, far out" and frame["path"].map(os.path.isfile).all()
    assert frame.groupby("group").size().tolist() == [3]*7 and frame["row"][1] == 3


@pytest.mark.parametrize("how", ["columns", "cells"])
def test_a_split_without_labels_is_valid_and_marked(root, how):
    if how == "columns": drop_labels(root, "val")
    else: edit(root, "val", lambda t: t.__setitem__(list(MOS_COLUMNS), np.nan))
    frame = validate(load_dataset(root))
    val = frame[frame["split"] == "val"]
    assert not val["labelled"].any() and val[list(MOS_COLUMNS)].isna().all(axis=None) and frame["labelled"].sum() == 18


def test_a_missing_split_is_fine_and_orphaned_videos_are_told(root):
    shutil.rmtree(root/"test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(load_dataset(root)["split"]) == {"train", "val"}
    label_file(root, "val").unlink()
    with pytest.warns(DatasetWarning, match="val/videos has no label file"): assert set(load_dataset(root)["split"]) == {"train"}
    with pytest.raises(DatasetError, match="no label file of the split val"): load_labels(root, "val")


def test_nothing_there(tmp_path):
    with pytest.raises(DatasetError, match="no such folder"): load_dataset(tmp_path/"nowhere")
    with pytest.raises(DatasetError, match="holds no label file"): load_dataset(tmp_path)


@pytest.mark.parametrize("text, message", [
    ("video_name,Prompt,Overall_MOS\na.mp4,x,3\n", "lacks the columns Traditional_MOS, Alignment_MOS, Aesthetic_MOS, Temporal_MOS"),
    ("name,Prompt\na.mp4,x\n", r"lacks the columns video_name.*it has: name, Prompt"),
    ("", "it has: none"), ("video_name,Prompt\n", "has no rows"), ("video_name,Prompt,Prompt\na,x,y\n", "'Prompt' is there twice"),
    ("\n \n", "it has: none"),
    ("video_name,Prompt\na.mp4,a boat, far out\nb.mp4,x\nc.mp4,y, z\n", r"(?s)wrong length \(2\).*row 2, a.mp4: 3 cells.*row 4, c.mp4"),
    (",".join(COLUMNS) + "\na.mp4,x,1,2,3,4,5\nb.mp4,y,1,2,good,4,5\n", r"(?s)not a number \(1\).*row 3, b.mp4: Aesthetic_MOS is 'good'"),
    ('video_name,Prompt\na.mp4,"x\n', "line 2: it is no CSV"),
    (b"video_name,Prompt\na.mp4,x\nb.mp4,caf\xe9\n", "line 3: it is not text in UTF-8.*--encoding"),
])
def test_malformed_label_files(root, text, message):
    label_file(root, "val").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((DatasetError, FileError), match=message): load_dataset(root)


def test_other_encodings_and_names_that_are_no_utf8(root):
    "UTF-16 with its mark, GBK where somebody says so; a file name may be any bytes, and comes back out of a table of predictions."
    text = "video_name,Prompt\nA_1000.mp4,一只红色的船\nNA,café\n"
    for code, say in (("utf-16", None), ("gb18030", "gb18030")):
        label_file(root, "val").write_bytes(text.encode(code))
        assert load_labels(root, "val", say)[["video_name", "Prompt"]].to_numpy().tolist() == [["A_1000.mp4", "一只红色的船"], ["NA", "café"]]
    with pytest.raises(FileError, match="--encoding"): load_dataset(root)
    label_file(root, "val").write_bytes(b"video_name,Prompt\ncaf\xe9.mp4,rain\n")
    os.rename(root/"val/videos/A_1000.mp4", os.fsencode(root/"val/videos") + b"/caf\xe9.mp4")
    val = validate(load_dataset(root)).query("split == 'val'")
    write_predictions(val, np.full((1, 5), 3.), root/"p.csv")
    assert os.path.isfile(val["path"].iloc[0]) and (root/"p.csv").read_bytes().splitlines()[1].startswith(b"caf\xe9.mp4,rain,3.0")


def test_quotes_line_breaks_and_a_byte_order_mark(root):
    label_file(root, "val").write_bytes('\ufeffvideo_name,Prompt\nA_1000.mp4,"rain, ""heavy""\nat night"\n\nB_1000.mp4,snow\n'.encode())
    val = load_labels(root, "val")
    assert val["Prompt"].tolist() == ['rain, "heavy"\nat night', "snow"] and val["row"].tolist() == [2, 5]


def test_two_label_files(root):
    shutil.copy(label_file(root, "val"), root/"val"/"val_labels.csv")
    with pytest.raises(DatasetError, match="two label files"): load_dataset(root)


def test_generators():
    names = {"A_0001.mp4": "A", "E0001.mp4": "E", "B-7.mp4": "B", "kling_7.mp4": "kling", "Animate_1.mp4": "Animate", "0001.mp4": "unknown"}
    assert {n: generator_of(n) for n in names} == names


# ---- checking ---------------------------------------------------------------------------------------------------

def break_mos(root): edit(root, "train", lambda t: t.__setitem__("Overall_MOS", t["Overall_MOS"].where(t.index != 2, 5.5)))
def break_label(root): edit(root, "train", lambda t: t.loc.__setitem__((3, list(MOS_COLUMNS)), np.nan))
def break_duplicate(root): edit(root, "train", lambda t: t.__setitem__("video_name", t["video_name"].replace("B_0000.mp4", "A_0000.mp4")))
def break_twice(root): edit(root, "train", lambda t: t.__setitem__("video_name", t["video_name"].replace("B_0000.mp4", "./A_0000.mp4")))
def break_address(root): edit(root, "test", lambda t: t.__setitem__("video_name", "https://x.org/" + t["video_name"]))
def break_leak(root): edit(root, "val", lambda t: t.__setitem__("Prompt", " A  Candle"))
def break_prompt(root): edit(root, "train", lambda t: t.__setitem__("Prompt", t["Prompt"].replace("two dogs", "  ")))
def break_escape(root): edit(root, "test", lambda t: t.__setitem__("video_name", "../videos/" + t["video_name"]))
def break_missing(root): (root/"train/videos/C_0000.mp4").unlink()
def break_suffix(root): edit(root, "test", lambda t: t.__setitem__("video_name", t["video_name"].str.removesuffix(".mp4")))
def break_text(root): (root/"train/videos/C_0000.mp4").write_text("no video")
def break_empty(root): (root/"train/videos/C_0000.mp4").write_bytes(b"")


def break_cut(root):
    file = root/"train/videos/C_0000.mp4"
    file.write_bytes(file.read_bytes()[:-500])


def test_empty_cells_are_opinions_that_nobody_gave(root):
    "Accepted, kept as NaN on any scale, hashed, and said in the note; whole labels leave the note as it was."
    whole = load_dataset(root)
    before = resolve_splits(whole, 0)["note"]
    edit(root, "train", lambda t: t.__setitem__("Overall_MOS", np.nan))
    edit(root, "train", lambda t: t.__setitem__("Temporal_MOS", t["Temporal_MOS"].where(t.index != 3)))
    some = validate(load_dataset(root))
    assert some["labelled"].equals(whole["labelled"]) and data_hash(some) != data_hash(whole)
    train = resolve_splits(some, 0)["train"]
    assert train["Overall_MOS"].isna().all() and train["Temporal_MOS"].isna().sum() == 1
    note = resolve_splits(some, 0)["note"]
    assert note == f"{before}; opinions on the {len(train)} videos of train: Temporal {len(train) - 1}, Overall no"
    assert checked(some, [0, 5])["Overall_MOS"].isna().equals(some["Overall_MOS"].isna())


BREAKS = [(break_mos, "MOS outside 1–5", [("train", 4, "C_0000.mp4", "Overall_MOS = 5.5")]),
          (break_label, "no label in a labelled split", [("train", 5, "A_0001.mp4", "")]),
          (break_duplicate, "duplicate name", [("train", 2, "A_0000.mp4", ""), ("train", 3, "A_0000.mp4", "")]),
          (break_twice, "duplicate name", [("train", 2, "A_0000.mp4", ""), ("train", 3, "./A_0000.mp4", "")]),
          (break_address, "an address, not a file", [("test", i) for i in (2, 3, 4)]),
          (break_leak, "prompt in two splits", [("train", 8), ("train", 9), ("train", 10), ("val", 2), ("val", 3), ("val", 4)]),
          (break_prompt, "no prompt", [("train", 5), ("train", 6), ("train", 7)]),
          (break_escape, "a name that leads out of the videos folder", [("test", 2), ("test", 3), ("test", 4)]),
          (break_missing, "missing file", [("train", 4, "C_0000.mp4", "")]),
          (break_suffix, "missing file",
           [("test", i, n, "a file of that name with .mp4 is there") for i, n in enumerate(("A_2000", "B_2000", "C_2000"), 2)]),
          (break_text, "unreadable video", [("train", 4, "C_0000.mp4")]),
          (break_empty, "unreadable video", [("train", 4, "C_0000.mp4")]),
          (break_cut, "unreadable video", [("train", 4, "C_0000.mp4")])]


@pytest.mark.parametrize("damage, kind, rows", BREAKS, ids=lambda x: x.__name__ if callable(x) else "")
def test_each_mistake_is_an_error_that_lists_its_rows(root, damage, kind, rows):
    damage(root)
    with pytest.raises(DatasetError, match=re.escape(kind)) as e: validate(load_dataset(root))
    found = [(Path(p.file).name.removesuffix("_labels.csv"), p.row, p.name, p.detail) for p in e.value.problems]
    assert {p.kind for p in e.value.problems} == {kind} and [f[:len(r)] for f, r in zip(found, rows, strict=True)] == rows
    assert all(f"row {r[1]}" in str(e.value) for r in rows)


def test_all_mistakes_at_once(root):
    for damage in (break_mos, break_label, break_leak, break_missing): damage(root)
    with pytest.raises(DatasetError) as e: validate(load_dataset(root))
    assert {p.kind for p in e.value.problems} == {k for d, k, _ in BREAKS if d in (break_mos, break_label, break_leak, break_missing)}


def test_damage_inside_a_file_needs_reading(root):
    file = root/"train/videos/C_0000.mp4"
    data = bytearray(file.read_bytes())
    at = data.index(b"mdat")
    data[at + 2000:at + 2600] = bytes(600)
    file.write_bytes(data)
    with pytest.raises(DatasetError, match=r"unreadable video \(1\)"): validate(load_dataset(root), read=True)


def test_one_video_in_two_splits(root):
    shutil.copy(root/"train/videos/A_0000.mp4", root/"test/videos/B_2000.mp4")
    validate(load_dataset(root))
    with pytest.raises(DatasetError, match="same file in two splits") as e: validate(load_dataset(root), read=True)
    assert e.value.problems[0].detail == "also train/A_0000.mp4"


def test_long_lists_are_cut_with_their_count(root):
    shutil.rmtree(root/"train/videos")
    with pytest.raises(DatasetError, match="… and 7 more") as e: validate(load_dataset(root))
    assert len(e.value.problems) == 15 and "missing file (15)" in str(e.value) and len(str(e.value).splitlines()) < 15


def test_missing_columns(root):
    with pytest.raises(DatasetError, match="lacks the columns Prompt, path"): validate(load_dataset(root).drop(columns=["Prompt", "path"]))


# ---- splits -----------------------------------------------------------------------------------------------------

def table(prompts=100, generators=5):
    rng = np.random.default_rng(0)
    return pd.DataFrame([[f"{g}_{p}.mp4", f"Prompt {p}", *rng.integers(3, 16, 5)/3, "train"] for p in range(prompts) for g in range(generators)],
                        columns=[*COLUMNS, "split"])


@pytest.mark.parametrize("seed", range(5))
def test_split_by_prompt_does_not_leak(seed):
    frame = table()
    frame["Prompt"] = [p if i % 2 else f"  {p.upper()}" for i, p in enumerate(frame["Prompt"])]   # siblings that are written differently
    rest, part = split_by_prompt(frame, 0.2, seed)
    assert shared_prompts(rest, part) == [] and len(part) == 100 and len(rest) + len(part) == len(frame)
    again = split_by_prompt(frame.sample(frac=1, random_state=seed), 0.2, seed)[1]
    assert set(again["video_name"]) == set(part["video_name"])


def test_the_leak_test_can_fail():
    frame = table()
    rng = np.random.default_rng(0).random(len(frame)) < 0.2
    assert len(shared_prompts(frame[~rng], frame[rng])) > 50                              # a split over videos is seen to leak
    with pytest.raises(DatasetError, match="on both sides"): split_by_prompt(frame.assign(group=frame["video_name"]), 0.2, 0)


def test_coarser_groups_hold_prompts_together():
    rest, part = split_by_prompt(table().assign(group=lambda f: f.index//50), 0.2, 0)
    assert part.groupby("group").size().tolist() == [50, 50] and not set(rest["group"]) & set(part["group"])


def test_the_split_is_pinned():
    "The same prompts in every process and version, or results could not be compared."
    assert sorted(split_by_prompt(table(), .05, 3)[1]["Prompt"].unique()) == PINNED_SPLIT


PINNED_SPLIT = ["Prompt 42", "Prompt 53", "Prompt 67", "Prompt 87", "Prompt 97"]


@pytest.mark.parametrize("fraction, prompts", [(0.0, 10), (1.0, 10), (0.5, 1)])
def test_impossible_splits(fraction, prompts):
    with pytest.raises(DatasetError, match="leaves one side empty"): split_by_prompt(table(prompts), fraction, 0)


def test_resolve_splits(root):
    got = resolve_splits(load_dataset(root), seed=0)
    assert [len(got[s]) for s in ("train", "val", "test")] == [15, 3, 3] and got["note"] == "test as given (3 videos); val as given (3 videos)"
    drop_labels(root, "val"); drop_labels(root, "test")                                  # the real set
    got = resolve_splits(load_dataset(root), seed=0, val_fraction=0.4)
    assert [len(got[s]) for s in ("train", "val", "test")] == [9, 6, 3]
    assert "for prediction only" in got["note"] and "val has no labels" in got["note"]
    assert set(got["val"]["split"]) == {"val"} and got["val"]["file"].str.startswith("train/").all()
    assert shared_prompts(got["train"], got["val"]) == [] and not got["test"]["labelled"].any()
    for split in ("val", "test"): shutil.rmtree(root/split)
    got = resolve_splits(load_dataset(root), seed=0)
    assert [len(got[s]) for s in ("train", "val", "test")] == [9, 3, 3] and "test is missing" in got["note"]
    assert not any(shared_prompts(got[a], got[b]) for a, b in (("train", "val"), ("train", "test"), ("val", "test")))
    assert set(resolve_splits(load_dataset(root), seed=0)["val"]["Prompt"]) == set(got["val"]["Prompt"])


def test_resolve_splits_refuses(root):
    frame = load_dataset(root)
    with pytest.raises(DatasetError, match="it is missing"): resolve_splits(frame[frame["split"] != "train"], 0)
    drop_labels(root, "train")
    with pytest.raises(DatasetError, match="it has no labels"): resolve_splits(load_dataset(root), 0)


ROW_BREAKS = [b for b in BREAKS if b[0] not in (break_missing, break_suffix, break_text, break_empty, break_cut)]


@pytest.mark.parametrize("damage, kind, rows", ROW_BREAKS, ids=lambda x: x.__name__ if callable(x) else "")
def test_splits_are_made_of_checked_rows_alone(root, damage, kind, rows):
    "The way by which labels reach every five-MOS model refuses what `validate` refuses, files aside."
    damage(root)
    with pytest.raises(DatasetError, match=re.escape(kind)) as e: resolve_splits(load_dataset(root), 0)
    assert len(e.value.problems) == len(rows)


def test_opinions_on_another_scale(root):
    "Refused with the remedy; mapped where the scale is said, and the note says so; outside of it they are refused again."
    want = resolve_splits(load_dataset(root), 0)
    for split in ("train", "val", "test"): edit(root, split, lambda t: t.__setitem__(list(MOS_COLUMNS), (t[list(MOS_COLUMNS)] - 1) * 25))
    frame = load_dataset(root)
    with pytest.raises(DatasetError, match=r"(?s)MOS outside 1–5 \(2\d\).*data.scale: \[0, 100\].*--scale 0-100"): resolve_splits(frame, 0)
    got = resolve_splits(frame, 0, scale=[0, 100])
    assert got["note"] == want["note"] + "; opinions mapped from 0–100 to 1–5"
    assert all(np.allclose(got[s][list(MOS_COLUMNS)], want[s][list(MOS_COLUMNS)]) for s in ("train", "val", "test"))
    assert np.allclose(validate(frame, scale="0-100")[list(MOS_COLUMNS)].max(), 5, atol=.7)
    with pytest.raises(DatasetError, match="MOS outside 0–50"): resolve_splits(frame, 0, scale="0-50")
    for scale in ("100-0", "0", "a-b", [1], [0, "x"], [0, float("inf")], 5):
        with pytest.raises(DatasetError, match="is no scale"): resolve_splits(frame, 0, scale=scale)


def test_what_may_be_mirrored():
    "Nothing that a mirror changes, in any language; every prompt of the embedded set as it was, or its table would change."
    stays = ("a sign saying stop", "the word love in neon", "un coche gira a la derecha", "Ein Auto biegt rechts ab",
             "汽车向左转", "машина едет налево",
             'a balloon with "7"', "route 66", "a map of the city", "café", "a car turning clockwise", "LETTERS")
    assert not [prompt for prompt in stays if may_flip(prompt)]
    embedded = load_dataset(REPO/"data")["Prompt"].unique()
    before = re.compile(r"\b(left|right|(counter|anti)?-?clockwise)|[左右]", re.IGNORECASE)
    assert [may_flip(p) for p in embedded] == [before.search(p) is None for p in embedded] and all(map(may_flip, embedded))


# ---- hashes -----------------------------------------------------------------------------------------------------

@pytest.fixture
def later(monkeypatch):
    "As if the files had been written long ago."
    now = time.time_ns
    monkeypatch.setattr(files.time, "time_ns", lambda: now() + 10**11)


@pytest.fixture
def reads(monkeypatch):
    "The files whose bytes were hashed."
    seen, real = [], files.file_sha256
    monkeypatch.setattr(files, "file_sha256", lambda p: seen.append(str(p)) or real(p))
    return seen


def test_data_hash_reads_each_file_once(root, tmp_path, later, reads):
    frame = load_dataset(root)
    first = data_hash(frame, tmp_path/"cache")
    assert len(reads) == 21
    assert data_hash(frame, tmp_path/"cache") == first and len(reads) == 21


def test_data_hash_sees_a_change_that_keeps_size_and_time(root, tmp_path, later, reads):
    frame, file = load_dataset(root), root/"val/videos/A_1000.mp4"
    first, before = data_hash(frame, tmp_path/"cache"), file.stat()
    data = bytearray(file.read_bytes()); data[-1] ^= 1
    time.sleep(0.02)
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
    assert data_hash(frame, tmp_path/"cache") != first and len(reads) == 22


def test_a_file_that_has_just_changed_is_not_remembered(root, tmp_path, reads):
    frame = load_dataset(root)
    (root/"train/videos/A_0000.mp4").touch()
    data_hash(frame, tmp_path/"cache"); before = len(reads)
    data_hash(frame, tmp_path/"cache")
    assert len(reads) > before


def test_hashes_of_two_processes_are_kept(root, tmp_path, later):
    one, two = FileHashes(tmp_path), FileHashes(tmp_path)
    one(root/"val/videos/A_1000.mp4"); two(root/"val/videos/B_1000.mp4")
    one.save(); two.save()
    assert len(FileHashes(tmp_path).known) == 2


@pytest.mark.parametrize("change", ["Overall_MOS", "Prompt", "video_name", "split"])
def test_data_hash_covers_every_column(root, change):
    frame = load_dataset(root)
    other = frame.copy(); other.loc[5, change] = 1.0 if change == "Overall_MOS" else "other"
    assert data_hash(other) != data_hash(frame)


# ---- the clip cache ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Counted(Sampling):
    "A sampling that writes down what it decodes."
    log: str = ""

    def __call__(self, path):
        with open(self.log, "a") as f: f.write(f"{path}\n")
        return super().__call__(path)


@pytest.fixture
def counted(tmp_path):
    (tmp_path/"log").touch()
    return Counted(4, 32, log=str(tmp_path/"log")), lambda: (tmp_path/"log").read_text().splitlines()


@pytest.mark.parametrize("workers", [0, 2])
def test_each_video_is_decoded_once(root, tmp_path, counted, workers):
    sampling, log = counted
    paths = load_dataset(root)["path"].tolist()
    report = ClipCache(tmp_path/"cache", sampling).build(paths + paths, workers=workers, progress=False)
    assert (report.clips, report.decoded, report.bytes, report.errors) == (21, 21, 21*3*4*32*32, []) and sorted(log()) == sorted(paths)
    cache = ClipCache(tmp_path/"cache", sampling)
    assert cache.build(paths, workers=workers, progress=False).decoded == 0
    assert all(torch.equal(cache.get(p), SAMPLING(p)) for p in paths) and len(log()) == 21


def test_the_key_is_content_and_sampling(root, tmp_path, counted):
    sampling, log = counted
    cache, path = ClipCache(tmp_path/"cache", sampling), root/"val/videos/A_1000.mp4"
    old = cache.get(path).clone()
    moved = shutil.copy(path, root/"val/videos/other.mp4")
    assert torch.equal(cache.get(moved), old) and len(log()) == 1                 # same content elsewhere: a hit
    clip(path, 12345)
    assert not torch.equal(cache.get(path), old) and len(log()) == 2              # other content: a miss
    assert ClipCache(tmp_path/"cache", Sampling(5, 32)).get(moved).shape == (3, 5, 32, 32)
    assert ClipCache(tmp_path/"cache", Sampling(4, 16)).get(moved).shape == (3, 4, 16, 16)


@pytest.mark.parametrize("share", [0, 0.005, 0.01, 0.3, 0.9998])
@pytest.mark.parametrize("by", ["build", "get"])
def test_a_cut_entry_is_made_again(root, tmp_path, share, by):
    cache, path = ClipCache(tmp_path/"cache", SAMPLING), root/"val/videos/A_1000.mp4"
    cache.build([path], progress=False)
    file = cache.file(path)
    data = file.read_bytes()
    os.truncate(file, int(len(data)*share))
    if by == "build": assert cache.build([path], progress=False).decoded == 1
    assert torch.equal(cache.get(path), SAMPLING(path)) and file.read_bytes() == data


def test_an_entry_with_extra_bytes_or_another_shape_is_made_again(root, tmp_path):
    cache, path = ClipCache(tmp_path/"cache", SAMPLING), root/"val/videos/A_1000.mp4"
    wanted = cache.get(path).clone()
    file = cache.file(path)
    file.write_bytes(file.read_bytes() + bytes(50))
    assert cache.build([path], progress=False).decoded == 1
    data = bytearray(file.read_bytes())
    data[1000:1100] = bytes(100)                                                  # what a power failure may leave: only reading all of it tells
    file.write_bytes(data)
    assert cache.build([path], progress=False).decoded == 1 and torch.equal(cache.get(path), wanted)
    for other in (np.zeros((4, 3, 32, 32), np.uint8), np.zeros((3, 4, 32, 32), np.float32)):
        np.save(file, other)
        assert torch.equal(cache.get(path), wanted)


def test_keys_that_look_alike_stay_apart(tmp_path):
    class Named(Sampling):
        def key(self): return self.name
    folders = set()
    for name in ("a b", "a/b", "a-b", "x"*70 + "1", "x"*70 + "2"):
        sampling = Named(4, 32); object.__setattr__(sampling, "name", name)
        folders.add(ClipCache(tmp_path, sampling).folder)
    assert len(folders) == 5 and all(f.parent == tmp_path for f in folders)


def test_a_write_into_a_clip_stays_out_of_the_cache(root, tmp_path):
    cache, path = ClipCache(tmp_path/"cache", SAMPLING), root/"val/videos/A_1000.mp4"
    cache.build([path], progress=False)
    cache.get(path).zero_()
    assert torch.equal(cache.get(path), SAMPLING(path))


def test_bad_videos_are_rows_or_one_error(root, tmp_path):
    break_text(root); break_leak(root)
    bad, paths = [str(root/"train/videos/C_0000.mp4"), str(root/"gone.mp4")], load_dataset(root)["path"].tolist()
    cache = ClipCache(tmp_path/"cache", SAMPLING)
    report = cache.build([*bad, *paths], progress=False, workers=2, on_error="collect")
    assert report.clips == 20 and sorted(e["video"] for e in report.errors) == sorted(bad) and all(e["error"] for e in report.errors)
    with pytest.raises(DatasetError, match="(?s)2 videos cannot be decoded.*gone.mp4.*C_0000.mp4"): cache.build([*bad, *paths], progress=False)
    with pytest.raises(VideoError, match="gone.mp4"): cache.get(bad[1])
    with pytest.raises(VideoError, match="C_0000.mp4"): cache.get(bad[0])


def test_a_full_disk(root, tmp_path, monkeypatch, counted):
    sampling, log = counted
    cache, paths = ClipCache(tmp_path/"cache", sampling), load_dataset(root)["path"].tolist()
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9 - 100_000, 100_000))
        with pytest.raises(FileError, match="the 21 clips of the cache need 0.00 GB"): cache.build(paths)
    assert len(log()) == 1 and not list((tmp_path/"cache").rglob("*.npy"))
    with monkeypatch.context() as m:
        m.setattr(np, "save", lambda f, a: f.write(b"begun") and (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(FileError, match="No space left on device"): cache.get(paths[0])
    assert not [f for f in (tmp_path/"cache").rglob("*") if f.is_file()]


class Slow(Sampling):
    pause = 0.
    def __call__(self, path): print(path); time.sleep(self.pause); return super().__call__(path)


def builder(root, cache, pause) -> Forked:
    def build():
        Slow.pause = pause
        print(ClipCache(cache, Slow(4, 32)).build(load_dataset(root)["path"], progress=False).clips)
    return Forked(build)


def said(process) -> int:
    "Lines of its stdout by now; read at a place of its own, for the process writes at the one that both share."
    return os.pread(process.files[0].fileno(), 1 << 20, 0).count(b"\n")


def test_a_killed_build_goes_on_where_it_stopped(root, tmp_path, counted, one_thread):
    sampling, log = counted
    process = builder(root, tmp_path/"cache", 0.05)
    while said(process) < 7 and process.poll() is None: time.sleep(.005)            # in the middle of the seventh clip
    process.send_signal(signal.SIGKILL); process.wait()
    stored = len(list((tmp_path/"cache").rglob("*.npy")))
    assert 5 <= stored < 21
    cache, paths = ClipCache(tmp_path/"cache", sampling), load_dataset(root)["path"].tolist()
    leftover = next((tmp_path/"cache").rglob("*.npy")).parent/".x.npy.1-abc.tmp"
    leftover.write_bytes(b"half a clip"); os.utime(leftover, (0, 0))
    assert cache.build(paths, progress=False).decoded == 21 - stored == len(log())
    assert all(torch.equal(cache.get(p), SAMPLING(p)) for p in paths) and not leftover.exists()


def test_two_processes_fill_one_cache(root, tmp_path, one_thread):
    both = [builder(root, tmp_path/"cache", 0.01) for _ in range(2)]
    assert [p.communicate()[0].split()[-1] for p in both] == ["21", "21"] and [p.returncode for p in both] == [0, 0]
    cache, paths = ClipCache(tmp_path/"cache", SAMPLING), load_dataset(root)["path"].tolist()
    assert cache.build(paths, progress=False).decoded == 0 and all(torch.equal(cache.get(p), SAMPLING(p)) for p in paths)
    assert not [f for f in (tmp_path/"cache").rglob("*.tmp")]


class Deadly(Sampling):
    "Ends its process at one file, as a decoder may do."
    def __call__(self, path):
        if "B_0002" in str(path) and torch.utils.data.get_worker_info(): os._exit(3)
        return super().__call__(path)


def test_a_worker_that_dies_is_told_with_the_file(root, tmp_path):
    with pytest.raises(DatasetError, match="worker process died") as e:
        ClipCache(tmp_path/"cache", Deadly(4, 32)).build(load_dataset(root)["path"], workers=1, progress=False)
    assert "B_0002" in str(e.value)


# ---- items and batches ------------------------------------------------------------------------------------------

@pytest.fixture
def train(root):
    return resolve_splits(load_dataset(root), 0)["train"]


TEXT = {p: torch.full((6,), float(i)) for i, p in enumerate(PROMPTS["train"])}


def test_items_are_those_of_decoding(train, tmp_path):
    cached, decoded = (VideoQualityDataset(train, c, TEXT) for c in (ClipCache(tmp_path/"cache", SAMPLING), DecodeEachTime(SAMPLING)))
    for i in range(len(train)):
        a, b = cached[i], decoded[i]
        assert set(a) == {"video_name", "prompt", "frames", "text", "mos"} and all(torch.equal(a[k], b[k]) for k in ("frames", "text", "mos"))
        assert a["frames"].dtype == torch.uint8 and a["frames"].shape == (3, 4, 32, 32) and a["mos"].dtype == torch.float32
        assert np.allclose(a["mos"], train.loc[i, list(MOS_COLUMNS)].astype(float)) and torch.equal(a["text"], TEXT[train["Prompt"][i]])


def test_text_by_row_and_its_errors(train):
    by_row = torch.randn(len(train), 6)
    assert torch.equal(VideoQualityDataset(train, DecodeEachTime(SAMPLING), by_row)[3]["text"], by_row[3])
    with pytest.raises(DatasetError, match="1 prompts have no embedding, first 'a field'"):
        VideoQualityDataset(train, DecodeEachTime(SAMPLING), {p: t for p, t in TEXT.items() if p != "a field"})
    with pytest.raises(DatasetError, match="14 embeddings for 15 rows"): VideoQualityDataset(train, DecodeEachTime(SAMPLING), by_row[1:])


def test_no_label_is_nan_never_a_number(train):
    item = VideoQualityDataset(train.drop(columns=list(MOS_COLUMNS)), DecodeEachTime(SAMPLING), TEXT)[0]
    assert item["mos"].isnan().all() and item["mos"].shape == (5,)


def test_a_bad_video_is_an_error_not_black_frames(root, train, tmp_path):
    break_text(root)
    bad = train.index[train["video_name"] == "C_0000.mp4"][0]
    with pytest.raises(VideoError, match="C_0000.mp4"): VideoQualityDataset(train, ClipCache(tmp_path/"cache", SAMPLING), TEXT)[bad]


def epoch(data, workers=0, start=0, number=0, **rest):
    sampler = EpochSampler(len(data), seed=5, epoch=number, start=start)
    data.set_epoch(number)
    return list(DataLoader(data, batch_size=4, sampler=sampler, num_workers=workers, collate_fn=collate, **rest))


def same(a, b):
    return len(a) == len(b) and all(x["video_name"] == y["video_name"] and x["prompt"] == y["prompt"]
                                    and all(torch.equal(x[k], y[k]) for k in ("frames", "text", "mos")) for x, y in zip(a, b))


def test_workers_and_resume_change_nothing(train, tmp_path):
    cache = ClipCache(tmp_path/"cache", SAMPLING)
    cache.build(train["path"], progress=False)
    data = VideoQualityDataset(train, cache, TEXT, augment=True, seed=5)
    whole = epoch(data)
    assert whole[0]["frames"].shape == (4, 3, 4, 32, 32) and sum(len(b["mos"]) for b in whole) == 15
    assert same(epoch(data, workers=2), whole)
    assert same(epoch(data, start=8), whole[2:])
    assert not same(epoch(data, number=1), whole)
    assert same(epoch(data), whole)


def test_workers_that_stay_see_the_new_epoch(train, tmp_path):
    cache = ClipCache(tmp_path/"cache", SAMPLING)
    cache.build(train["path"], progress=False)
    data = VideoQualityDataset(train, cache, TEXT, augment=True)
    loader = DataLoader(data, batch_size=15, num_workers=1, persistent_workers=True, collate_fn=collate)
    for e in range(3):
        data.set_epoch(e)
        frames = next(iter(loader))["frames"]
        assert torch.equal(frames, torch.stack([data[i]["frames"] for i in range(15)]))
        flipped = [not torch.equal(f, cache.get(p)) for f, p in zip(frames, train["path"])]
        assert flipped == [augmentation(0, e, i)["flip"] and "left" not in train["Prompt"][i] for i in range(15)]


def test_the_chance_of_an_item_is_pinned():
    "Resumed runs on other machines and later versions must draw the same."
    assert [augmentation(0, 0, i)["flip"] for i in range(12)] == PINNED_FLIPS
    assert list(EpochSampler(8, seed=1, epoch=2)) == PINNED_ORDER


PINNED_FLIPS = [bool(int(c)) for c in "010000011010"]
PINNED_ORDER = [6, 0, 7, 5, 1, 4, 3, 2]


def test_sampler_bounds():
    assert len(EpochSampler(10, start=10)) == 0 and list(EpochSampler(10, start=10)) == []
    with pytest.raises(DatasetError, match="outside an epoch"): EpochSampler(10, start=11)


def test_collate_names_clips_that_do_not_fit(train):
    a = VideoQualityDataset(train, DecodeEachTime(SAMPLING), TEXT)[0]
    b = VideoQualityDataset(train, DecodeEachTime(Sampling(4, 16)), TEXT)[1]
    with pytest.raises(DatasetError, match="clips differ in shape.*A_0000.mp4"): collate([a, b])


# ---- predictions ------------------------------------------------------------------------------------------------

def test_predictions_are_the_seven_columns(root, tmp_path):
    test = resolve_splits(load_dataset(root), 0)["test"]
    scores = torch.rand(3, 5)*4 + 1
    write_predictions(test, scores, tmp_path/"out"/"p.csv")
    back = pd.read_csv(tmp_path/"out"/"p.csv")
    assert tuple(back.columns) == COLUMNS and back["video_name"].tolist() == test["video_name"].tolist()
    assert np.allclose(back[list(MOS_COLUMNS)], scores, atol=1e-6)


def test_predictions_refuse_what_is_no_score(root, tmp_path):
    test, scores = resolve_splits(load_dataset(root), 0)["test"], np.full((3, 5), 3.)
    with pytest.raises(DatasetError, match=r"shape \(2, 5\)"): write_predictions(test, scores[1:], tmp_path/"p.csv")
    scores[1] = np.nan
    with pytest.raises(DatasetError, match="first B_2000.mp4"): write_predictions(test, scores, tmp_path/"p.csv")
    assert not (tmp_path/"p.csv").exists()
    assert write_predictions(test, scores, tmp_path/"p.csv", missing="empty").isna().sum().sum() == 5
    assert (tmp_path/"p.csv").read_text().splitlines()[2] == "B_2000.mp4,a kite,,,,,"
    scores[1, 0] = 3.
    write_predictions(test, scores, tmp_path/"p.csv", missing="empty")
    assert (tmp_path/"p.csv").read_text().splitlines()[2] == "B_2000.mp4,a kite,3.000000,,,,", "a dimension without a score is an empty cell"
    scores[1, 1] = np.inf
    with pytest.raises(DatasetError, match="no finite scores"): write_predictions(test, scores, tmp_path/"p.csv", missing="empty")


def test_import_stays_light():
    code = "import sys, qualivision.data.dataset; print([m for m in ('rich', 'decord', 'sklearn', 'transformers', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPO)}, check=True)
    assert out.stdout.strip() == "[]"
