"V-JEPA 2: parity of the published head, freezing, the feature cache in training, real checkpoint files, and both phases through a kill."
import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from qualivision.models.registry import CONFIGS
from qualivision.models.vjepa_mos import VJepaConfig, VJepaMos, pretrained_vjepa
from qualivision.models.documented import documented_vjepa_head
from qualivision.models.vjepa2 import (
    EncoderReport, VideoEncoder, encoder_config, freeze_bottom, load_encoder)
from qualivision.models.frozen import FeatureCache
from qualivision.models.weights import WeightsError, load_checkpoint
from qualivision.toy import TOY, toy_set
from qualivision.training import loop
from qualivision.training.train import (
    Task, keep_features, model_config, prepare_data, sampling_of, train_model)
from qualivision.training.step import TrainError
from qualivision.training.step import parameter_groups
from qualivision.training.loop import start_run, take_step
from weights_formula import normals, weight

CONFIG = model_config("vjepa2_embedded", {**TOY["vjepa2"], "layers": 6, "hidden_size": 48, "encoder_heads": 4})
ENCODER = dict(frames=4, size=32, hidden_size=48, num_hidden_layers=6, num_attention_heads=4, num_pooler_layers=1,
               pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=2)
pytestmark = pytest.mark.usefixtures("one_thread")
FROZEN = tuple(f"video.encoder.layer.{i}." for i in range(5)) + ("video.encoder.embeddings.",)


@pytest.fixture(scope="module")
def data(tmp_path_factory): return toy_set(tmp_path_factory.mktemp("data")/"set")


def train(data, folder, config=CONFIG, trunk=True, stop_after=None, task=None, **kw):
    "Two epochs of everything, then two with the bottom frozen."
    where = Task(data, folder/"out", folder/"runs", data.parent/"cache", trained_on="simulated labels (tiny)", **(task or {}))
    settings = tiny.settings(epochs=2, lr_multipliers={"text": .1, "video": .5, "head": 2.}, warmup_steps=1, **kw)
    return train_model(where, config, settings, replace(settings, lr_multipliers={}) if trunk else None, stop_after=stop_after, progress=False)


# --- the published head ---

@pytest.mark.parametrize("text_dim", [1024, 768])
def test_published_head_gives_the_published_numbers(root, text_dim):
    recorded = np.load(root/"tests/fixtures/qualivision_parity.npz")[f"vjepa_head/dv1408_dt{text_dim}/mos"]
    width = 1408 + text_dim
    shapes = {"0.weight": (width,), "0.bias": (width,), "1.weight": (512, width), "1.bias": (512,), "4.weight": (256, 512), "4.bias": (256,),
              "7.weight": (5, 256), "7.bias": (5,)}
    head = documented_vjepa_head({f"head.net.{k}": weight(f"head.net.{k}", shape) for k, shape in shapes.items()})
    video, text = (torch.from_numpy(normals(seed, (2, d)).astype(np.float32)) for seed, d in ((3, 1408), (4, text_dim)))
    with torch.no_grad(): assert np.abs(head(video, text).numpy() - recorded).max() < 1e-5
    with pytest.raises(WeightsError, match="head.net.7.bias"):
        documented_vjepa_head({f"head.net.{k}": weight(f"head.net.{k}", shape) for k, shape in shapes.items() if k != "7.bias"})


# --- freezing ---

def test_giant_has_34_of_40_layers_frozen():
    with torch.device("meta"): model = VJepaMos(CONFIGS["vjepa2_published"])
    report = model.freeze(0.85)
    print(report)
    assert (report.layers_frozen, report.layers) == (34, 40)
    encoder = freeze_bottom(model.video.encoder, 0.85)
    assert (encoder.frozen, encoder.frozen + encoder.trainable) == (860_670_080, 1_012_173_952)      # published: 85 % of 1,012.2 M
    assert not [n for n, _ in model.named_parameters() if n.startswith("video.predictor")]


def test_frozen_stays_bit_equal_in_eval_and_without_gradients(data, tmp_path):
    sets = prepare_data(data, sampling_of(CONFIG), tiny_text(), data.parent/"cache", progress=False)
    model = VJepaMos(CONFIG)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = start_run(model, sets.train, None, tiny.settings(weight_decay=.5, lr_multipliers={"head": 2.}), tmp_path/"run")
    held = {id(p) for g in run.optimizer.param_groups for p in g["params"]}
    from qualivision.data.clips import collate
    for _ in range(3): take_step(run, [collate([sets.train[i] for i in range(4)])])
    for name, p in model.named_parameters():
        low = name.startswith(FROZEN)
        assert torch.equal(p, before[name]) == low, name
        assert (p.grad is None or not p.grad.any()) if low else id(p) in held, name
        assert not low or (p.grad is None and id(p) not in held and not p.requires_grad), name
    frozen = {m for n, m in model.named_modules() if n.startswith(FROZEN) or n + "." in FROZEN}
    assert {m.training for m in frozen} == {False} and model.video.encoder.layer[5].training and model.fusion.training


