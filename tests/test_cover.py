"Official COVER: names, shapes, and numbers of every stage, with weights and inputs from a formula; its image encoder against transformers."
import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from qualivision.official.cover import COVER, CLIPImage, ImageAttention, clip_from_transformers, overall
from qualivision.official.dover import ViewError, view_scores
from qualivision.models.weights import WeightsError, load_strict
from weights_formula import MAP, agrees, fill, outputs_of, view, views_of, weights_sha256

SMALL = dict(width=32, layers=2, heads=4, patch=8, size=32)


def small():
    torch.manual_seed(0)
    return COVER(CLIPImage(**SMALL)).eval()


def views(T=2, side=64, clips=1):
    return {name: view(i, (clips, 3, 1 if T == 1 else T if name == "semantic" else 2 * T, side, side)) for i, name in enumerate(COVER.views)}


def test_keys_and_shapes(official_keys):
    with torch.device("meta"): model = COVER()
    for module, name in ((model, "cover"), (model.clip, "clip")):
        state, want = module.state_dict(), official_keys[name]
        assert {k: list(v.shape) for k, v in state.items()} == want["keys"] and list(state) == list(want["keys"])
    assert sum(p.numel() for p in model.parameters()) == 61_016_895 and sum(p.numel() for p in model.clip.parameters()) == 303_966_208
    assert sorted(k for k in official_keys["cover"]["buffers"]) == sorted(dict(model.named_buffers()))


def test_every_stage_gives_the_official_numbers(official_numbers, official_keys):
    "One model for both cases; the image encoder alone is 1.2 GB. Until it has weights there is no score."
    model = COVER()
    with pytest.raises(WeightsError, match="load_clip"): model(views())
    fill(model), fill(model.clip)
    assert weights_sha256(model, official_keys["cover"]) == official_keys["cover"]["filled_sha256"]
    blocks = {f"clip_block_{i}": f"visual.transformer.resblocks.{i}" for i in (0, 11, 23)} | {"clip_ln_pre": "visual.ln_pre"}
    parts = {f"{v}_{what}": where for v, gate in (("technical", "smtc_gate_tech"), ("aesthetic", "smtc_gate_aesc"))
             for what, where in (("feature", f"{v}_backbone.norm"), ("gated", gate))}
    semantics = []
    hook = model.smtc_gate_tech.register_forward_pre_hook(lambda module, inputs: semantics.append(inputs[0]))
    for case in ("cover/alt", "cover/image"):
        with torch.no_grad(), outputs_of(model, parts.values()) as got, outputs_of(model.clip, [*blocks.values(), "visual"]) as image:
            maps = model(views_of(official_numbers, case, model.views))
        for name, where in blocks.items():
            x = image[where]                                                        # ours are pictures, tokens, channels
            agrees(x if name == "clip_ln_pre" else x.transpose(0, 1), official_numbers, f"{case}/act/{name}")
        agrees(image["visual"], official_numbers, f"{case}/act/clip_image_embedding")
        agrees(semantics.pop()[0], official_numbers, f"{case}/act/semantic_feature")
        for name, where in parts.items(): agrees(got[where], official_numbers, f"{case}/act/{name}")
        scores = view_scores(maps)
        for v in model.views:
            expected = official_numbers[f"{case}/{v}/score_map"]
            assert maps[v].shape == expected.shape and np.abs(maps[v].numpy() - expected).max() < MAP
            assert abs(scores[v].item() - official_numbers[f"{case}/{v}/score"]) < MAP
        assert abs(overall(scores).item() - official_numbers[f"{case}/overall"]) < 3 * MAP
    hook.remove()


def test_image_encoder_is_clips():
    "transformers' own, with random weights and no positions; and each tensor is accounted for."
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection
    shape = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, patch_size=8, image_size=32)
    torch.manual_seed(0)
    theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(**shape, projection_dim=768)).eval()
    with torch.no_grad():
        for p in theirs.parameters(): p.normal_(0, .3)
        theirs.vision_model.embeddings.position_embedding.weight.zero_()
    ours, state = CLIPImage(**SMALL), theirs.state_dict()
    assert load_strict(ours, clip_from_transformers(state)).coverage == 1
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert torch.allclose(ours(x), theirs(pixel_values=x).image_embeds, rtol=1e-4, atol=1e-4)

    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=shape, projection_dim=768)).state_dict()
    made = clip_from_transformers({**whole, "vision_model.embeddings.position_ids": torch.arange(17)})
    assert list(made) != [] and set(made) == set(ours.state_dict())
    with pytest.raises(WeightsError, match="no known part"): clip_from_transformers({**state, "vision_model.encoder.extra": torch.zeros(1)})
    for name in ("visual_projection.weight", "vision_model.encoder.layers.1.self_attn.k_proj.bias"):
        with pytest.raises(WeightsError, match=name): clip_from_transformers({k: v for k, v in state.items() if k != name})

    cover = COVER(CLIPImage(**SMALL))
    for form in (state, clip_from_transformers(state)):
        assert cover.load_clip(form).coverage == 1
    with torch.no_grad(): assert torch.equal(cover.clip(x), ours(x))
    with pytest.raises(WeightsError, match="do not fit"): COVER(CLIPImage(**{**SMALL, "layers": 1})).load_clip(state)


