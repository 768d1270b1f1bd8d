"A checkpoint and a body that commit c40d2e8 wrote, with all the options it had, score today as they did then."
import json
from dataclasses import replace

import pytest
import torch

from qualivision.inference.score import Scorer
from qualivision.models.bodies import start_from_body
from qualivision.models.dover_mos import EMBEDDED, DoverConfig
from qualivision.models.registry import MODELS, load_body
from qualivision.models.vjepa_mos import VJepaConfig, VJepaMos
from qualivision.quality import QualiVisionError


@pytest.fixture(scope="module")
def old(root): return root/"tests"/"fixtures"/"c40d2e8"


def inputs(c, n=2):
    "Frames and embeddings that need no generator of random numbers."
    frames = (torch.arange(n * 3 * c.frames * c.size ** 2) * 7919 % 251).view(n, 3, c.frames, c.size, c.size).to(torch.uint8)
    return frames, (torch.arange(n * c.text_dim) * 31 % 17).view(n, -1) / 8.5 - 1


@pytest.mark.parametrize("kind", ["checkpoint", "body"])
def test_it_scores_as_before(old, kind):
    about, recorded = json.loads((old/kind/"model.json").read_text()), json.loads((old/"scores.json").read_text())[kind]
    model = Scorer.from_checkpoint(old/"checkpoint", "cpu").model if kind == "checkpoint" else load_body(old/"body")
    assert {"fusion", "places", "bounded"} <= set(about["config"]) & set(type(model.config).REMOVED)
    with torch.no_grad(): out = model(*inputs(model.config))
    for name, value in recorded.items(): assert torch.allclose(out[name], torch.tensor(value), atol=1e-5), name


def test_an_old_body_is_what_training_starts_from(old):
    about = json.loads((old/"body"/"model.json").read_text())
    config = VJepaConfig.of(about["config"])
    assert "tensors" in str(start_from_body(VJepaMos(config), old/"body"))
    with pytest.raises(QualiVisionError, match="encoder_heads 2 there and 1 here"):
        start_from_body(VJepaMos(replace(config, encoder_heads=1)), old/"body")


@pytest.mark.parametrize("kind", [DoverConfig, VJepaConfig])
def test_an_option_that_has_gone_has_the_value_it_always_had(kind):
    gone = json.loads(json.dumps(kind().gone()))
    assert gone and kind.of(gone) == kind() and not set(gone) & set(vars(kind()))
    for name, value in gone.items():
        other = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, (int, float)) else "other"
        with pytest.raises(QualiVisionError, match=f"{name}=.*no longer"): kind.of({name: other})


def test_a_removed_field_follows_from_those_beside_it():
    "Small files of earlier versions name sizes that follow from the width of the attention today; others than these are refused."
    small = {"fusion_width": 16, "heads": 2, "fused_dim": 16}
    assert DoverConfig.of({**small, "final_norm": False, "scale": .5}) == DoverConfig(fusion_width=16, final_norm=False)
    assert VJepaConfig.of(small) == VJepaConfig(fusion_width=16) and VJepaConfig.of({"heads": 8, "fused_dim": 256, "dropout": .1}) == VJepaConfig()
    for kind, values in ((DoverConfig, {"scale": .5}), (DoverConfig, {"final_norm": False, "scale": 1e-6}), (VJepaConfig, {**small, "heads": 8})):
        with pytest.raises(QualiVisionError, match="no longer"): kind.of(values)


def test_another_network_is_refused_with_its_name(tmp_path, old):
    from qualivision.models.weights import load_checkpoint, save_checkpoint
    _, meta = load_checkpoint(old/"checkpoint")
    model = MODELS["dover"].model(replace(EMBEDDED, dims=(8, 8, 8, 8)))
    save_checkpoint(tmp_path/"c", model, {**meta, "config": meta["config"] | {"form": "documented"}})
    with pytest.raises(QualiVisionError, match="form='documented'"): Scorer.from_checkpoint(tmp_path/"c", "cpu")