def tiny_text():
    from qualivision.models.text import TextEncoder
    return TextEncoder("minilm")


def test_everything_that_may_learn_receives_a_gradient(data):
    for options in ({}, {"pooling": "mean"}, {"pooling": "first"}, {"freeze": 1.}, {"freeze": 0.}):
        torch.manual_seed(0)
        model = VJepaMos(replace(CONFIG, **options)).train()
        with torch.no_grad():
            for p in model.parameters(): p.add_(0.01 * torch.randn_like(p))          # what begins at zero passes nothing on
        model(torch.randint(0, 256, (3, 3, 4, 32, 32), dtype=torch.uint8), torch.randn(3, 384))["mos"].square().sum().backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())], options


def test_rates_follow_the_roles():
    model, rates = VJepaMos(CONFIG), {}
    for g in parameter_groups(model, 1e-2, 2e-4, {"text": .1, "video": .5, "head": 2.}): rates.setdefault(g["role"], set()).add(round(g["lr"], 9))
    assert rates == {"text": {2e-5}, "video": {1e-4}, "head": {4e-4}}
    roles = {model.role(n) for n, p in model.named_parameters() if n.startswith("video.encoder.") and p.requires_grad}
    assert roles == {"video"} and model.role("fusion.text_proj.weight") == "text" and model.role("video.pooler.query_tokens") == "head"
    with pytest.raises(TrainError, match="lr_multipliers"): tiny.settings(lr_multipliers={"eyes": 1.})


# --- the feature cache ---

@pytest.mark.parametrize("dtype, freeze, pooling", [("fp32", .85, "attentive"), ("bf16", .85, "attentive"), ("fp32", 1., "mean")])
def test_training_from_the_cache_is_training_without_it(data, tmp_path, dtype, freeze, pooling):
    "Equal to the bit, in both types: the frozen part computes one clip at a time with and without the cache."
    config = replace(CONFIG, frozen_dtype=dtype, freeze=freeze, pooling=pooling)
    runs = {kept: train(data, tmp_path/str(kept), config, trunk=False, task={"feature_cache": kept}) for kept in (True, False)}
    assert runs[True]["history"] == runs[False]["history"] and runs[True]["history"][0]["loss"] > 0
    one, two = (load_checkpoint(tmp_path/str(kept)/"out")[0] for kept in (True, False))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_cached_features_are_small_where_everything_is_frozen(data, tmp_path):
    sets = prepare_data(data, sampling_of(CONFIG), tiny_text(), data.parent/"cache", progress=False)
    for freeze, names in ((.85, {"statistics", "places", "colours", "tokens"}), (1., {"statistics", "places", "colours", "features", "grid"})):
        model = VJepaMos(replace(CONFIG, freeze=freeze, pooling="mean", frozen_dtype="bf16"))
        cache = FeatureCache(tmp_path, sets.val.cache, model)
        assert cache.build(sets.val.paths[:1], progress=False) == 1
        kept = cache.get(sets.val.paths[0])
        assert set(kept) == names and (freeze == 1 or kept["tokens"].dtype == torch.bfloat16)
    torch.manual_seed(1)
    other = FeatureCache(tmp_path, sets.val.cache, VJepaMos(replace(CONFIG, freeze=1., pooling="mean", frozen_dtype="bf16")))
    assert other.folder != cache.folder, "other weights, other features"


def test_a_damaged_file_of_features_is_made_again(data, tmp_path):
    sets = prepare_data(data, sampling_of(CONFIG), tiny_text(), data.parent/"cache", progress=False)
    torch.manual_seed(0)
    model, path = VJepaMos(CONFIG), sets.val.paths[0]
    cache = FeatureCache(tmp_path, sets.val.cache, model)
    cache.build([path], progress=False)
    want, file = {k: v.clone() for k, v in cache.get(path).items()}, cache.file(path)
    file.write_bytes(file.read_bytes()[:-100])
    assert cache.build([path], progress=False) == 1 and all(torch.equal(v, want[k]) for k, v in cache.get(path).items())


