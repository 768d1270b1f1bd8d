"The DOVER++ five-MOS model: parity with the published numbers, and the published defects gone."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from qualivision.models.convnext3d import ConvNeXt3D, DepthwiseConv3d, Layers, PointwiseConv3d
from qualivision.models.fusion import QualityAwareFusion, SingleTokenFusion
from qualivision.models.registry import CONFIGS
from qualivision.models.dover_mos import DoverConfig, DoverPlusPlus
from qualivision.models.measures import STATISTICS
from qualivision.models.vjepa_mos import VJEPA_EMBEDDED, VJepaMos
from qualivision.models.documented import DocumentedDover, DocumentedVJepa, documented_dover
from qualivision.models.weights import WeightsError
from qualivision.quality import QualiVisionError
from weights_formula import clip, weight

SMALL = DoverConfig(frames=4, size=36, dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), kernel=(3, 5, 5), final_norm=False,
                    grid=(2, 2, 2), statistics=STATISTICS, stages=(0, 1, 2, 3), pooled_norm="batch",
                    feature_dim=32, text_dim=12, fusion_width=32)
SIX = ("dover_features", "text_features", "fused_features", "quality_weights", "aesthetic_score", "technical_score")


@pytest.fixture(scope="module")
def recorded(root):
    return np.load(root / "tests/fixtures/qualivision_parity.npz")


@pytest.fixture(scope="module")
def published(root):
    return json.loads((root / "tests/fixtures/qualivision_keys.json").read_text())


@pytest.fixture(scope="module")
def documented(published):
    return documented_dover({k: weight(k, shape) for k, shape in published["keys"].items()})


@pytest.fixture
def small():
    torch.manual_seed(0)
    return DoverPlusPlus(SMALL).eval()


def batch(config=SMALL, n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (n, 3, config.frames, config.size, config.size), dtype=torch.uint8, generator=g)
    return frames, torch.randn(n, config.text_dim, generator=g)


# ---------------------------------------------------------------- the documented form

def test_formula_of_the_fixtures():
    assert torch.allclose(weight("technical_backbone.patch_embed.proj.weight", (96, 3, 2, 4, 4)).flatten()[:3],
                          torch.tensor([-0.0787027553, 0.0678429827, 0.0465003662]), atol=1e-9)


