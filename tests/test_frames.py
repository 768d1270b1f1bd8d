"The scorer that the package carries: its towers see, its opinions are named, and what it has not learned is null with a reason."
import json
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import tiny
import torch

from qualivision.files import PACKAGE
from qualivision.inference.score import Scorer
from qualivision.models.class_names import class_embeddings, class_names, embed_names
from qualivision.models.frames_mos import FramesMos, stage_changes
from qualivision.models.text import TextEncoder
from qualivision.models.towers import TOWERS, load_tower, tower_file
from qualivision.models.weights import WeightsError, checkpoint_folder, load_checkpoint
from qualivision.quality import DIMENSIONS

ROOT = Path(__file__).parents[1]
UNKNOWN = ("aesthetic", "overall")      # no opinions on them were at hand


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    at = tmp_path_factory.mktemp("frames")/"a.mp4"
    tiny.clip(at, (200, 30, 30))
    return at


@pytest.fixture(scope="module")
def scorer() -> Scorer: return Scorer.from_checkpoint(device="cpu")


def test_a_score_without_training(scorer, clip):
    "Three dimensions have scores, two are null with a reason; each says what it has learned."
    r = scorer.score(clip, "a red boat")
    assert r.model == "frames" and r.checkpoint == "qualivision/frames" and "FETV" in r.trained_on
    for d in DIMENSIONS:
        score, about = getattr(r, d), r.learned_on[d]
        if d in UNKNOWN: assert score is None and about is None and "opinions" in r.reasons[d]
        else: assert 1 < score < 5 and about["clips"] >= 40 and about["raters"] == 3 and len(about["interval"]) == 2
    other = scorer.score(clip, "a plate of spaghetti")
    assert other.traditional == r.traditional and other.temporal == r.temporal and other.alignment != r.alignment


def test_null_in_every_form_of_answer(clip, tmp_path):
    "JSON of score, the lines for people, the CSV of predict, the table of score-set."
    def call(*args):
        done = subprocess.run([sys.executable, "-c", "from qualivision.cli import main; main()", *map(str, args)], cwd=tmp_path, text=True,
                              capture_output=True, env={**__import__("os").environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        return done.stdout
    record, = json.loads(call("score", clip, "--prompt", "a red boat", "--json"))
    assert all(record[d] is None and record["learned_on"][d] is None and record["reasons"][d] for d in UNKNOWN)
    shown = " ".join(call("score", clip, "--prompt", "a red boat").split())
    assert "no human opinions" in shown and "traditional: FETV" in shown
    (tmp_path/"set"/"videos").mkdir(parents=True)
    (tmp_path/"set"/"videos"/"a.mp4").write_bytes(clip.read_bytes())
    (tmp_path/"set"/"labels.csv").write_text("video,prompt\na.mp4,a red boat\n")
    call("predict", "--data", "set", "--out", "p.csv")
    cells = (tmp_path/"p.csv").read_text().splitlines()[1].split(",")
    assert [bool(c) for c in cells[2:]] == [d not in UNKNOWN for d in DIMENSIONS]
    call("score-set", "set/labels.csv", "--model", "qualivision", "--out", "s.csv")
    head, row = (line.split(",") for line in (tmp_path/"s.csv").read_text().splitlines()[:2])
    found = {name.lower(): cell for name, cell in zip(head, row)}
    assert all(bool(found.get(d, found.get(f"{d}_mos"))) == (d not in UNKNOWN) for d in DIMENSIONS), head


def test_the_package_carries_it():
    "Both files under 1 MB, strictly loaded, and named by the patterns with which the wheel is built."
    at = checkpoint_folder("qualivision/frames")
    state, meta = load_checkpoint(at)
    FramesMos().load_state_dict(state)
    setup = (ROOT/"setup.py").read_text()
    for file in (at/"model.json", at/"model.safetensors", PACKAGE/"models"/"class_names.json", PACKAGE/"models"/"class_embeddings.safetensors"):
        assert file.stat().st_size < 1e6
    assert '"weights/*/*"' in setup and '"*.safetensors"' in setup and fnmatch("weights/frames/model.json", "weights/*/*")
    assert "CC BY 4.0" in meta["licence"] + meta["trained_on"] and set(meta["learned_on"]) == set(DIMENSIONS)


def test_a_tower_that_was_exchanged_is_refused(tmp_path, monkeypatch):
    from dataclasses import replace
    tower = TOWERS["efficientnet-lite0"]
    with pytest.raises(WeightsError, match="not the file that was published"): tower_file(replace(tower, sha256="1" * 64))
    with pytest.raises(WeightsError, match="pip install"): tower_file(replace(tower, package="not_there"))
    assert not any(p.requires_grad for p in load_tower().parameters())


def test_shipped_embeddings_are_those_of_the_names():
    "Of every hundredth class."
    encoder, rows = TextEncoder("minilm"), class_embeddings()
    for k in range(0, 1000, 100): assert torch.allclose(encoder.embed(class_names()[k]), rows[k], atol=1e-3)
    assert embed_names.__doc__ and rows.norm(dim=1).allclose(torch.ones(1000))


def test_changes_do_not_depend_on_the_size_of_the_features():
    x = torch.randn(2, 16, 8) + 2
    assert torch.allclose(stage_changes(x), stage_changes(100 * x), atol=1e-3)
    assert (stage_changes(x.flip(1))[:, :3] - stage_changes(x)[:, :3]).abs().max() < 1e-4      # nor on the direction of time
