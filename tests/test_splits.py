"Splits: what each kind promises of every round, files that are wrong in any line, and the same clip under two names."
import shutil

import numpy as np
import pandas as pd
import pytest
import tiny
from sklearn.model_selection import GroupKFold

from qualivision.data.container import write_video
from qualivision.evaluation.splits import (
    KINDS, SplitError, crossing, draw_splits, labels_hash, read_clips, read_splits, refuse_leaks, write_splits)
from qualivision.toy import toy_prompt, toy_set


@pytest.fixture
def labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [(f"{g}_{k:04}.mp4", toy_prompt(k).upper() if g == "B" else toy_prompt(k), f"s{k // 2}") for k in range(11) for g in "ABC"]
    pd.DataFrame(rows, columns=["video_name", "Prompt", "scene"]).to_csv("labels.csv", index=False)
    return tmp_path/"labels.csv"


@pytest.mark.parametrize("kind", KINDS)
def test_no_round_knows_what_it_judges(labels, kind):
    clips = read_clips(labels)
    splits = draw_splits(clips, kind, 3)
    rounds = [role for _, role in splits.rounds()]
    assert len(rounds) == {"kfold": 15, "generators": 45, "fixed": 1}[kind] and clips.group.nunique() == 11
    for role in rounds:
        train, val, test = (clips[role == r] for r in (1, 2, 3))
        assert len(train) and len(test) and bool(len(val)) == (kind == "fixed")
        assert not set(train.prompt) & set(test.prompt) and not set(val.prompt) & (set(train.prompt) | set(test.prompt))
        if kind == "generators": assert test.generator.nunique() == 1 and not set(train.generator) & set(test.generator)
        else: assert (role > 0).all()
    if kind != "fixed": assert (sum(role == 3 for role in rounds) == 3).all()            # once in each draw
    if kind == "kfold": assert len({tuple(p) for p in splits.parts.T}) == 3              # and the draws differ


def test_folds_are_those_of_scikit_learn(labels):
    clips = read_clips(labels)
    for seed in range(3):
        cut = GroupKFold(5, shuffle=True, random_state=seed).split(clips, groups=clips.group)
        for k, (_, held) in enumerate(cut): assert (draw_splits(clips, "kfold", 3).parts[held, seed] == str(k)).all()


def test_a_split_of_ones_own_is_kept_and_judged(labels):
    table = pd.read_csv(labels)
    table["split"] = np.where(table.index < 27, "train", "test")
    table.to_csv(labels, index=False)
    clips = read_clips(labels)
    splits = draw_splits(clips, "fixed")
    assert splits.parts[:, 0].tolist() == table.split.tolist()
    refuse_leaks(clips, splits)
    table.loc[[0, 30], "split"] = "test", "val"
    table.to_csv(labels, index=False)
    clips = read_clips(labels)
    with pytest.raises(SplitError, match="prompt on two sides") as found: refuse_leaks(clips, draw_splits(clips, "fixed"))
    assert [(p.row, p.name) for p in found.value.problems] == [(2, "A_0000.mp4"), (32, "A_0010.mp4")]
    table.loc[3, "split"] = ""
    table.to_csv(labels, index=False)
    with pytest.raises(SplitError, match=r"labels.csv row 5: `split` is ''"): draw_splits(read_clips(labels), "fixed")


def test_a_leak_in_any_round_is_found():
    roles = np.array([[1, 1, 3, 0], [1, 3, 0, 0]])
    assert crossing(roles, [0, 1]) == 1 and crossing(roles, [0, 2]) == 0 and crossing(roles, [0, 3]) is None and crossing(roles, [2, 3]) is None


@pytest.mark.parametrize("old, new, line, cause", [
    ('"version": 1', '"version": 9', 2, "version is 9"), ('"kind": "kfold"', '"kind": "random"', 3, "no kind 'random'"),
    ('"group": "Prompt"', '"group": 5', 4, "group is no text"), ('"A_0001.mp4": [', '"A_0001.mp4": [1, ', 11, "no list of texts"),
    ('"A_0001.mp4": [', '"A_0001.mp4": ["1", ', 11, "4 parts, the first clip 3"), ('"B_0000.mp4"', '"A_0000.mp4"', 9, "2 times"),
    ('"A_0001.mp4":', '"A_0001.mp4"', 11, "no JSON"), ('"clips": {', '"more": {', 1, "no clips"), ("{", "[1] {", 1, "no JSON")])