def test_documented_form_gives_the_published_numbers(documented, recorded):
    frames, text = clip(0, recorded["small/input_shape"]), torch.from_numpy(recorded["small/text"])
    with torch.no_grad():
        out, features = documented(frames, text), documented.dover_model.backbone(frames)[-1]
    names = {"mos": "mos", "dover_features": "features", "fused_features": "fused"} | {k: k for k in SIX[3:]}
    for ours, theirs in names.items():
        assert np.abs(out[ours].numpy() - recorded[f"small/{theirs}"]).max() < 1e-4, ours
    assert tuple(features.shape) == tuple(recorded["small/backbone_features/shape"])
    at = features.flatten()[torch.arange(16) * (features.numel() - 1) // 15]
    assert np.abs(at.numpy() - recorded["small/backbone_features/at"]).max() < 1e-4
    assert set(out) == {"mos", *SIX} and torch.equal(out["text_features"], text)


def test_documented_form_has_the_published_names_and_counts(documented, published):
    state = documented.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == published["keys"] and list(state) == list(published["keys"])
    for name, count in published["parameter_counts"].items():
        if name.startswith("vjepa"): continue
        part = documented if name.endswith("total") else documented.get_submodule(name)
        assert sum(p.numel() for p in part.parameters()) == count, name


def test_documented_form_is_loaded_strictly(published):
    state = {k: torch.zeros(shape) for k, shape in published["keys"].items()}
    cut, more, other = dict(state), dict(state, extra=torch.zeros(1)), dict(state)
    del cut["fusion.text_proj.bias"]
    other["mos_predictor.predictor.7.bias"] = torch.zeros(4)
    for bad, word in ((cut, "fusion.text_proj.bias"), (more, "extra"), (other, "mos_predictor.predictor.7.bias")):
        with pytest.raises(WeightsError, match=word): documented_dover(bad)


def test_documented_form_takes_any_clip(documented):
    with torch.no_grad(): out = documented(torch.rand(1, 3, 3, 40, 72), torch.randn(1, 1024))
    assert out["mos"].shape == (1, 5) and not documented.training and out["mos"].dtype == torch.float32


# ---------------------------------------------------------------- defects of the published code, gone

def test_the_prompt_has_a_say(documented, small):
    "FACTS: over a single video token the softmax is 1, and the query is without effect."
    features = torch.randn(1, 1024)
    cat, dog = torch.randn(1, 1024), torch.randn(1, 1024)
    with torch.no_grad():
        assert torch.equal(documented.fusion.attend(features, cat), documented.fusion.attend(features, dog))
        tokens = torch.randn(1, small.fusion.places.shape[0], small.fusion.token_norm.normalized_shape[0])
        a, b = (small.fusion.attend(tokens, small.fusion.text_proj(torch.randn(1, 12)))[0] for _ in range(2))
        assert (a - b).norm() / a.norm() > 0.01
        frames, text = batch()
        assert (small(frames, text)["fused_features"] - small(frames, text.flip(0))["fused_features"]).abs().max() > 1e-3


def test_quality_weights_act():
    "FACTS: the four weights were computed and never used."
    torch.manual_seed(0)
    tokens, pooled, text = torch.randn(2, 9, 24), torch.randn(2, 24), torch.randn(2, 12)
    for fusion, acts in ((SingleTokenFusion(24, 12, 32, 4), False), (QualityAwareFusion(24, 12, 32, 4), True)):
        fused, weights = fusion(tokens, pooled, text)
        assert torch.allclose(weights.sum(1), torch.ones(2)) and (weights > 0).all()
        fused.sum().backward()
        assert all((p.grad is not None and p.grad.abs().sum() > 0) == acts for p in fusion.quality_classifier.parameters())
    fusion.eval()
    results = [fusion(tokens, pooled, text, F.one_hot(torch.tensor([a, a]), 4).float())[0] for a in range(4)]
    assert all((results[i] - results[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))


def test_different_clips_stay_different():
    "FACTS: 18 blocks without a residual, normalised over the clip as a whole."
    def apart(**form):
        torch.manual_seed(0)
        net = ConvNeXt3D((8, 16, 24, 32), (3, 3, 9, 3), kernel=(3, 3, 3), layers=Layers(**form))
        x = torch.randn(2, 3, 4, 64, 64)
        with torch.no_grad(): a, b = net(x)[-1]
        return ((a - b).norm() / a.norm()).item()
    assert apart(residual=False, norm="group") < 0.02 and apart(scale=0.5) > 0.5


def test_a_frame_does_not_change_the_others():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 5, 32, 32)
    y = x.clone()
    y[:, :, 4] = 0
    def moved(**form):
        torch.manual_seed(0)
        net = ConvNeXt3D((8, 8), (1, 1), kernel=(1, 3, 3), layers=Layers(**form))
        with torch.no_grad(): return (net(x)[-1] - net(y)[-1])[:, :, :4].abs().max()
    assert moved(scale=0.5) == 0 < moved(residual=False, norm="group")


def test_documented_forms_train():
    "Every parameter but the quality weights, which nothing reads, and what is frozen receives a gradient."
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (2, 3, 4, 36, 36), dtype=torch.uint8)
    tiny = replace(VJEPA_EMBEDDED, frames=4, size=36, patch=12, hidden_size=48, layers=4, encoder_heads=2, text_dim=12)
    for model, D in ((DocumentedDover((8, 8, 16, 16), (1, 1, 1, 1)), 1024), (DocumentedVJepa(tiny), 12)):
        out = model.train()(frames, torch.randn(2, D))
        sum(out[k].sum() for k in ("mos", "aesthetic_score", "technical_score") if k in out).backward()
        idle = {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
        assert idle == ({"quality_classifier"} if D == 1024 else set()) and all(v.isfinite().all() for v in out.values())


def test_every_parameter_learns(small):
    "The two extra heads and the quality weights included."
    frames, text = batch()
    out = small.train()(frames, text)
    sum(out[k].sum() for k in ("mos", "aesthetic_score", "technical_score")).backward()
    idle = [n for n, p in small.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert not idle


# ---------------------------------------------------------------- the default form

def test_published_size_runs_at_its_input():
    c = CONFIGS["published"]
    assert (c.frames, c.size, c.dims, c.depths, c.text_dim) == (64, 640, (96, 192, 384, 768), (3, 3, 9, 3), 1024)
    with torch.device("meta"):
        model = DoverPlusPlus(c)
        frames = torch.empty(1, 3, 64, 640, 640, dtype=torch.uint8)
        shapes = [tuple(m.shape) for m in model.dover_model.backbone(torch.empty(1, 3, 64, 640, 640))]
        out = model(frames, torch.empty(1, 1024))
    assert shapes == [(1, 96, 64, 160, 160), (1, 192, 64, 80, 80), (1, 384, 64, 40, 40), (1, 768, 64, 20, 20)]
    assert {k: tuple(v.shape) for k, v in out.items()} == dict(
        mos=(1, 5), dover_features=(1, 1024), text_features=(1, 1024), fused_features=(1, 256), quality_weights=(1, 4),
        aesthetic_score=(1, 1), technical_score=(1, 1))


def test_embedded_interface():
    c = CONFIGS["embedded"]
    model = DoverPlusPlus(c).eval()
    frames, text = batch(c, 1)
    with torch.no_grad(): six = model.extract_features(frames, text)
    assert tuple(six) == SIX and six["fused_features"].shape == (1, 256) and six["dover_features"].shape == (1, c.feature_dim)


def test_scores_are_on_the_scale(small):
    frames, text = batch()
    with torch.no_grad():
        fresh = small(frames, text)
        for p in small.mos_predictor.parameters(): p.mul_(100)
        wild = small(frames, text)["mos"]
    assert (fresh["mos"] - 3).abs().max() < 1 and (fresh["aesthetic_score"] - 3).abs().max() < 1
    assert wild.min() >= 1 and wild.max() <= 5 and (wild - 3).abs().max() > 1.5


def test_prompts_as_strings():
    class Encoder:
        calls = []
        def encode(self, prompts): self.calls.append(list(prompts)); return torch.ones(len(prompts), 12)
    model = DoverPlusPlus(SMALL, Encoder()).eval()
    frames, _ = batch()
    with torch.no_grad(): out = model(frames, ["a boat", "a tree"])
    assert Encoder.calls == [["a boat", "a tree"]] and out["text_features"].shape == (2, 12)
    assert not [k for k in model.state_dict() if "encoder" in k]
    with pytest.raises(QualiVisionError, match="one prompt per clip"): model(frames, ["a boat"])


def test_a_clip_is_scored_by_itself(small):
    frames, text = batch(n=4)
    with torch.no_grad(): assert torch.allclose(small(frames, text)["mos"][1:2], small(frames[1:2], text[1:2])["mos"], atol=1e-5)


def test_eight_bit_and_float_frames_agree(small):
    frames, text = batch()
    with torch.no_grad(): assert torch.allclose(small(frames, text)["mos"], small(frames / 255, text)["mos"], atol=1e-4)
    with pytest.raises(QualiVisionError, match="B,3,T,H,W"): small(frames.transpose(1, 2), text)


@pytest.mark.parametrize("change", [
    dict(pooled_norm="none"), dict(pooled_norm="batch"), dict(log_statistics=True), dict(stages=(-1, 3)),
    dict(statistics=("mean",)), dict(final_norm=True), dict(checkpointing=True), dict(stem=(2, 4, 4)), dict(wide=True), dict(stem_init="dct"),
    dict(token_stages=(0, 3), token_spread=True), dict(pooled_dropout=0.5, prompt_dropout=0.9)])
def test_every_option_trains(change):
    torch.manual_seed(0)
    model = DoverPlusPlus(replace(SMALL, **change)).train()
    model(*batch())["mos"].square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()) and model.dover_model.backbone[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("change", [dict(pooled_norm="x"), dict(fusion_width=30), dict(stem_init="x"), dict(stem_init="dct", stem=(2, 4, 4)),
                                    dict(stem_init="dct", dims=(4, 8, 16, 16))])
def test_unknown_options_are_refused(change):
    with pytest.raises(QualiVisionError): DoverPlusPlus(replace(SMALL, **change))


def test_unknown_statistic_and_setting_are_refused():
    with pytest.raises(QualiVisionError, match="statistic"): DoverPlusPlus(replace(SMALL, statistics=("median",)))(*batch())
    with pytest.raises(QualiVisionError, match="depth"): DoverConfig.of(dict(depth=3))


def gradients(model, **autocast):
    model.zero_grad()
    frames, text = batch(n=4)
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)): out = model(frames, text)
    F.mse_loss(out["mos"], torch.linspace(1, 5, 20).view(4, 5)).backward()
    return out["mos"].detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_training_repeats_bit_for_bit(small):
    (a, b), (c, d) = gradients(small), gradients(small)
    assert torch.equal(a, c) and torch.equal(b, d)


