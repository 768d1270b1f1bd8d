"The hybrid loss against the recorded numbers of the published one, and its state across a resume."
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from qualivision.training.contrast import training_loss
from qualivision.training.losses import HybridLoss, LossError

PARITY = np.load(Path(__file__).parent / "fixtures" / "hybrid_loss_parity.npz")   # published code, torch 2.13, float32, CPU
CASES = sorted({k.split("/")[0] for k in PARITY if k[0].isdigit()})
TERMS = ("smooth_l1_loss", "ranking_loss", "scale_loss", "alpha", "beta", "gamma")


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient(case):
    pred = torch.tensor(PARITY[f"{case}/pred"]).requires_grad_()
    total, parts = HybridLoss()(pred, torch.tensor(PARITY[f"{case}/target"]))
    total.backward()
    assert total.item() == pytest.approx(float(PARITY[f"{case}/total"]), abs=1e-6)
    np.testing.assert_allclose(pred.grad.numpy(), PARITY[f"{case}/grad"], atol=1e-6)
    assert list(parts) == list(TERMS) and not any(v.requires_grad for v in parts.values())
    for term in TERMS: assert parts[term].item() == pytest.approx(float(PARITY[f"{case}/{term}"]), abs=1e-6), term


def published(pred, target):
    "The three terms as they were before opinions could be missing."
    B, D = pred.shape                   # in the order in which gradients are summed
    smooth = F.smooth_l1_loss(pred, target, beta=.1)
    p, t = pred.T.contiguous(), target.T.contiguous()
    hinge = F.relu(.2 - (p[:, :, None] - p[:, None])) * (t[:, :, None] - t[:, None] > .1)
    ranking = hinge.sum() / (B * (B - 1) / 2 * D) if B > 1 else pred.sum() * 0.
    w = torch.where((target < 2.5) | (target > 4.), 1.5, 1.)
    return .7 * smooth + .3 * ranking + .1 * F.mse_loss(w * pred, w * target)


@pytest.mark.parametrize("B", [1, 2, 16])
def test_whole_opinions_give_the_same_bits(B):
    torch.manual_seed(B)
    target = (torch.rand(B, 5) * 12).round() / 3 + 1
    pred = torch.rand(B, 5) * 4 + 1
    a, b = pred.clone().requires_grad_(), pred.clone().requires_grad_()
    one, other = HybridLoss()(a, target)[0], published(b, target)
    one.backward(), other.backward()
    assert torch.equal(one, other) and torch.equal(a.grad, b.grad)


def test_missing_opinions_give_neither_value_nor_gradient():
    "Each term by loops over what is there; the extra heads and the contrast too."
    torch.manual_seed(3)
    pred, target = (torch.rand(7, 5) * 4 + 1).requires_grad_(), torch.rand(7, 5) * 4 + 1
    target[:, 1], target[2:, 3], target[4] = torch.nan, torch.nan, torch.nan
    there = [(i, d) for i in range(7) for d in range(5) if not target[i, d].isnan()]
    pairs = [(i, j, d) for i, d in there for j, e in there if e == d and i < j]
    smooth = sum(F.smooth_l1_loss(pred[i, d], target[i, d], beta=.1) for i, d in there) / len(there)
    lead = [(target[i, d] - target[j, d], pred[i, d] - pred[j, d]) for i, j, d in pairs]
    ranking = sum(F.relu(.2 - gap.sign() * p) for gap, p in lead if abs(gap) > .1) / len(pairs)
    total, parts = HybridLoss()(pred, target)
    total.backward()
    assert torch.isclose(parts["smooth_l1_loss"], smooth) and torch.isclose(parts["ranking_loss"], ranking)
    assert torch.equal(pred.grad != 0, ~target.isnan()) and pred.grad.isfinite().all()
    out = {"mos": pred, **{k: torch.rand(7, 1).requires_grad_() for k in ("aesthetic_score", "technical_score")},
           "match_logits": torch.randn(7, 3).requires_grad_()}
    loss, parts = training_loss(out, target, HybridLoss(), 1., 1.)
    loss.backward()
    assert loss.isfinite() and parts["contrast_loss"] == 0 and not out["match_logits"].grad.any()
    assert out["aesthetic_score"].grad[:, 0].bool().tolist() == [True] * 4 + [False] + [True] * 2


