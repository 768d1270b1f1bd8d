"What crosses modules in scoring: a checkpoint describes itself, scores match training's, bad videos become rows."
import csv
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from qualivision.data.clips import ClipCache, VideoQualityDataset, collate
from qualivision.data.dataset import DatasetError, load_labels
from qualivision.data.sampling import Sampling
from qualivision.data.container import VideoError, write_video
from qualivision.files import FileError
from qualivision import devices
from qualivision.inference.bulk import FiveMosScorer, score_set
from qualivision.inference.score import ScoreError, Scorer, predict
from qualivision.models.text import TextError
from qualivision.models.weights import WeightsError
from qualivision.quality import COLUMNS, DIMENSIONS, MOS_COLUMNS, MOS_MAX, MOS_MIN, QualiVisionError
from qualivision.toy import toy_set


@pytest.fixture(scope="module")
def scorer(tmp_path_factory): return Scorer.from_checkpoint(tiny.checkpoint(tmp_path_factory.mktemp("weights")/"dover"), "cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory): return toy_set(tmp_path_factory.mktemp("data")/"set", train=2, val=2, test=2)


def test_a_score_is_five_mos_and_always_the_same(scorer, root):
    video = root/"train"/"videos"/"A_0000.mp4"
    a, b = scorer.score(video, "a red boat"), scorer.score(video, "a red boat")
    assert a == b and all(MOS_MIN <= getattr(a, d) <= MOS_MAX for d in DIMENSIONS)
    assert (a.video, a.model, a.trained_on) == (str(video), "dover++", "simulated labels (tiny)")


def test_scores_are_those_of_the_training_path(scorer, root):
    "One video at a time from the file, or a batch through cache, data set and collate: the same scores."
    frame = load_labels(root, "train")
    text = dict(zip(frame["Prompt"], scorer.encoder.encode(frame["Prompt"].tolist())))
    items = VideoQualityDataset(frame, ClipCache(root.parent/"cache", Sampling(4, 32)), text)
    batch = collate([items[i] for i in range(len(items))])
    with torch.no_grad(): want = scorer.model(batch["frames"], batch["text"])["mos"]
    got = torch.tensor([[getattr(r, d) for d in DIMENSIONS] for r in scorer.score_many(zip(frame["path"], frame["Prompt"]))])
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("size, batches", [(1, [1] * 5), (2, [2, 2, 1]), (32, [5])])
def test_a_clip_scores_the_same_in_a_batch(scorer, root, tmp_path, monkeypatch, size, batches):
    "In batches with an odd end, through `score_many` and through `score_set`, to 1e-5."
    monkeypatch.setitem(devices.BATCH, "cpu", size * 3 * 4 * 32 * 32)
    frame = load_labels(root, "train")
    pairs, sizes = [(v, p) for v in frame["path"] for p in ("a red boat", "an old man", "snow")][:5], []
    alone = [[getattr(scorer.score(*pair), d) for d in DIMENSIONS] for pair in pairs]
    real = type(scorer.model).forward
    monkeypatch.setattr(type(scorer.model), "forward", lambda self, frames, text: sizes.append(len(text)) or real(self, frames, text))
    together = [[getattr(r, d) for d in DIMENSIONS] for r in scorer.score_many(pairs)]
    assert np.allclose(together, alone, rtol=0, atol=1e-5) and sizes == batches
    score_set(((f"{k}", str(v), p) for k, (v, p) in enumerate(pairs)), tmp_path/"out.csv", FiveMosScorer(scorer))
    with open(tmp_path/"out.csv", newline="") as f: rows = [[float(r[c]) for c in MOS_COLUMNS] for r in csv.DictReader(f)]
    assert np.allclose(rows, alone, rtol=0, atol=1e-5) and sizes == 2 * batches


def test_bad_videos_become_rows_and_the_rest_go_on(scorer, root, tmp_path):
    good = root/"train"/"videos"/"A_0000.mp4"
    (tmp_path/"empty.mp4").touch(); (tmp_path/"text.mp4").write_text("not a video")
    (tmp_path/"cut.mp4").write_bytes(good.read_bytes()[:len(good.read_bytes()) // 2])
    videos = [good, tmp_path/"empty.mp4", tmp_path/"text.mp4", tmp_path/"cut.mp4", tmp_path/"gone.mp4", tmp_path, good]
    records = list(scorer.score_many((v, "a red boat") for v in videos))
    assert [r.error is None for r in records] == [True, False, False, False, False, False, True]
    for r, v in zip(records[1:-1], videos[1:-1]):
        assert str(v) in r.error and all(getattr(r, d) is None for d in DIMENSIONS) and r.trained_on == "simulated labels (tiny)"
    for prompt in ("", " ", None): assert "no prompt" in next(scorer.score_many([(good, prompt)])).error


@pytest.mark.parametrize("wrong", [RuntimeError("a kernel failed"), MemoryError(), OSError(5, "Input/output error"), ValueError("no"),
                                   UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "no")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("seam", ["sampling", "model", "encoder"])
def test_whatever_one_video_raises_is_its_row(scorer, root, monkeypatch, seam, wrong, capfd):
    "In a batch too: it is given up, and its clips are scored one by one."
    count, good = [], root/"train"/"videos"/"A_0000.mp4"
    holder, name, bad = {"sampling": (Sampling, "counted", [2]), "model": (type(scorer.model), "forward", [1, 3]),
                         "encoder": (type(scorer.encoder), "embed", [2, 4])}[seam]        # calls: of a batch of three, then of each
    real = getattr(holder, name)
    def sometimes(self, *a, **k):
        count.append(1)
        if len(count) in bad: raise wrong
        return real(self, *a, **k)
    monkeypatch.setattr(holder, name, sometimes)
    records = list(scorer.score_many([(good, "a red boat")] * 3, workers=1))
    assert [r.error is None for r in records] == [True, False, True] and records[0] == records[2]
    assert str(good) in records[1].error and "Traceback" in capfd.readouterr().err


def test_five_alike_in_an_unforeseen_way_stop_the_run(scorer, root, monkeypatch, capfd):
    def never(*a): raise RuntimeError("this build lacks a kernel")
    monkeypatch.setattr(Sampling, "counted", never)
    records = scorer.score_many([(root/"train"/"videos"/"A_0000.mp4", "a boat")] * 9)
    assert all(next(records).error for _ in range(4))
    with pytest.raises(QualiVisionError, match="first 5 items all failed alike"): next(records)
    assert capfd.readouterr().err.count("Traceback") == 1


def test_one_frame_has_no_motion_to_judge(scorer, root, tmp_path):
    "All but the temporal score, which is null with its reason; a frozen clip of several frames has that fault and is judged."
    frame = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), dtype=np.uint8)
    still, frozen = write_video(tmp_path/"still.mp4", frame), write_video(tmp_path/"frozen.mp4", frame.repeat(2, 0))
    one, two = scorer.score_many([(still, "a red boat"), (frozen, "a red boat")])
    assert one.error is None and one.temporal is None and list(one.reasons) == ["temporal", "interval"] and "one frame" in one.reasons["temporal"]
    assert all(MOS_MIN <= getattr(one, d) <= MOS_MAX for d in DIMENSIONS if d != "temporal")
    assert '"temporal": null' in json.dumps(one.to_dict()) and two.temporal is not None and list(two.reasons) == ["interval"]
    assert scorer.judge(*[scorer.sampling(still), "a red boat"], 1)[0][:3] == pytest.approx([one.traditional, one.alignment, one.aesthetic], abs=1e-5)


def test_an_empty_cell_for_what_cannot_be_judged(scorer, root, tmp_path):
    copy = shutil.copytree(root, tmp_path/"set")
    still = sorted((copy/"test"/"videos").iterdir())[0]
    write_video(still, np.full((1, 32, 32, 3), 90, np.uint8))
    predict(copy, "test", scorer, tmp_path/"out.csv")
    with open(tmp_path/"out.csv", newline="") as f: rows = {r["video_name"]: r for r in csv.DictReader(f)}
    assert [c for c in COLUMNS if not rows[still.name][c]] == ["Temporal_MOS"] and sum(not v for r in rows.values() for v in r.values()) == 1


def test_what_a_reader_should_know_of_the_prompt_is_in_the_record(scorer, root, recwarn):
    video = root/"train"/"videos"/"A_0000.mp4"
    plain, one, many, cut = (scorer.score(video, p) for p in ("a red boat", "a red boat sails by 🚀", "🚀 boat", "word " * 300))
    assert plain.warnings == one.warnings == () and not recwarn
    assert len(many.warnings) == 1 and "1 of the 2 tokens" in many.warnings[0] and "(50%)" in many.warnings[0]
    assert len(cut.warnings) == 1 and "reads 256 tokens" in cut.warnings[0]
    assert scorer.score(video, "🚀 boat").warnings == many.warnings                # also where its embedding is known


@pytest.mark.parametrize("prompt", ["🚀🌕", "\u200b\u200b", "สวัสดีครับ", "caf\udce9"])
def test_a_prompt_that_cannot_be_read_is_an_error(scorer, root, monkeypatch, prompt):
    monkeypatch.setattr(Sampling, "counted", lambda *a: pytest.fail("it decoded a video for that"))
    with pytest.raises(TextError): scorer.score(root/"train"/"videos"/"A_0000.mp4", prompt)
    (record,) = scorer.score_many([(root/"train"/"videos"/"A_0000.mp4", prompt)])
    assert record.error and record.prompt == prompt and os.sep + "A_0000.mp4" in record.video


def test_rows_of_prompts_that_cannot_be_read_are_refused(root, tmp_path):
    copy = shutil.copytree(root, tmp_path/"set")
    labels = copy/"train"/"labels"/"train_labels.csv"
    lines = labels.read_text().splitlines()
    for n, prompt in ((1, "🚀🌕"), (2, "\u200b")): lines[n] = ",".join([lines[n].split(",")[0], prompt, *lines[n].split(",")[-5:]])
    labels.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"cannot be read \(2\)"): tiny.train(copy, tmp_path, epochs=1, warmup_steps=0)
    assert not (tmp_path/"cache").exists()


def test_score_many_is_lazy(scorer, root):
    "An endless stream of pairs is scored as it comes."
    def endless():
        while True: yield root/"train"/"videos"/"A_0000.mp4", "a boat"
    records = scorer.score_many(endless())
    assert next(records) == next(records)


def test_no_checkpoint_says_which_command_makes_one(tmp_path):
    with pytest.raises(ScoreError, match="run.sh.*qualivision train"): Scorer.from_checkpoint(tmp_path)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    def changed(name, **values):
        folder = tiny.checkpoint(tmp_path/name)
        return folder, json.loads((folder/"model.json").read_text())
    folder, _ = changed("damaged")
    with open(folder/"model.safetensors", "r+b") as f: f.truncate(1000)
    with pytest.raises(WeightsError): Scorer.from_checkpoint(folder, "cpu")
    other = tiny.checkpoint(tmp_path/"other")
    from dataclasses import asdict, replace

    from qualivision.models.dover_mos import DoverPlusPlus
    from qualivision.models.weights import load_checkpoint, save_checkpoint
    _, meta = load_checkpoint(other)
    save_checkpoint(other, DoverPlusPlus(replace(tiny.CONFIG, feature_dim=24)), {**meta, "config": asdict(tiny.CONFIG)})
    with pytest.raises(WeightsError, match="do not fit"): Scorer.from_checkpoint(other, "cpu")
    save_checkpoint(other, DoverPlusPlus(tiny.CONFIG), {k: v for k, v in meta.items() if k != "sampling"})
    with pytest.raises(ScoreError, match="lacks sampling"): Scorer.from_checkpoint(other, "cpu")
    save_checkpoint(other, DoverPlusPlus(tiny.CONFIG), {**meta, "text_encoder_key": "minilm-000000000000"})
    with pytest.raises(ScoreError, match="text encoder"): Scorer.from_checkpoint(other, "cpu")


def test_predict_writes_the_challenge_csv(scorer, root, tmp_path):
    copy = shutil.copytree(root, tmp_path/"set")
    lost = sorted((copy/"test"/"videos").iterdir())[1]
    lost.write_bytes(b"")
    records = predict(copy, "test", scorer, tmp_path/"out.csv")
    with open(tmp_path/"out.csv", newline="") as f: rows = list(csv.DictReader(f))
    assert tuple(rows[0]) == COLUMNS and [r["video_name"] for r in rows] == [Path(r.video).name for r in records]
    for row, r in zip(rows, records):
        values = [row[c] for c in COLUMNS[2:]]
        if Path(r.video) == lost: assert r.error and values == [""] * 5
        else: assert all(math.isclose(float(v), getattr(r, d), abs_tol=1e-5) for v, d in zip(values, DIMENSIONS))
    assert sum(r.error is not None for r in records) == 1


@pytest.fixture
def collection(root, tmp_path):
    "A folder with labels.csv; of its videos one is broken, one is missing, one lies beside the table."
    folder = tmp_path/"own"
    shutil.copytree(root/"test"/"videos", folder/"videos")
    a, b, *_ = sorted(p.name for p in (folder/"videos").iterdir())
    shutil.copy(folder/"videos"/a, folder/"beside.mp4"); (folder/"videos"/"broken.gif").write_bytes(b"no video")
    (folder/"labels.csv").write_text("Video,index,PROMPT,static_quality\n" + "".join(
        f'{n},7,"a red boat, at night",{m}\n' for n, m in ((a, "3"), ("broken.gif", ""), (b, "2.33"), ("gone.mp4", "4"), ("beside.mp4", ""))))
    return folder


def test_predict_a_folder_with_a_label_file(scorer, collection, tmp_path):
    records = predict(collection, None, scorer, tmp_path/"out.csv")
    with open(tmp_path/"out.csv", newline="") as f: rows = list(csv.DictReader(f))
    with open(collection/"labels.csv", newline="") as f: names = [r["Video"] for r in csv.DictReader(f)]
    assert tuple(rows[0]) == COLUMNS and [r["video_name"] for r in rows] == names and {r["Prompt"] for r in rows} == {"a red boat, at night"}
    assert [r.error is None for r in records] == [True, False, True, False, True]
    assert str(collection/"videos"/"broken.gif") in records[1].error and str(collection/"videos"/"gone.mp4") in records[3].error
    for row, r in zip(rows, records):
        assert all(row[c] == ("" if r.error else f"{getattr(r, d):.6f}") for c, d in zip(COLUMNS[2:], DIMENSIONS))
    direct = scorer.score(collection/"videos"/names[2], "a red boat, at night")
    assert [getattr(records[2], d) for d in DIMENSIONS] == pytest.approx([getattr(direct, d) for d in DIMENSIONS], abs=1e-5)
    assert records[4].overall == pytest.approx(records[0].overall, abs=1e-5)
    assert predict(collection, None, scorer, tmp_path/"out.csv", progress=False) == records


@pytest.mark.parametrize("text, message", {
    "video,prompt\na.mp4,x\na.mp4,y\n": "labels.csv line 3", "video,prompt\na.mp4,x,y\n": "labels.csv line 2: 3 cells, not 2",
    "video,prompt\n,x\n": "labels.csv line 2: there is no name", "video,scene\na.mp4,x\n": "labels.csv: no column holds prompts",
    "clip,prompt\na.mp4,x\n": "labels.csv: no column holds names", "video,prompt\n": "labels.csv: it has no rows"}.items())
def test_label_files_that_no_folder_can_have(scorer, collection, tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(Scorer, "opened", lambda *a: pytest.fail("it began to score"))
    (collection/"labels.csv").write_text(text)
    with pytest.raises(QualiVisionError, match=message): predict(collection, None, scorer, tmp_path/"out.csv")
    assert not (tmp_path/"out.csv").exists()


def test_a_folder_has_splits_or_all_of_its_rows(scorer, root, collection, tmp_path):
    with pytest.raises(DatasetError, match="no split test. Leave --split away"): predict(collection, "test", scorer, tmp_path/"out.csv")
    copy = shutil.copytree(root, tmp_path/"set")
    shutil.copy(collection/"labels.csv", copy)                      # beside splits it says nothing
    predict(copy, None, scorer, tmp_path/"none.csv"), predict(root, "test", scorer, tmp_path/"test.csv")
    assert (tmp_path/"none.csv").read_text() == (tmp_path/"test.csv").read_text()


def test_where_nothing_can_be_written_is_known_before_the_first_video(scorer, root, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "opened", lambda *a: pytest.fail("it began to score"))
    (tmp_path/"file").touch()
    for out, cause in ((tmp_path, "it is a folder"), (tmp_path/"file"/"out.csv", "nothing can be written")):
        with pytest.raises(FileError, match=cause): predict(root, "test", scorer, out)


def test_an_address_is_told_to_be_one(scorer):
    with pytest.raises(VideoError, match="https://example.com/a.mp4: it is an address.*Download"): scorer.score("https://example.com/a.mp4", "a boat")


def test_a_trained_checkpoint_scores(root, tmp_path):
    "From training to a score, nothing given by hand but the folder."
    result = tiny.train(root, tmp_path, epochs=1, warmup_steps=0)
    record = Scorer.from_checkpoint(result["checkpoint"], "cpu").score(root/"val"/"videos"/"A_0002.mp4", "a red boat")
    assert record.error is None and record.trained_on == f"simulated labels (tiny), data {result['data_hash'][:12]}"