def test_bfloat16_is_close(small):
    "In the deep path. The wide one takes logarithms of answers near zero, whose slopes are steep: there the gradients agree less well."
    (a, b), (c, d) = gradients(small), gradients(small, bf16=True)
    assert (a - c).abs().max() < 0.05 and F.cosine_similarity(b, d, 0) > 0.98


@pytest.mark.parametrize("change", [dict(checkpointing=True)])
def test_roads_to_the_same_gradient(change):
    models = [DoverPlusPlus(c).eval() for c in (SMALL, replace(SMALL, **change))]
    models[1].load_state_dict(models[0].state_dict())
    models[1].dover_model.backbone.train()                                 # recomputation happens in training only; nothing else there differs
    (a, b), (c, d) = map(gradients, models)
    assert torch.allclose(a, c, atol=1e-5) and (b - d).norm() < 1e-4 * b.norm()


@pytest.mark.parametrize("name", ["embedded", "published"])
def test_a_batch_of_one_trains(name):
    "The last batch of an epoch may hold one clip."
    torch.manual_seed(0)
    sizes = dict(frames=4, size=36, dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), stem=(1, 4, 4), kernel=(1, 3, 3), fusion_width=32)
    model = DoverPlusPlus(replace(CONFIGS[name], **sizes)).train()
    model(*batch(model.config, 1))["mos"].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_other_prompts_share_the_encoded_clip(small):
    "Under a prompt that a clip was not made from, it is scored as if that had been its prompt."
    frames, text = batch(n=3)
    others = torch.randn(3, 2, 12)
    with torch.no_grad():
        out = small(frames, text, others)
        raw = [torch.logit((small(frames, t)["mos"][:, 1] - 1) / 4) for t in (text, others[:, 0], others[:, 1])]
    assert out["match_logits"].shape == (3, 3) and torch.allclose(out["match_logits"], torch.stack(raw, 1), atol=1e-4)
    assert "match_logits" not in small(frames, text)