def test_no_positions_and_any_size():
    tower = CLIPImage(**SMALL).eval()
    x = torch.randn(1, 3, 36, 47)                                                   # 4×5 patches, 4 rows and 7 columns are dropped
    with torch.no_grad():
        a, rest = tower(x), tower(F.pad(x[..., :32, :40], (0, 7, 0, 4), value=9.))
        tower.visual.positional_embedding.add_(1)
        flipped = torch.cat([x[..., 8 * i:8 * i + 8, :] for i in (3, 2, 1, 0)], 2)
        assert torch.equal(a, rest) and torch.allclose(a, tower(flipped), atol=1e-4)


def test_heads_in_groups_are_heads_at_once():
    "Four at a time, and what is left over."
    torch.manual_seed(0)
    for heads in (1, 6, 16):
        attention, x = ImageAttention(96, heads), torch.randn(2, 5, 96)
        q, k, v = F.linear(x, attention.in_proj_weight).view(2, 5, 3, heads, 96 // heads).permute(2, 0, 3, 1, 4)
        at_once = attention.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 96))
        assert torch.allclose(attention(x), at_once, atol=1e-6)


def test_image_encoder_is_beside_the_model():
    "Not in its state, not among its parameters, frozen and in evaluation; but it moves with it."
    model = small().train()
    assert not [k for k in model.state_dict() if "visual" in k]
    assert not model.clip.training and not any(p.requires_grad for p in model.clip.parameters())
    assert model.double().clip.visual.proj.dtype == torch.float64 and model.float().clip.visual.proj.dtype == torch.float32
    twin = copy.deepcopy(model)
    assert twin.clip is not model.clip and torch.equal(twin.clip.visual.proj, model.clip.visual.proj)
    sum(m.mean() for m in model(views()).values()).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "prompt" not in n)


def test_a_file_without_gates_is_refused():
    model = small()
    state = model.state_dict()
    with pytest.raises(WeightsError, match="smtc_gate_tech"): load_strict(model, {k: v for k, v in state.items() if "gate" not in k}, COVER.may_miss)
    report = load_strict(model, {k: v for k, v in state.items() if "prompt" not in k}, COVER.may_miss)
    assert len(report.missing) == 3
    with pytest.raises(WeightsError, match="prompt_learner"): load_strict(model, {k: v for k, v in state.items() if "prompt" not in k})


def test_batch_and_picture():
    model = small()
    two, one = views(clips=2), views(T=1)
    with torch.no_grad():
        maps, alone, picture = model(two), model({k: v[1:] for k, v in two.items()}), model(one)
        twice = model({**one, **{k: one[k].repeat(1, 1, 2, 1, 1) for k in ("technical", "aesthetic")}})
    for name in COVER.views:
        assert torch.allclose(maps[name][1:], alone[name], atol=1e-5) and torch.equal(picture[name], twice[name])
    assert {name: m.shape[2:] for name, m in maps.items()} == {"semantic": (2, 7, 7), "technical": (2, 2, 2), "aesthetic": (2, 2, 2)}
    assert maps["semantic"].flatten(3).std(-1).max() < 1e-6 and overall(view_scores(maps)).shape == (2,)


@pytest.mark.parametrize("change,word", [({"semantic": None}, "without its semantic"), ({"technical": view(0, (1, 3, 5, 64, 64))}, "one clip"),
                                         ({"aesthetic": view(0, (2, 3, 4, 64, 64))}, "one clip"),
                                         ({"temporal": view(0, (1, 3, 4, 64, 64))}, "temporal")])
def test_views_that_do_not_belong_together_are_refused(change, word):
    given = {k: v for k, v in {**views(), **change}.items() if v is not None}
    with pytest.raises(ViewError, match=word): small()(given)


@pytest.mark.cuda
def test_gpu_gives_the_same_scores():
    model, given = small(), views()
    with torch.no_grad():
        here, there = model(given), model.cuda()({k: v.cuda() for k, v in given.items()})
    assert all(torch.allclose(here[k], there[k].cpu(), atol=2e-3) for k in here)
