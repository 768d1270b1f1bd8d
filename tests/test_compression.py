"Pruned models: every place of every unit, five recipes, a checkpoint that loads like all others, and zeros that survive a training."
import csv
import json
import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from qualivision.compression.prune import RECIPES, SHARES, PruneError, cost, prune, scores_of, used_numbers
from qualivision.compression.recover import pupil_of
from qualivision.inference.score import Scorer
from qualivision.models.dover_mos import EMBEDDED, DoverPlusPlus
from qualivision.models.vjepa_mos import VJEPA_EMBEDDED, VJepaMos
from qualivision.models.weights import WeightsError, about_file, load_checkpoint, load_strict, save_checkpoint
from qualivision.models.widths import narrow, narrow_to
from qualivision.official.dover import Branches, QualityHead, complexity
from qualivision.official.groups import groups_of
from qualivision.official.inflated import INFLATED, InflatedConvNeXt3D
from qualivision.official.scorer import NETWORKS, load_model
from qualivision.toy import TOY, toy_clip, toy_set

pytestmark = pytest.mark.usefixtures("one_thread")
NAMED = dict(causes=("blur", "noise"), attributes=("colour",))


class Mobile(Branches):
    "DOVER-Mobile's form in one view, with the classifier that never runs."
    views = ("technical",)

    def __init__(self):
        super().__init__()
        form = INFLATED["v2-femto"] | dict(dims=(8, 8, 16, 32), depths=(1, 1, 1, 1), classes=10)
        self.add({"technical": QualityHead(32, 16)}, technical=InflatedConvNeXt3D(**form))


MAKE = {"dover": lambda: DoverPlusPlus(replace(tiny.CONFIG, **NAMED)), "mobile": Mobile,
        "vjepa2": lambda: VJepaMos(replace(VJEPA_EMBEDDED, **TOY["vjepa2"], **NAMED))}


def made(kind: str) -> tuple:
    "A model without a zero, and the inputs of its forward for three clips."
    torch.manual_seed(0)
    model = MAKE[kind]().eval()
    for p in model.parameters(): p.data.add_(.1 * torch.randn_like(p))
    if kind == "mobile": return model, ({v: torch.randn(3, 3, 4, 32, 32) for v in model.views},)
    return model, (torch.randint(0, 256, (3, 3, 4, 32, 32), dtype=torch.uint8), torch.randn(3, 384))


@pytest.mark.parametrize("kind", MAKE)
def test_groups_name_every_place_of_a_unit(kind):
    "Units in another order, at all their places, are the same model; a place that is missing or wrong would change its scores."
    model, inputs = made(kind)
    want, tensors = scores_of(model, inputs), dict([*model.named_parameters(), *model.named_buffers()])
    for g in groups_of(model):
        order = torch.arange(g.units).roll(1)
        for cut in g.cuts:
            x = tensors[cut.tensor].data.movedim(cut.axis, 0)
            end = cut.first + cut.times * g.units
            x[cut.first:end] = x[cut.first:end].unflatten(0, (cut.times, g.units))[:, order].flatten(0, 1)
        assert torch.allclose(scores_of(model, inputs), want, atol=2e-4), g.name
    one = groups_of(model)[0].cuts[0]                                       # and the test can fail
    tensors[one.tensor].data.copy_(tensors[one.tensor].data.roll(1, one.axis))
    assert not torch.allclose(scores_of(model, inputs), want, atol=2e-4)