@pytest.mark.parametrize("bank", [(), ("traditional",)])
@pytest.mark.parametrize("kind", ["dover", "vjepa2"])
def test_causes_asked_by_name(kind, bank):
    "The answers come out by themselves, add nothing at first, and depend on the prompt as they should."
    torch.manual_seed(0)
    named = dict(causes=("blur", "noise", "flicker"), attributes=("colour", "motion"), bank=bank)
    if kind == "dover": model = DoverPlusPlus(replace(SMALL, **named))
    else: model = VJepaMos(replace(VJEPA_EMBEDDED, frames=4, size=36, patch=12, hidden_size=48, layers=2, encoder_heads=2, grid=(2, 1, 1),
                                   text_dim=12, fusion_width=32, frozen_dtype="fp32", colours=("overall",) if bank else (), **named))
    model.eval()
    frames, text = batch()
    with torch.no_grad(): out, other = model(frames, text), model(frames, text.flip(0))
    assert out["severity"].shape == (2, 3) and out["agreement"].shape == (2, 2) and all(0 < x < 1 for x in out["severity"].flatten())
    assert torch.equal(out["severity"], other["severity"]) and not torch.equal(out["agreement"], other["agreement"])
    with torch.no_grad():
        before = out["mos"]
        model.causes.path.weight.normal_()
        assert not torch.allclose(model(frames, text)["mos"], before)      # and then they do
        model.causes.path.weight.zero_()
        assert torch.equal(model(frames, text)["mos"], before)
    plain = DoverPlusPlus(SMALL) if kind == "dover" else VJepaMos(VJEPA_EMBEDDED)
    assert not any(name.startswith("causes.") for name in plain.state_dict()) and "severity" in out and len(model.causes.names[0]) == 3