def test_augmented_training_sees_mirrored_features(data, tmp_path):
    sets = prepare_data(data, sampling_of(CONFIG), tiny_text(), data.parent/"cache", augment=True, progress=False)
    clips, model = sets.train.cache, VJepaMos(CONFIG)
    real = clips.get                                                    # clips of one colour, and a ramp from left to right
    clips.get = lambda path, flip=False: (real(path) // 2 + torch.arange(32, dtype=torch.uint8)).flip(-1 if flip else ())
    keep_features(model, sets, tmp_path, "cpu", progress=False)
    path = sets.train.paths[0]
    with torch.no_grad(): mirrored = model.prefix(clips.get(path).flip(-1).unsqueeze(0))
    assert torch.equal(sets.train.cache.get(path, True)["tokens"], mirrored["tokens"][0])
    assert not torch.equal(sets.train.cache.get(path, True)["tokens"], sets.train.cache.get(path)["tokens"])


# --- two phases ---

def test_stopped_in_either_phase_and_resumed(data, tmp_path):
    "Trunk and main training have three steps an epoch and two epochs each; a stop after any of them changes nothing."
    whole = train(data, tmp_path/"whole")
    assert [r["phase"] for r in whole["history"]] == ["trunk"] * 2 + ["main"] * 2
    assert [r["epoch"] for r in whole["history"]] == [1, 2, 3, 4] and [r["step"] for r in whole["history"]] == [3, 6, 9, 12]
    for k in (2, 6, 8):
        first = train(data, tmp_path/str(k), stop_after=k)
        assert not (tmp_path/str(k)/"out").exists() and first["step"] in (k, k - 6)
        resumed = train(data, tmp_path/str(k))
        assert resumed["history"] == whole["history"]
        for file in ("model.safetensors", "model.json", "history.csv"):
            assert (tmp_path/str(k)/"out"/file).read_bytes() == (tmp_path/"whole"/"out"/file).read_bytes(), (k, file)
    about = json.loads((tmp_path/"whole"/"out"/"model.json").read_text())
    assert about["model"] == "vjepa2" and about["sampling"]["view"] == "square" and VJepaConfig.of(about["config"]) == CONFIG


def test_a_trunk_that_is_done_is_not_trained_again(data, tmp_path, monkeypatch):
    "A run that is taken up in its main phase takes no step of the trunk."
    train(data, tmp_path, stop_after=8)
    taken, real = [], loop.take_step
    monkeypatch.setattr(loop, "take_step", lambda run, group: taken.append(run.step) or real(run, group))
    train(data, tmp_path)
    assert taken == [2, 3, 4, 5]


def test_the_trunk_is_frozen_as_it_was_learned(data, tmp_path):
    "What is frozen after the first phase comes out of the second unchanged, and is not what it was at the start."
    train(data, tmp_path)
    final, _ = load_checkpoint(tmp_path/"out")
    torch.manual_seed(0)
    from qualivision.devices import seed_all
    seed_all(0)
    fresh = VJepaMos(CONFIG).state_dict()
    low = [k for k in final if k.startswith(FROZEN)]
    assert low and all(not torch.equal(final[k], fresh[k]) for k in low if k.endswith("weight") and final[k].ndim > 1)


def test_a_trunk_is_for_encoders_that_start_from_noise(data, tmp_path):
    with pytest.raises(TrainError, match="trunk"):
        train(data, tmp_path, task={"pretrained": "facebook/vjepa2-vitl-fpc64-256"})


# --- checkpoints ---

@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A pretrained model and a fine-tune, as transformers writes them; the weights are random."
    from transformers import VJEPA2ForVideoClassification, VJEPA2Model
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, make in (("pretrained", VJEPA2Model), ("ssv2", VJEPA2ForVideoClassification)):
        torch.manual_seed(0)
        with contextlib.redirect_stderr(io.StringIO()): make(encoder_config(**ENCODER)).save_pretrained(folder/name)
    with contextlib.redirect_stderr(io.StringIO()): make(encoder_config(**ENCODER)).save_pretrained(folder/"shards", max_shard_size="200KB")
    return folder


def test_training_starts_from_a_checkpoint_as_a_user_has_it(data, saved, tmp_path):
    result = train(data, tmp_path, trunk=False, task={"pretrained": str(saved/"ssv2")})
    final, about = load_checkpoint(tmp_path/"out")
    start = load_file(saved/"ssv2"/"model.safetensors")
    assert result["finished"] and about["pretrained"] == str(saved/"ssv2")
    assert torch.equal(final["video.encoder.layer.0.mlp.fc1.weight"], start["vjepa2.encoder.layer.0.mlp.fc1.weight"])
    assert not torch.equal(final["video.encoder.layer.5.mlp.fc1.weight"], start["vjepa2.encoder.layer.5.mlp.fc1.weight"])


def test_poolers_and_reports(saved):
    reports = {}
    for name in ("pretrained", "ssv2", "shards"):
        assert len(list((saved/name).glob("*.safetensors"))) == (1 if name != "shards" else len(list((saved/name).glob("model-*.safetensors"))))
        for pooling in ("attentive", "mean"): reports[name, pooling] = load_encoder(saved/name, pooling)[1]
    assert all(isinstance(r, EncoderReport) for r in reports.values())
    assert [r.pooler for r in reports.values()] == ["new", "none", "trained", "none", "trained", "none"]
    assert reports["ssv2", "attentive"].left == {"predictor": 39, "classifier": 2} and reports["ssv2", "mean"].left["pooler"] == 31
    assert "trained" in str(reports["ssv2", "attentive"]) and "39 tensors of the predictor left out" in str(reports["pretrained", "mean"])


@pytest.mark.parametrize("damage, told", [
    (lambda s: s.pop("encoder.layer.3.norm1.weight"), "1 missing: encoder.layer.3.norm1.weight"),
    (lambda s: s.update({"encoder.layer.6.norm1.weight": torch.ones(48)}), "1 unexpected: encoder.layer.6.norm1.weight"),
    (lambda s: s.update({"encoder.layernorm.bias": torch.ones(96)}), r"encoder.layernorm.bias \(96,\) for \(48,\)"),
    (lambda s: s.update({"decoder.weight": torch.ones(1)}), "`decoder`"),
    (lambda s: s.update({"encoder.layernorm.bias": torch.full((48,), float("nan"))}), "NaN"),
], ids=["missing", "extra", "shape", "foreign", "nan"])
def test_wrong_checkpoints_are_refused(saved, tmp_path, damage, told):
    state = load_file(saved/"pretrained"/"model.safetensors")
    damage(state)
    (tmp_path/"config.json").write_bytes((saved/"pretrained"/"config.json").read_bytes())
    save_file(state, tmp_path/"model.safetensors")
    with pytest.raises(WeightsError, match=told): load_encoder(tmp_path)


def test_an_encoder_of_another_size_is_refused(saved):
    with pytest.raises(WeightsError, match="num_hidden_layers 6 for 8"): pretrained_vjepa(replace(CONFIG, layers=8), saved/"pretrained")
    with pytest.raises(WeightsError, match="there is no config.json"): load_encoder(saved)


def test_attention_kernels_agree():
    "Eager and fused attention are one function, in a pass that is not theirs alone: through pooler and grid."
    torch.manual_seed(0)
    one = VideoEncoder(encoder_config(**ENCODER)).eval()
    two = VideoEncoder(encoder_config(**ENCODER, attention="eager")).eval()
    two.load_state_dict(one.state_dict())
    video = torch.randn(1, 4, 3, 32, 32)
    with torch.no_grad(): assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one(video), two(video)))


