"Scores that a model has not learned: null until somebody asks, then another's, and marked in every form of answer."
import csv
import re
from dataclasses import replace
from pathlib import Path


import pytest
import tiny
import torch
from test_own_opinions import Colours
from torch import nn
from torch.nn import functional as F

from qualivision.data.sampling import Sampling
from qualivision.inference.score import LAION, SIMULATED, STRANGERS, Scorer
from qualivision.models import frames_mos
from qualivision.models.store import REGISTRY, pull
from qualivision.models.towers import CLIP, CLIP_LARGE, TOWERS, load_clip, load_tower
from qualivision.models.weights import WeightsError, read_state
from qualivision.official.cover import IMAGE_ENCODER
from qualivision.quality import DIMENSIONS
from qualivision.toy import toy_clip, toy_clip_model

NULL = ("aesthetic", "overall")
PROMPT = "a red ball"


@pytest.fixture
def room(tmp_path, monkeypatch):
    "A clip and a set of it; a tower that sees colours; no weights that somebody pulled."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUALIVISION_WEIGHTS", str(tmp_path/"w"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"hub"))
    monkeypatch.setattr(frames_mos, "load_tower", lambda name=None: Colours().eval())
    load_tower.cache_clear()
    (tmp_path/"set"/"videos").mkdir(parents=True)
    toy_clip(tmp_path/"set"/"videos"/"a.mp4", (200, 30, 30))
    (tmp_path/"set"/"labels.csv").write_text(f"video,prompt\na.mp4,{PROMPT}\n")
    yield tmp_path
    load_tower.cache_clear()


ONE = "score", "set/videos/a.mp4", "--prompt", PROMPT, "--device", "cpu"


def test_simulated(room):
    "With the option the number of the simulated model, marked in JSON, text and tables; without it null (in the tables too: test_frames)."
    tiny.checkpoint(SIMULATED)
    found, = tiny.command(*ONE, "--json")[1]
    assert all(found[d] is found["learned_on"][d] is None and f"--simulated {d}" in found["reasons"][d] for d in NULL) and not found["warnings"]

    due = Scorer.from_checkpoint(SIMULATED, "cpu").score("set/videos/a.mp4", PROMPT)
    asked, = tiny.command(*ONE, "--simulated", "overall", "--json")[1]
    assert asked["overall"] == due.overall and asked["aesthetic"] is None
    assert asked["learned_on"]["overall"] == dict(data="simulated", raters=None, clips=None, srocc=None, interval=None, judged=None)
    assert asked["warnings"] == ["overall: simulated, by a model that has seen simulated clips alone"]
    assert all(asked[d] == found[d] for d in DIMENSIONS if d != "overall")                         # nothing else moves
    text = " ".join(tiny.command(*ONE, "--simulated", "overall")[1].split())
    assert re.search(rf"overall {due.overall:.2f} \S+ simulated note: overall: simulated", text) and "aesthetic – no human" in text
    assert "overall: simulated; not measured on people's opinions" in text
    for args in (("predict", "--data", "set"), ("score-set", "set/labels.csv", "--model", "qualivision")):
        status, _, err = tiny.command(*args, "--out", "out.csv", "--simulated", "overall", "--device", "cpu")
        assert status == 0, err
        with open("out.csv", newline="") as f: row, = csv.DictReader(f)
        assert float(row["Overall_MOS"]) == pytest.approx(due.overall, abs=1e-6) and row["Aesthetic_MOS"] == ""
        assert row["warnings"] == asked["warnings"][0]


def test_what_simulated_refuses(room):
    "A score that is there, an unknown one, another kind of model, and a checkpoint that learned from people."
    one = *ONE, "--simulated"
    assert tiny.command(*one, "beauty")[0] == 2
    status, _, err = tiny.command(*one, "temporal")
    assert status == 1 and "has a score of its own for it. Without one: aesthetic, overall" in " ".join(err.split())
    status, _, err = tiny.command(*one, "overall")
    assert status == 1 and "checkpoints/dover: there is no checkpoint" in err
    tiny.checkpoint(SIMULATED, trained_on="labels of TaobaoVD-GC")
    status, _, err = tiny.command(*one, "overall")
    assert status == 1 and "it has learned from labels of TaobaoVD-GC" in err
    status, _, err = tiny.command("score-set", "set/labels.csv", "--model", "dover", "--out", "s.csv", "--simulated", "overall")
    assert status == 2 and "go with --model qualivision" in " ".join(err.split())


def put_laion(room) -> nn.Linear:
    "A stand-in for LAION's line among the pulled weights."
    torch.manual_seed(1)
    line = nn.Linear(512, 1)
    nn.init.constant_(line.bias, 5.)
    (room/"w").mkdir(exist_ok=True)
    torch.save(line.state_dict(), room/"w"/REGISTRY[LAION].file)
    return line