def test_the_fixture_exercises_every_term():
    "Parity on zeros would prove nothing."
    assert len(CASES) == 12 and sum(float(PARITY[f"{c}/ranking_loss"]) > 0 for c in CASES) >= 6
    assert all(float(PARITY[f"{c}/scale_loss"]) > 0 for c in CASES)


def test_adaptive_sequence():
    loss = HybridLoss(adaptive=True)
    for s, r, expected in zip(PARITY["adaptive/mae"], PARITY["adaptive/ranking"], PARITY["adaptive/alpha_beta_after_each"], strict=True):
        loss.update(s, r)
        assert (loss.alpha, loss.beta) == pytest.approx(tuple(expected), abs=1e-9)


def test_zero_previous_mean_moves_nothing():
    loss = HybridLoss(adaptive=True)
    for s in PARITY["adaptive/mae"]: loss.update(s, 0.0)
    assert (loss.alpha, loss.beta) == pytest.approx(tuple(PARITY["adaptive_zero_ranking/alpha_beta"]))
    loss = HybridLoss(adaptive=True)
    for s, r in zip([.1, .1, .1, .9, .9, .9], [0, 0, 0, .5, .5, .5]): loss.update(s, r)   # 0 → 0.5 has no ratio
    assert (loss.alpha, loss.beta) == (0.7, 0.3)


def errors(n, seed=0):
    "Growing errors that leave the order alone: smooth L1 grows while the ranking term falls."
    base = torch.linspace(1.2, 4.8, 6)[:, None].expand(6, 5)
    g = torch.Generator().manual_seed(seed)
    return [(base * (1 + 0.2 * k) + 1.5 * torch.randn(6, 5, generator=g) * (0.6 ** k) + 0.3 * k, base) for k in range(n)]


def test_weights_of_a_call_are_those_before_its_update():
    loss, seen = HybridLoss(adaptive=True), []
    for pred, target in errors(9):
        before = (loss.alpha, loss.beta)
        total, parts = loss(pred, target)
        assert (parts["alpha"].item(), parts["beta"].item()) == before
        expected = before[0] * parts["smooth_l1_loss"] + before[1] * parts["ranking_loss"] + 0.1 * parts["scale_loss"]
        assert total.item() == pytest.approx(expected.item(), rel=1e-6)
        seen.append((loss.alpha, loss.beta))
    assert seen[4] == (0.7, 0.3) and seen[5] != (0.7, 0.3)               # the sixth call moved them, after its own use
    assert all(a + b == pytest.approx(1) for a, b in seen)


def test_validation_and_fixed_weights_move_nothing():
    adaptive, fixed = HybridLoss(adaptive=True), HybridLoss()
    adaptive.eval()
    for pred, target in errors(9): adaptive(pred, target), fixed(pred, target)
    for loss in (adaptive, fixed):
        assert (loss.alpha, loss.beta) == (0.7, 0.3) and loss.get_extra_state().numel() == 2


@pytest.mark.parametrize("stop", range(1, 9))
def test_resume_is_exact(stop, tmp_path):
    steps = errors(9)
    whole, first = HybridLoss(adaptive=True), HybridLoss(adaptive=True)
    expected = [(whole(*s)[0].item(), whole.alpha, whole.beta) for s in steps]
    for s in steps[:stop]: first(*s)
    torch.save(first.state_dict(), tmp_path / "loss.pt")
    resumed = HybridLoss(adaptive=True)
    resumed.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    assert [(resumed(*s)[0].item(), resumed.alpha, resumed.beta) for s in steps[stop:]] == expected[stop:]


def test_one_clip_has_no_ranking_and_still_a_gradient():
    pred = torch.full((1, 5), 2.0, requires_grad=True)
    total, parts = HybridLoss()(pred, torch.full((1, 5), 3.0))
    total.backward()
    assert parts["ranking_loss"] == 0 and pred.grad.abs().sum() > 0


@pytest.mark.parametrize("shapes", [((4, 5), (5,)), ((4, 5), (4, 1)), ((4, 5), (1, 5)), ((0, 5), (0, 5)), ((5,), (5,))])
def test_shapes_are_never_broadcast(shapes):
    with pytest.raises(LossError): HybridLoss()(*(torch.ones(s) for s in shapes))


def test_half_precision_is_computed_in_float32():
    pred, target = errors(1)[0]
    half = HybridLoss()(pred.bfloat16(), target)[0]
    assert half.dtype == torch.float32 and half == HybridLoss()(pred.bfloat16().float(), target)[0]