def test_a_bad_file_is_told_by_its_line(labels, old, new, line, cause):
    write_splits("splits.json", draw_splits(read_clips(labels), "kfold", 3, "Prompt", "labels.csv", labels_hash(labels)))
    text = (labels.parent/"splits.json").read_text()
    assert old in text
    (labels.parent/"bad.json").write_text(text.replace(old, new, 1))
    with pytest.raises(SplitError, match=cause) as found: read_splits("bad.json", labels)
    assert found.value.what == f"bad.json line {line}"


def test_a_file_belongs_to_its_labels(labels):
    drawn = draw_splits(read_clips(labels), "generators", 2, "Prompt", "labels.csv", labels_hash(labels))
    write_splits("splits.json", drawn)
    back = read_splits("splits.json", labels)
    assert [a.tolist() for _, a in back.rounds()] == [a.tolist() for _, a in drawn.rounds()] and back.videos == drawn.videos
    labels.write_text(labels.read_text() + "D_0000.mp4,a new one,s9\n")
    with pytest.raises(SplitError, match="splits.json line 6: it was drawn for other labels"): read_splits("splits.json", labels)


def test_the_command(labels):
    status, found, _ = tiny.command("splits", "labels.csv", "--out", "splits.json", "--json")
    assert status == 0 and (found["kind"], found["clips"], found["groups"], found["draws"], found["rounds"]) == ("kfold", 33, 11, 10, 50)
    assert read_splits("splits.json", labels).group == "prompt" and found["videos"] is None
    status, text, _ = tiny.command("splits", "labels.csv", "--out", "splits.json", "--kind", "generators", "--group", "scene", "--seeds", 1)
    assert status == 0 and "by scene" in text and "15 rounds" in text and "--check-videos" in text
    before = (labels.parent/"splits.json").read_bytes()
    pd.read_csv(labels).assign(scene=range(33)).to_csv(labels, index=False)
    status, _, said = tiny.command("splits", "labels.csv", "--out", "splits.json", "--group", "scene")
    assert status == 1 and "prompt on two sides (11)" in said and (labels.parent/"splits.json").read_bytes() == before


def picture(k: int) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 256, (1, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2).repeat(7, 0)


def test_a_copy_under_another_name_is_found(labels):
    "The same bytes, and the same picture smaller and darker; each in another part than its original, so each is refused once."
    for k, name in enumerate(pd.read_csv(labels).video_name): write_video(name, picture(k))
    command = "splits", "labels.csv", "--out", "splits.json", "--kind", "fixed", "--check-videos", ".", "--json"
    status, found, _ = tiny.command(*command)
    assert status == 0 and found["videos"] == {"compared": 33, "alike": 0}
    drawn = read_splits("splits.json", labels)
    role = dict(zip(drawn.videos, drawn.parts[:, 0]))
    train, val, test = (next(v for v in drawn.videos if role[v] == r) for r in ("train", "val", "test"))
    sibling = next(v for v in drawn.videos if role[v] == "train" and v != train)
    shutil.copy(train, test); shutil.copy(train, sibling)               # a copy within train is no leak
    write_video(val, (picture(drawn.videos.index(train))[:, ::2, ::2] * .7).astype(np.uint8))
    status, _, said = tiny.command(*command)
    assert status == 1 and "same file on two sides (1)" in said and "near copy on two sides (1)" in said
    assert f"{test} (fixed)" in said and f"{val}, 0.0" in said
    (labels.parent/sibling).unlink()
    status, _, said = tiny.command(*command)
    assert status == 1 and "unreadable video (1)" in said and sibling in said


def test_a_folder_of_a_data_set(tmp_path):
    "Labels in three files: one hash, and the split that it has."
    root = toy_set(tmp_path/"set", train=3, val=1, test=1)
    clips, before = read_clips(root), labels_hash(root)
    assert draw_splits(clips, "fixed").parts[:, 0].tolist() == clips.split.tolist() and set(clips.generator) == {"A", "B"}
    file = root/"val"/"labels"/"val_labels.csv"
    file.write_text(file.read_text().replace("A_0003", "C_0003"))
    assert labels_hash(root) != before
    pd.DataFrame({"video": ["a.mp4"]}).to_csv(tmp_path/"bare.csv", index=False)
    with pytest.raises(SplitError, match="--group"): read_clips(tmp_path/"bare.csv")
