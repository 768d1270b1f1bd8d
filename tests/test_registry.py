"A third five-MOS model is one file and one entry: the rest of the package asks the registry."
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from third_model import ENTRY, ColourConfig, ColourMos

from qualivision.data.sampling import Sampling
from qualivision.inference.score import Scorer, ScoreError
from qualivision.models.bodies import save_body
from qualivision.models.dover_mos import EMBEDDED, DoverPlusPlus
from qualivision.models.frames_mos import FramesMos
from qualivision.models.registry import CONFIGS, MODELS, compared, entry_of, load_body, register, unregister
from qualivision.models.vjepa_mos import VJEPA_EMBEDDED, VJepaMos
from qualivision.models.weights import WeightsError, save_checkpoint
from qualivision.pipeline.params import read_json
from qualivision.pretraining.lessons import CAUSE_NAMES
from qualivision.pretraining.masked import PretrainConfig
from qualivision.pretraining.tasks import CauseTasks, asking, silence
from qualivision.quality import DIMENSIONS, QualiVisionError
from qualivision.toy import TOY, label_file, toy_clip, toy_set


@pytest.fixture
def third():
    yield register(ENTRY)
    unregister(ENTRY.name)


def test_models_are_known_by_all_their_names():
    assert list(MODELS) == ["dover", "vjepa2", "frames"] and compared() == ["dover", "vjepa2"]      # the last is off the default path
    assert list(CONFIGS) == ["published", "embedded", "vjepa2_published", "vjepa2_embedded", "frames"]
    with torch.device("meta"): models = DoverPlusPlus(EMBEDDED), VJepaMos(VJEPA_EMBEDDED)
    models += (FramesMos(),)
    for entry, model in zip(MODELS.values(), models):
        config = model.config
        assert all(entry_of(x) is entry for x in (entry.name, entry.checkpoint, model, type(model), config, type(config)))
        assert config in entry.configs.values() and entry.config is type(config)
    for unknown in ("x", 3, torch.nn.Linear(1, 1)):
        with pytest.raises(QualiVisionError, match="There are: dover, vjepa2"): entry_of(unknown)


@pytest.mark.parametrize("change, cause", [
    (dict(name="dover"), "there is a model of this name"), (dict(checkpoint="dover++"), "carry the name"),
    (dict(configs={"embedded": ColourConfig()}), "is taken"), (dict(marks="x"), "two signs"), (dict(model=torch.nn.Linear), "no FiveMos")])
def test_an_entry_that_is_wrong_is_refused(change, cause):
    before = list(MODELS), list(CONFIGS)
    with pytest.raises(QualiVisionError, match=cause): register(replace(ENTRY, **change))
    assert (list(MODELS), list(CONFIGS)) == before


def test_a_third_model_scores(third, tmp_path):
    "From a checkpoint folder, by the name that it carries; without its entry the checkpoint is refused."
    torch.manual_seed(0)
    model, config = third.build(ColourConfig()).model, ColourConfig()
    save_checkpoint(tmp_path/"c", model, dict(model=third.checkpoint, config=asdict(config), sampling=asdict(Sampling(config.frames, config.size)),
                                              text_encoder="minilm", trained_on="nothing", licence="MIT"))
    toy_clip(tmp_path/"a.mp4", (200, 30, 30))
    scorer = Scorer.from_checkpoint(tmp_path/"c", "cpu")
    one = scorer.score(tmp_path/"a.mp4", "a red boat")
    with torch.no_grad(): mos = model.eval()(scorer.sampling(tmp_path/"a.mp4")[None], scorer.encoder.encode(["a red boat"]))["mos"][0]
    assert one.model == "mean-colours" and torch.allclose(torch.tensor([getattr(one, d) for d in DIMENSIONS]), mos, atol=1e-5)
    assert isinstance(scorer.model, ColourMos) and entry_of(scorer.model) is third
    half = Scorer.from_checkpoint(tmp_path/"c", "cpu", precision="bf16").score(tmp_path/"a.mp4", "a red boat")
    assert half.model == "mean-colours in bf16" and 0 < abs(half.overall - one.overall) < .1
    unregister(third.name)
    with pytest.raises(ScoreError, match="dover\\+\\+ and vjepa2"): Scorer.from_checkpoint(tmp_path/"c", "cpu")
    register(third)