@pytest.mark.online
def test_real_checkpoint():
    "facebook/vjepa2-vitl-fpc64-256 from huggingface.co: every tensor of the encoder is there."
    from qualivision.models.vjepa2 import pretrained_folder
    _, report = load_encoder(Path(pretrained_folder("facebook/vjepa2-vitl-fpc64-256")), "mean")
    assert report.loaded.coverage == 1 and not report.loaded.missing


# --- the ablation ---

def test_ablation_in_miniature(data, tmp_path, monkeypatch):
    "Every variant and seed; a second call has nothing left to train and finds the same."
    import yaml

    from qualivision.experiments import ablation
    monkeypatch.chdir(tmp_path)
    train = dict(batch_size=4, accumulation=1, lr=1e-3, warmup_steps=1, device="cpu", epochs=9)
    model = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(CONFIG).items()}
    section = dict(model=dict(config="vjepa2_embedded", **model), pretrained="qualivision/vjepa2-embedded", trunk=None, train=train)
    scratch = dict(vjepa2=dict(trunk=dict(warmup_steps=2)))           # a trunk from noise, whatever the model starts from
    profile = dict(text=dict(encoder="minilm"), ablation=dict(seeds=[0, 1], trunk_epochs=1, epochs=1), vjepa2=section, scratch=scratch)
    whole = dict(profile="embedded", data=dict(root=str(data), seed=0, val_fraction=.1, test_fraction=.1), embedded=profile)
    (tmp_path/"params.yaml").write_text(yaml.safe_dump(whole))
    found = ablation.main()
    assert list(found) == list(ablation.VARIANTS) and all(len(v["srocc"]["overall"]["seeds"]) == 2 for v in found.values())
    assert "difference" not in found[ablation.DEFAULT] and len({v["srocc"]["mean"]["mean"] for v in found.values()}) == 5
    first = (tmp_path/"results"/"experiments"/"ablation.json").read_bytes()
    monkeypatch.setattr(ablation, "run_variant", None)
    ablation.main()
    assert (tmp_path/"results"/"experiments"/"ablation.json").read_bytes() == first