@pytest.mark.parametrize("kind", MAKE)
def test_all_groups_narrow_load_strictly(kind):
    model, inputs = made(kind)
    every = groups_of(model)
    narrow(model, {g.name: range(1, g.units, 2) for g in every})
    fresh = MAKE[kind]().eval()
    narrow_to(fresh, {"pruned": {"widths": {g.name: g.units // 2 for g in every}}}, "folder")
    load_strict(fresh, model.state_dict())
    assert scores_of(fresh, inputs).isfinite().all() and torch.equal(scores_of(fresh, inputs), scores_of(model, inputs))
    assert [g.units for g in groups_of(fresh)] == [g.units // 2 for g in every]          # can be pruned again


@pytest.mark.parametrize("kind,recipe", [("mobile", r) for r in RECIPES if r != "structured"] + [("vjepa2", "structured")])
def test_recipes_leave_what_was_asked(kind, recipe):
    model, inputs = made(kind)
    keep = .5 if kind == "mobile" else .7       # what does not shrink is a large part of the tiny ones
    state, before, scores = deepcopy(model.state_dict()), cost(model, *inputs), scores_of(model, inputs)
    found = prune(model, recipe, keep, *inputs)
    after = cost(found.model, *inputs)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), "the whole model was changed"
    assert after["nonzero"] <= keep * before["parameters"] and scores_of(found.model, inputs).isfinite().all()
    assert not torch.allclose(scores_of(found.model, inputs), scores, atol=1e-4)
    if found.masks:
        assert after["flops"] == before["flops"] and after["parameters"] == before["parameters"] and not found.widths
        assert after["nonzero"] > (keep - .01) * before["parameters"]
    else:
        assert after["flops"] <= keep * before["flops"] and after["parameters"] <= keep * before["parameters"]
        assert max(after[k] / before[k] for k in ("flops", "parameters")) > keep - .12     # and not much less than was asked
    untouched = {"vjepa2": "video.encoder.layer.0.attention.query"}.get(kind)
    assert untouched in found.untouched if untouched else found.untouched == ["technical_backbone.head"] * bool(found.masks)
    assert bool(found.curves) == RECIPES[recipe][1] and all(len(c) == len(SHARES) and max(c) > 0 for c in found.curves.values())


def test_cost_is_of_a_whole_forward():
    "Fixed filters count: 96 of 2×12×12 pixels in three colours, at 8×12×12 places; 9·96 numbers for two scores, which are put in their places."
    frames, text = torch.zeros(1, 3, 16, 144, 144, dtype=torch.uint8), torch.zeros(1, 384)
    flops = [complexity(DoverPlusPlus(c).eval(), frames, text)["flops"] for c in (EMBEDDED, replace(EMBEDDED, bank=()))]
    assert flops[0] - flops[1] == 2 * 96 * (3 * 2 * 12 * 12) * (8 * 12 * 12) + 2 * 864 * 2 + 2 * 2 * 5
    model, inputs = made("mobile")
    assert sum(p.numel() for p in model.parameters()) - cost(model, *inputs)["parameters"] == 32 * 10 + 10
    assert not [n for n in used_numbers(model, *inputs) if "backbone.head" in n]


def test_attention_is_counted_and_so_is_its_last_layer():
    "On a CPU as elsewhere: two products of 8 queries, 8 keys and 2 heads of 16."
    class Attend(torch.nn.Module):
        def forward(self, x): return torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert complexity(Attend(), torch.zeros(1, 2, 8, 16))["flops"] == 2 * (2 * 2 * 8 * 8 * 16)
    mha = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    assert complexity(mha, *3 * [torch.zeros(1, 4, 8)])["used"] == sum(p.numel() for p in mha.parameters())


def test_what_cannot_be_pruned_is_said():
    model, inputs = made("vjepa2")
    with pytest.raises(PruneError, match="no stage widths"): prune(model, "channel", .5, *inputs)
    with pytest.raises(PruneError, match="leaves .*more than 5.0%"): prune(model, "structured", .05, *inputs)
    with pytest.raises(PruneError, match="between 0 and 1"): prune(model, "structured", 1., *inputs)
    with pytest.raises(PruneError, match="no groups"): prune(torch.nn.Linear(2, 2), "structured", .5, torch.zeros(1, 2))
    with pytest.raises(WeightsError, match="no group 'stage 7'"): narrow_to(model, {"pruned": {"widths": {"stage 7": 2}}}, "folder")


def test_an_official_network_is_loaded_narrow(tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS, "dover-mobile", Mobile)
    model, inputs = made("mobile")
    found = prune(model, "channel", .5, *inputs)
    save_checkpoint(tmp_path/"small", found.model, {"licence": "MIT", "pruned": {"widths": found.widths}})
    again, about = load_model("dover-mobile", tmp_path/"small")
    assert torch.equal(scores_of(again, inputs), scores_of(found.model, inputs)) and "pruned" not in about


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    room = tmp_path_factory.mktemp("prune")
    toy_set(room/"set", train=4, val=4)
    tiny.checkpoint(room/"whole")
    return room


def prune_in(room, monkeypatch, recipe, out, *more):
    monkeypatch.chdir(room)                                                # for cache/
    return tiny.command("prune", "--checkpoint", "whole", "--data", "set", "--recipe", recipe, "--keep", .6, "--batch-size", 4,
                        "--out", out, "--device", "cpu", "--json", *more)


def test_command_makes_a_checkpoint_like_any_other(room, monkeypatch):
    status, report, _ = prune_in(room, monkeypatch, "structured", "small", "--epochs", 2)
    assert status == 0 and report["parameters"]["after"] <= .6 * report["parameters"]["before"]
    assert report["flops"]["after"] <= .6 * report["flops"]["before"] and report["bytes"]["after"] < .75 * report["bytes"]["before"]
    assert report["srocc"]["overall"].keys() >= {"before", "after", "diff", "low", "high"} and "dover_model.wide" in report["untouched"]
    rows = list(csv.DictReader((room/"small"/"history.csv").open()))
    assert len(rows) == 2 and all(float(r["teacher_loss"]) > 0 for r in rows), "the whole model did not teach"
    assert not (room/"small.run").exists()
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    scorer = Scorer.from_checkpoint(room/"small", "cpu")
    assert {g.name: g.units for g in groups_of(scorer.model)}.items() >= report["widths"].items()
    record = scorer.score(toy_clip(room/"clip.mp4", (200, 60, 40)), "a red boat")
    assert record.error is None and np.isfinite(record.overall)
    about = json.loads((room/"small"/"model.json").read_text())                # widths of another model
    (room/"small"/"model.json").write_text(json.dumps(about | {"pruned": {"widths": {**report["widths"], "stage 0": 99}}}))
    with pytest.raises(WeightsError, match="small"): Scorer.from_checkpoint(room/"small", "cpu")


def test_zeros_survive_the_training_and_the_encoder_stays(room, monkeypatch):
    status, report, said = prune_in(room, monkeypatch, "unstructured", "zeros", "--epochs", 1, "--head-only", "--lr", .01)
    assert status == 0, said
    before, after = load_checkpoint(room/"whole")[0], load_checkpoint(room/"zeros")[0]
    assert report["parameters"]["nonzero"] <= .6 * report["parameters"]["before"]
    changed = [k for k, v in after.items() if not torch.equal(v[v != 0], before[k][v != 0])]
    assert changed and not [k for k in changed if k.startswith("dover_model.backbone.")]
    status, _, said = prune_in(room, monkeypatch, "channel", "whole")
    assert status == 1 and "it is the checkpoint that is pruned" in said


def test_pruned_twice(room):
    "A pruned checkpoint is pruned again: its widths are counted from it, and written with those that it had."
    model, inputs = Scorer.from_checkpoint(room/"whole", "cpu").model, made("dover")[1]
    first = prune(model, "structured", .8, *inputs)
    assert "dover_model.backbone.0" in first.untouched
    second = prune(first.model, "channel", .8, *inputs)
    pupil = pupil_of(second.model, {"widths": first.widths | second.widths}, head_only=True)
    assert torch.allclose(scores_of(pupil.eval(), inputs), scores_of(second.model, inputs), atol=1e-5) and pupil.frozen
    assert "pruned" not in about_file(room/"whole")