def test_a_third_model_is_pretrained(third, tmp_path):
    "It is asked for causes, and its body becomes a network again; a body of no known model is refused by its class."
    config = asking(ColourConfig())
    assert config.causes == CAUSE_NAMES and config.frames == ColourConfig().frames
    model = third.build(config).model
    frames, text = torch.randint(0, 256, (4, 3, 4, 32, 32), dtype=torch.uint8), torch.randn(4, 3, 384)
    out = CauseTasks(model, PretrainConfig())(frames, text)
    assert out["severity"].shape == (4, 10) and out["match"].shape == (4, 3) and out["agree"].shape == (4, 3, 6)
    silence(model)
    save_body(tmp_path/"body", model, dict(config=asdict(config), licence="MIT"))
    body = load_body(tmp_path/"body")
    assert type(body) is ColourMos and body.config == config
    with torch.no_grad(): out, own = body(frames, text[:, 0], text[:, 1:]), model.eval()(frames, text[:, 0])
    assert torch.equal(out["mos"], torch.full((4, 5), 3.)) and out["match_logits"].shape == (4, 3) and "quality_weights" not in out
    assert torch.allclose(out["severity"], own["severity"], atol=.01)          # of weights in eight bits
    unregister(third.name)
    with pytest.raises(WeightsError, match="a body of ColourMos"): load_body(tmp_path/"body")
    register(third)


def unrated(root: Path, dimension: str):
    "Takes all opinions on one dimension out of a data set, and one clip's on Temporal."
    for split in ("train", "val", "test"):
        file = label_file(root, split)
        table = pd.read_csv(file)
        table[f"{dimension.capitalize()}_MOS"] = None
        if split == "train": table.loc[3, "Temporal_MOS"] = None
        table.to_csv(file, index=False)


TRAIN = dict(epochs=2, batch_size=8, accumulation=1, warmup_steps=1, aux_weight=0., precision="fp32", tracker="none", device="cpu", augment=False)


def test_models_go_the_whole_road_with_opinions_on_some_dimensions(third, tmp_path, monkeypatch):
    """Training, evaluation, comparison, report and score, by parameters alone; nobody judged Overall. So do the frames model's lines,
    on a frozen tower."""
    from qualivision.pipeline import compare, evaluate, prepare, report, train
    monkeypatch.chdir(tmp_path)
    unrated(toy_set(tmp_path/"data", train=8, val=4, test=6, rated=("train", "val", "test")), "overall")
    values = yaml.safe_load((Path(__file__).parents[1]/"params.yaml").read_text())
    section = dict(model=dict(config="colours_tiny", width=8, frames=4, size=32), pretrained=None, train=TRAIN)
    frames = dict(values["embedded"]["frames"], model=dict(config="frames", **TOY["frames"]))
    frames["train"] |= dict(epochs=2, warmup_steps=1, tracker="none", device="cpu")
    values["embedded"] |= {third.name: section, "frames": frames, "prepare": {"workers": 0}}
    values["embedded"]["evaluate"] |= {"device": "cpu", "resamples": 50}
    for model in ("dover", "vjepa2"): values["embedded"][model]["model"] |= {"frames": 4, "size": 32}
    (tmp_path/"params.yaml").write_text(yaml.safe_dump(values))
    prepare.main()
    models = (third.name, "frames")
    for name in models:
        best = train.main(name, progress=False)["best"]
        assert best["over"] == "traditional alignment aesthetic temporal" and best["score"] is not None
        evaluate.main(name)
        scorer = Scorer.from_checkpoint(tmp_path/"checkpoints"/name, "cpu")
        record = scorer.score(tmp_path/"data"/"test"/"videos"/"A_0012.mp4", "a red boat")
        assert record.model == MODELS[name].checkpoint and all(1 <= getattr(record, d) <= 5 for d in DIMENSIONS[:4])
        assert record.overall is None and "opinions" in record.reasons["overall"] and record.learned_on["overall"] is None
        assert [record.learned_on[d]["clips"] for d in DIMENSIONS[:4]] == [16, 16, 16, 15]
    lines = scorer.model.heads
    assert type(scorer.model) is FramesMos and lines["match"].weight[1] != 0 and all(lines[part].weight[0].any() for part in ("picture", "change"))
    assert not any(head.weight[4].any() or head.bias[4] for head in lines.values())              # nobody taught it
    results = compare.main(models=models)
    report.main()
    for row in (*models, "constant", "hand_crafted"): assert results[row]["overall"]["srocc"]["reason"] == "there is no label"
    assert all(results[m][d]["mae"]["value"] is not None and results[m][d]["n"] == 12 for m in models for d in DIMENSIONS[:4])
    assert read_json("results/summary.json")["frames"]["mean_over"] == list(DIMENSIONS[:4])
    page = (tmp_path/"results"/"README.md").read_text()
    assert third.title in page and "opinions on the 16 videos of train: Temporal 15, Overall no" in page and "of traditional, alignment" in page