@pytest.mark.parametrize("change", [{}, dict(causes=("blur",), attributes=("colour",), bank=("traditional",), wide=True)])
def test_a_frozen_backbone_stays_and_can_be_kept(change):
    "It has no gradient and stays in eval mode; from what it made of each clip comes the same as from the clips; another backbone has another key."
    torch.manual_seed(0)
    model = DoverPlusPlus(replace(SMALL, freeze_backbone=True, pooled_norm="batch", **change)).train()
    frames, text = batch(n=3)
    kept = model.prefix(frames)
    assert model.frozen and not model.dover_model.backbone.training and not any(p.requires_grad for p in model.dover_model.backbone.parameters())
    outs = []
    for x in (frames, kept):
        torch.manual_seed(1); model.zero_grad()
        out = model(x, text)["mos"]
        out.sum().backward()
        outs.append((out.detach(), model.fusion.text_proj.weight.grad.clone()))
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])
    one, key = model.prefix(frames[1:2]), model.frozen_key()
    assert all(torch.equal(one[name], kept[name][1:2]) for name in kept)
    with torch.no_grad(): model.dover_model.backbone[0].weight.mul_(1.01)
    assert model.frozen_key() != key


def test_eight_clips_by_heart():
    torch.manual_seed(0)
    model = DoverPlusPlus(replace(SMALL, head_dropout=0.)).train()
    frames, text = batch(n=8)
    mos, optimiser = 1 + 4 * torch.rand(8, 5), torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        loss = F.mse_loss(model(frames, text)["mos"], mos)
        optimiser.zero_grad(); loss.backward(); optimiser.step()
    assert loss < 0.05 * mos.var()


# ---------------------------------------------------------------- layers

@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 7, 7), (3, 1, 1), (3, 5, 3), (7, 7, 7)])
@pytest.mark.parametrize("shape", [(2, 5, 4, 9, 8), (1, 3, 1, 2, 2), (3, 4, 8, 5, 16), (1, 2, 3, 5, 37)])     # the last one wider than a strip
def test_depthwise_gradients(kernel, shape):
    torch.manual_seed(0)
    layer, x = DepthwiseConv3d(shape[1], kernel), torch.randn(shape, requires_grad=True)
    def all_of(y): return [y, *torch.autograd.grad((y * y.detach().sin()).sum(), [x, layer.weight, layer.bias])]
    plain = F.conv3d(x, layer.weight, layer.bias, padding=layer.padding, groups=shape[1])
    for a, b in zip(all_of(layer(x)), all_of(plain)): assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    with torch.no_grad(): assert torch.allclose(layer(x), plain, atol=1e-5)


def test_depthwise_in_bfloat16():
    torch.manual_seed(0)
    layer, x = DepthwiseConv3d(8, (3, 7, 7)), torch.randn(2, 8, 6, 12, 12).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16): y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    exact = torch.autograd.grad(F.conv3d(x.float(), layer.weight, None, padding=layer.padding, groups=8).sum(), layer.weight)[0]
    assert (layer.weight.grad - exact).norm() < 0.01 * exact.norm()
    with pytest.raises(QualiVisionError, match="even"): DepthwiseConv3d(8, (3, 4, 4))


def test_pointwise_is_a_convolution():
    torch.manual_seed(0)
    layer, x = PointwiseConv3d(5, 7), torch.randn(2, 5, 3, 4, 6)
    assert torch.allclose(layer(x), F.conv3d(x, layer.weight, layer.bias), atol=1e-5)


def test_statistics_of_input_and_stages_are_counted():
    for stages, channels in (((3,), 16), ((0, 1, 2, 3), 48), ((-1, 0), 3 + 8)):
        model = DoverPlusPlus(replace(SMALL, stages=stages))
        assert model.dover_model.feature_extractor[0].in_features == len(STATISTICS) * channels


# ---------------------------------------------------------------- a GPU, where there is one

@pytest.mark.cuda
def test_gpu_gives_the_same_scores(small):
    frames, text = batch()
    with torch.no_grad():
        here = small(frames, text)["mos"]
        there = small.cuda()(frames.cuda(), text.cuda())["mos"].cpu()
    assert torch.allclose(here, there, atol=2e-3)