def test_clip_and_its_line(room, monkeypatch):
    "Pulled weights give Aesthetic, and Alignment where it is asked for: the numbers of transformers' own forward."
    path, line = toy_clip_model(room/"hub", CLIP, REGISTRY[CLIP].revision, REGISTRY[CLIP].file), put_laion(room)
    one = *ONE, "--json"
    status, _, err = tiny.command(*one)
    assert status == 1 and "bytes, laion-aesthetic-b16 has 3,047" in err                             # it is not LAION's
    monkeypatch.setitem(REGISTRY, LAION, replace(REGISTRY[LAION], bytes=None, sha256=None))

    from transformers import CLIPModel          # seconds, that each process of the tests would spend while it collects
    theirs, towers = CLIPModel.from_pretrained(path.parent).eval(), load_tower(CLIP)
    frames = Sampling(16, 224)("set/videos/a.mp4").transpose(0, 1)                                   # (16,3,224,224)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([.48145466, .4578275, .40821073], [.26862954, .26130258, .27577711]))
    with torch.no_grad():
        seen = theirs.get_image_features((frames / 255 - mean) / std).pooler_output
        text = theirs.get_text_features(**towers.reader([PROMPT], return_tensors="pt")).pooler_output
        assert (towers(frames)["features"] - seen).abs().max() < 1e-6 * seen.abs().max() and torch.equal(towers.embed([PROMPT]), text)
        long = towers.embed([" ".join([PROMPT] * 40)])
        assert long.isfinite().all() and not any(p.requires_grad for p in towers.parameters())
        aesthetic, near = line(F.normalize(seen, dim=1)).mean(), (F.normalize(seen, dim=1) @ F.normalize(text, dim=1)[0]).mean()
    record, = tiny.command(*one)[1]
    assert record["aesthetic"] == pytest.approx(1 + 4 * (float(aesthetic) - 1) / 9, abs=1e-5) and record["overall"] is None
    assert "LAION" in record["learned_on"]["aesthetic"]["data"] and record["learned_on"]["aesthetic"]["interval"] is None
    assert record["learned_on"]["alignment"]["data"].startswith("no opinions; scale: FETV") and "LAION" in record["warnings"][0]
    chosen, = tiny.command(*one, "--clip-score", "--contrast")[1]
    assert chosen["alignment"] == pytest.approx(1 + 4 * min(max(2.5 * float(near), 0), 1), abs=1e-5)
    assert "CLIP-score" in chosen["learned_on"]["alignment"]["data"] and chosen["aesthetic"] == record["aesthetic"]
    with torch.no_grad(): others = F.normalize(towers.embed(list(STRANGERS)), dim=1) @ F.normalize(seen, dim=1).mean(0)
    assert chosen["contrast"]["strangers"]["rank"] == 1 + int((others >= near).sum())


def test_clip_that_is_absent_or_another(room):
    "The command that brings it; another revision does not count; an exchanged file and another width are refused."
    record, = tiny.command(*ONE, "--json")[1]
    assert all(f"qualivision weights pull {name}`" in record["reasons"]["aesthetic"] for name in (CLIP, LAION))
    e = REGISTRY[CLIP]
    other = toy_clip_model(room/"hub", CLIP, "0" * 40, e.file)
    with pytest.raises(WeightsError, match=f"not on this machine.*weights pull {CLIP}"): load_tower(CLIP)
    with pytest.raises(WeightsError, match="512 wide, not 768"): load_clip(other, 768)
    path = toy_clip_model(room/"hub", CLIP, e.revision, e.file)
    load_tower(CLIP)
    load_tower.cache_clear()
    state = torch.load(path, weights_only=True)
    torch.save({k: v + 1 for k, v in state.items()}, path)
    with pytest.raises(WeightsError, match="the first download had"): load_tower(CLIP)
    (other.parent/"vocab.json").unlink()
    with pytest.raises(WeightsError, match="no tokeniser"): load_clip(other, 512).embed([PROMPT])
    (other.parent/"config.json").unlink()
    with pytest.raises(WeightsError, match="no config.json"): load_clip(other, 512)


def test_towers_say_what_they_are():
    "Licence and revision are the store's, so that neither can differ; COVER's tower is among them."
    assert CLIP_LARGE == IMAGE_ENCODER
    for name in (CLIP, CLIP_LARGE):
        tower, e = TOWERS[name], REGISTRY[name]
        assert (tower.licence, tower.trained_on) == (e.licence, e.trained_on) and len(e.revision) == 40 and tower.classes == 0
    with pytest.raises(Exception, match="names no classes"): frames_mos.FramesMos(frames_mos.FramesConfig(tower=CLIP))


@pytest.mark.online
def test_the_real_clip(room):
    "Pulls the real weights. Not run here: no way to the hub. A flower is nearer to its name than to others; LAION's line stays within 1 to 10."
    import matplotlib.pyplot as plt
    import sklearn
    from qualivision.data.sampling import resize_square
    line = nn.Linear(512, 1)
    line.load_state_dict(read_state(pull(LAION)))
    pull(CLIP)
    flower = plt.imread(Path(sklearn.__file__).parent/"datasets"/"images"/"flower.jpg")
    towers = load_tower(CLIP)
    with torch.no_grad():
        seen = F.normalize(towers(resize_square(flower[None], 224))["features"], dim=1)
        near = seen @ F.normalize(towers.embed(["a photo of a flower", "a photo of a dog", "a street at night"]), dim=1).T
    assert near.argmax() == 0 and 1 < float(line(seen)) < 10
