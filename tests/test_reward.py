"""The reward in memory: gradients to the pixels of every model, the numbers of files, one number with a slope everywhere, and six
callers, each a stand-in written from its published signature."""
import asyncio
import builtins
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from qualivision.data.container import write_video
from qualivision.data.sampling import Sampling
from qualivision.data.video import read_frames
from qualivision.evaluation.ranks import Distribution, ReferenceSet
from qualivision.inference import reward as reward_module
from qualivision.inference.reward import (
    Percentile, Reward, RewardError, flow_factory, t2v_turbo, unirl, verl_omni, videox_fun)
from qualivision.inference.score import Scorer
from qualivision.models import convnext3d
from qualivision.models.dover_mos import EMBEDDED, DoverPlusPlus
from qualivision.models.frames_mos import FramesConfig, FramesMos
from qualivision.models.measures import ColourStatistics, FilterBank
from qualivision.models.text import TextEncoder
from qualivision.models.towers import load_tower
from qualivision.models.vjepa_mos import VJEPA_EMBEDDED, VJepaMos
from qualivision.quality import DIMENSIONS
from qualivision.toy import TOY

KINDS = {"dover": (DoverPlusPlus, replace(EMBEDDED, **TOY["dover"], freeze_backbone=True)),
         "vjepa2": (VJepaMos, replace(VJEPA_EMBEDDED, **TOY["vjepa2"], colours=("aesthetic", "overall"), freeze=.5)),
         "frames": (FramesMos, replace(FramesConfig(), **TOY["frames"]))}
PROMPTS = ["a red boat", "a green tree"]
ENCODER = TextEncoder()


def small(kind: str, learned_on=None, **more) -> Reward:
    "A reward of random weights, the fixed statistics among what counts."
    kind, config = KINDS[kind][0], replace(KINDS[kind][1], **more)
    torch.manual_seed(0)
    net = kind(config)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("weight") and any(part in name for part in ("linear", "wide", "heads.")): p.normal_(0, .02)
    return Reward(Scorer(net, Sampling(config.frames, config.size), ENCODER, "toy", "toy", "", learned_on=learned_on))


def noise(*shape, seed=1): return .05 + .9 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def known(**branches) -> ReferenceSet:
    x = np.linspace(1.5, 4.5, 40)
    return ReferenceSet("toy set", "toy", {d: Distribution.of(x + shift) for d, shift in (branches or dict.fromkeys(DIMENSIONS, 0)).items()})


@pytest.fixture(scope="module")
def dover() -> Reward: return small("dover")


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_are_those_of_differences(kind):
    """20 random directions that climb, 6 for the slow tower: a random share of the slope's sign at each pixel, by central differences in
    float32, without the rounding, which is flat under such steps; with it, 8-bit pixels that need no resize have the same slopes."""
    reward = small(kind)
    reward.rounding, weights = False, torch.tensor([1., .7, .5, .3, .9])
    side = reward.sampling.size + 8
    x = noise(1, 3, 6, side, side).requires_grad_()
    def f(x): return torch.stack(list(reward(x, PROMPTS[:1]).values()))[:, 0] @ weights
    f(x).backward()
    assert (x.grad[0].abs().sum((0, 2, 3)) > 0).sum() == min(6, reward.sampling.count)
    g, h = torch.Generator().manual_seed(2), 3e-6
    with torch.no_grad():
        for _ in range(6 if kind == "frames" else 20):
            step = torch.rand(x.shape, generator=g) * x.grad.sign()
            slope = (f(x + h * step) - f(x - h * step)) / (2 * h)
            assert slope.item() == pytest.approx((x.grad * step).sum().item(), rel=.02)
    levels = (noise(1, 3, 6, side - 8, side - 8) * 255).round() / 255
    smooth, rounded = levels.clone().requires_grad_(), levels.clone().requires_grad_()
    f(smooth).backward()
    reward.rounding = True
    f(rounded).backward()
    assert (smooth.grad - rounded.grad).norm() < .01 * smooth.grad.norm()


@pytest.mark.parametrize("view", ["square", "square8", "processor"])
def test_frames_in_memory_score_as_their_file(dover, tmp_path, view):
    "Read back from a file, in 8 bits and in 0–1, with and without a gradient, in another size and by every view."
    reward = Reward(Scorer(dover.model, replace(dover.sampling, view=view), ENCODER, "toy", "toy", ""))
    soft = F.interpolate(noise(1, 3, 3, 6, 8), (9, 48, 64), mode="trilinear")[0]              # (3,T,H,W)
    file = write_video(tmp_path/"a.mp4", (soft * 255).byte().permute(1, 2, 3, 0).numpy(), crf=10)
    frames = torch.from_numpy(read_frames(file, range(9))).permute(0, 3, 1, 2)                  # (T,3,H,W)
    scorer = Scorer(reward.model, reward.sampling, ENCODER, "toy", "toy", "")
    with torch.no_grad(): by_file = [getattr(scorer.score(file, PROMPTS[0]), d) for d in DIMENSIONS]
    off = (frames / 255 + .4 / 255).clamp(0, 1)                       # what 8 bits cannot hold
    asks = (frames / 255).requires_grad_()
    for clip, most in ((frames, 1e-5), (frames / 255, 1e-5), (asks, 1e-4), (off, .02), (off.requires_grad_(), .02)):
        found = torch.cat(list(reward([clip], PROMPTS[:1]).values()))
        assert (found.detach() - torch.tensor(by_file)).abs().max() < most


def test_alone_as_in_a_batch(dover, monkeypatch):
    """Scores and gradients, by tensor and by list; the inside of a batch is computed twice and stays the same, as that of each block where a
    model says so."""
    inside, whole = [], reward_module.checkpoint
    monkeypatch.setattr(reward_module, "checkpoint", lambda *a, **k: inside.append(a) or whole(*a, **k))
    x = noise(8, 3, 6, 40, 40).requires_grad_()
    scores = torch.stack(list(dover(x, PROMPTS * 4).values()))
    scores.sum().backward()
    assert len(inside) == 8, "each clip of a batch"
    for k in (0, 7):
        one = x[k].detach().transpose(0, 1).requires_grad_()
        alone = torch.stack(list(dover([one], [PROMPTS[k % 2]]).values()))
        alone.sum().backward()
        assert (alone[:, 0] - scores[:, k]).abs().max() < 1e-5
        assert torch.allclose(one.grad.transpose(0, 1), x.grad[k], rtol=1e-4, atol=1e-5)
    assert len(inside) == 8, "not one alone"
    twice, plain = [], convnext3d.checkpoint
    monkeypatch.setattr(convnext3d, "checkpoint", lambda *a, **k: twice.append(a) or plain(*a, **k))
    again = x[:1].detach().requires_grad_()
    torch.stack(list(small("dover", checkpointing=True)(again, PROMPTS[:1]).values())).sum().backward()
    assert len(twice) >= 4 and torch.allclose(again.grad[0], x.grad[0], rtol=1e-4, atol=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in dover.train().parameters()) and not dover.model.training


def test_bad_clips_alone_have_no_number(dover, capsys):
    x = noise(4, 3, 6, 40, 40).requires_grad_()
    spoiled = x.clone()
    spoiled[1, 0, 2, 5, 5] = float("nan")
    media = [*spoiled.transpose(1, 2)[:2], torch.zeros(0, 3, 40, 40), spoiled[2].transpose(0, 1), spoiled[3, :, :1].transpose(0, 1)]
    scores = dover(media, ["a red boat"] * 3 + ["🚀🌕", "a red boat"])
    assert scores["overall"].isnan().tolist() == [False, True, True, True, False]
    assert scores["temporal"].isnan().tolist() == [False, True, True, True, True]        # one frame does not move
    scores["overall"].nansum().backward()
    assert x.grad.isfinite().all() and x.grad[0].any() and not x.grad[1:3].any()
    said = capsys.readouterr().err
    assert "not finite" in said and "no pixels" in said and "🚀" in said
    assert dover([], [])["overall"].shape == (0,)


def test_what_is_wrong_for_all_is_an_exception(dover):
    x = noise(2, 3, 6, 40, 40)
    for media, prompts, words in ((2 * x - 1, PROMPTS, r"\(x \+ 1\) / 2"), (255 * x, PROMPTS, "0–1"), ((255 * x).int(), PROMPTS, "uint8"),
                                  (x.transpose(1, 2), PROMPTS, "B,C,T,H,W"), (x[0], PROMPTS, "B,C,T,H,W"), (x, PROMPTS[:1], "2 texts"),
                                  (x, "ab", "2 texts")):
        with pytest.raises(RewardError, match=words): dover(media, prompts)
    broken = small("dover")
    with torch.no_grad(): broken.model.mos_predictor.predictor[1].weight.fill_(float("nan"))
    with pytest.raises(RewardError, match="weights are damaged"): broken(x, PROMPTS)
    dover.model.engine = lambda x: x
    try:
        with pytest.raises(RewardError, match="engine"): Reward(Scorer(dover.model, dover.sampling, ENCODER, "toy", "toy", ""))
    finally: dover.model.engine = None


def test_no_disk_and_only_what_was_learned(monkeypatch):
    "Nothing is opened after construction, a tower and the encoder of prompts among it; dimensions without opinions are absent."
    about = {"traditional": {"data": "toy"}, "alignment": {"data": "toy"}, "aesthetic": None, "temporal": {"data": "toy"}, "overall": None}
    load_tower.cache_clear()              # else a test before this one has read it
    reward = small("frames", about)
    helper = SimpleNamespace(about={"aesthetic": {"data": "another model's"}})
    helped = Scorer(reward.model, reward.sampling, ENCODER, "toy", "toy", "", learned_on=about).ask((helper,))
    assert Reward(helped).dimensions == reward.dimensions, "what a helper says is not this model's"
    def refuse(*a, **k): raise AssertionError("a file was opened")
    for where, name in ((builtins, "open"), (torch, "load"), (np, "load")): monkeypatch.setattr(where, name, refuse)
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    scores = reward(noise(1, 3, 6, 64, 64), ["a prompt that nobody has asked before"])
    assert list(scores) == ["traditional", "alignment", "temporal"]
    with pytest.raises(RewardError, match="no human opinions"): reward.scalar({"overall": 1}, known())


def test_a_model_that_is_not_asked_for_slopes_computes_as_before():
    "Fixed filters and colours: the same bits with and without a gradient, no graph unless the frames ask, and a grey clip has finite slopes."
    for part in (FilterBank(48, (2, 4, 4)), ColourStatistics()):
        x = noise(1, 3, 4, 20, 20)         # of some sizes the middle of a grey clip is exactly zero
        plain = part(x)
        asked = part(x.clone().requires_grad_())
        assert torch.equal(plain, asked) and not plain.requires_grad and asked.requires_grad
        grey = torch.full_like(x, .5).requires_grad_()
        part(grey).sum().backward()
        assert grey.grad.isfinite().all()


@pytest.mark.parametrize("part", [FilterBank(48, (2, 4, 4)), ColourStatistics()], ids=["filters", "colours"])
def test_every_fixed_number_has_its_slope(part):
    "Of each feature alone: a path that is lost inside one of them would hide in a sum over all."
    x, step = noise(1, 3, 4, 20, 20), noise(1, 3, 4, 20, 20, seed=2) - .5
    with torch.no_grad(): differences = (part(x + 2e-4 * step) - part(x - 2e-4 * step))[0] / 4e-4
    x.requires_grad_()
    slopes = torch.stack([(torch.autograd.grad(y, x, retain_graph=True)[0] * step).sum() for y in part(x)[0]])
    told = differences.abs() > .02         # of the others float32 knows too few digits
    right = ((slopes - differences).abs() < .02 * differences.abs())[told]
    assert told.sum() > 20 and right.float().mean() > .95, "here and there a logarithm is near its pole"


def test_a_percentile_rises_everywhere():
    at = Percentile(Distribution.of([2., 2., 3., 3., 3., 4.5]))
    x = torch.linspace(-20, 20, 4001).requires_grad_()
    y = at(x)
    y.sum().backward()
    assert (x.grad > 0).all() and (y.diff() > 0).all()
    ends = y.diff().detach()
    assert ends[:1000].std() < 1e-4 and ends[-1000:].std() < 1e-4 and at(torch.tensor([2., 3., 4.5])).tolist() == pytest.approx([.1, .6, 1])


def test_one_number(dover):
    x, reference = noise(2, 3, 6, 40, 40), known(overall=0, temporal=1)
    with torch.no_grad():
        scores = dover(x, PROMPTS)
        parts = [Percentile(reference.branches[d])(scores[d]) for d in ("overall", "temporal")]
        plain = dover.scalar({"overall": 3, "temporal": 1}, reference)(x, PROMPTS)
        dear = dover.scalar({"overall": 3, "temporal": 1}, reference, lower=.2, widths={"overall": 1, "temporal": 2})(x, PROMPTS)
    assert torch.allclose(plain, .75 * parts[0] + .25 * parts[1]) and torch.allclose(plain - dear, torch.full((2,), .2 * 1.25))
    for how, words in ((dict(lower=.1), "widths="), (dict(lower=.1, widths={"overall": None, "temporal": 1}), "widths="),
                       (dict(weights={"sharpness": 1}), "no such score"), (dict(weights={"aesthetic": 1}), "no scores of aesthetic"),
                       (dict(weights={"overall": 0}), "above zero"), (dict(weights={}), "above zero"),
                       (dict(reference=replace(reference, model="other")), "ranks build")):
        with pytest.raises(RewardError, match=words): dover.scalar(**{"weights": {"overall": 1}, "reference": reference, **how})


# ---- who calls it: stand-ins from the published signatures ----------------------------------------------------------

@pytest.fixture(scope="module")
def scalar(dover): return dover.scalar({"overall": 1}, known())

@pytest.fixture(scope="module")
def clips(): return noise(2, 3, 6, 40, 40)

@pytest.fixture(scope="module")
def plain(scalar, clips):
    with torch.no_grad(): return scalar(clips, PROMPTS)


def test_plain_and_fastvideo(scalar, clips, plain):
    @dataclass
    class Rollout:                                           # callable(media, prompts) → (B,), without a gradient
        reward: object
        def __call__(self, media, prompts):
            with torch.no_grad(): return self.reward(media, prompts)
    found = Rollout(scalar)(clips.requires_grad_(), PROMPTS)
    assert torch.equal(found, plain) and found.shape == (2,) and not found.requires_grad
    with torch.inference_mode(): scalar(clips, ["a prompt of its own"] * 2)           # and its embedding can be used for a gradient
    scalar(clips, ["a prompt of its own"] * 2).sum().backward()
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(Rollout(scalar)(clips, PROMPTS), plain)


def test_t2v_turbo_and_videox_fun(scalar, clips, plain):
    class BaseReward(ABC):
        @abstractmethod
        def __call__(self, batch_frames, batch_prompt): ...
        @abstractmethod
        def get_reward(self, batch_frames, batch_prompt): ...
    x = clips.detach().clone().requires_grad_()
    turbo = t2v_turbo(scalar)(x.transpose(1, 2), PROMPTS)
    turbo.sum().backward()
    assert torch.allclose(turbo.detach(), plain, atol=1e-5) and (by_turbo := x.grad.clone()).any()
    x.grad, fun = None, videox_fun(scalar, BaseReward)()
    loss, reward = fun(x, PROMPTS)
    (2 * loss).backward()
    assert isinstance(fun, BaseReward) and reward.item() == pytest.approx(plain.mean().item(), abs=1e-5) and torch.allclose(-x.grad, by_turbo)
    assert torch.allclose(fun.get_reward(x, PROMPTS).detach(), plain, atol=1e-5)
    bad = torch.cat([x.detach(), torch.full_like(x[:1], float("nan"))])
    assert fun(bad, [*PROMPTS, "a boat"])[1].item() == pytest.approx(plain.mean().item(), abs=1e-5)


def test_flow_factory(scalar, clips, plain):
    @dataclass
    class RewardModelOutput:
        rewards: torch.Tensor
        extra_info: dict | None = None
    class PointwiseRewardModel:
        required_fields = ("prompt",)
        def __init__(self, config, accelerator): self.config, self.accelerator = config, accelerator
    kind = flow_factory(scalar, PointwiseRewardModel, RewardModelOutput)
    model = kind(SimpleNamespace(name="mine"), SimpleNamespace(device=torch.device("cpu")))
    sample = {"prompt": PROMPTS, "video": list(clips.detach().transpose(1, 2)), "image": None}
    assert set(model.required_fields) == {"video", "prompt"} and model.use_tensor_inputs and model.config.name == "mine"
    found = model(**sample, condition_images=None)
    assert isinstance(found, RewardModelOutput) and torch.equal(found.rewards, plain) and set(found.extra_info) == set(DIMENSIONS)


def test_verl_omni(scalar, clips, plain):
    "By keyword, one sample; also floats, a batch, one channel, and a frame rate."
    score, eight = verl_omni(scalar), (clips.detach() * 255).round().byte().transpose(1, 2)              # (B,T,C,H,W)
    def call(image, truth, **info): return asyncio.run(score(data_source="toy", solution_image=image, ground_truth=truth, extra_info=info, split=1))
    one = call(eight[0], PROMPTS[0], fps=16)
    assert isinstance(one["score"], float) and one["score"] == pytest.approx(plain[0].item(), abs=1e-5) and set(one) == {"score", *DIMENSIONS}
    assert call(eight[0].numpy(), PROMPTS[0]) == one
    assert call(clips.detach()[0].transpose(0, 1), PROMPTS[0])["score"] == pytest.approx(one["score"], abs=1e-5)
    assert call(eight, PROMPTS)["score"] == pytest.approx(plain.tolist(), abs=1e-5)
    grey = eight[0][:, :1]
    assert call(grey, PROMPTS[0]) == call(grey.expand(-1, 3, -1, -1), PROMPTS[0])


def test_unirl(scalar, dover, clips, tmp_path):
    "Files by path and as bytes; one that cannot be read has no number and a reason, and a broken model answers for none."
    class BaseScorer(ABC):
        @abstractmethod
        def score(self, items): ...
    file = write_video(tmp_path/"a.mp4", (clips.detach()[0] * 255).byte().permute(1, 2, 3, 0).numpy())
    scorer = unirl(scalar, BaseScorer)()
    by_path, by_bytes, empty, gone, mute = scorer.score([
        {"video": file, "prompt": PROMPTS[0]}, {"video": file.read_bytes(), "prompt": PROMPTS[0]}, {"video": b"no video", "prompt": PROMPTS[0]},
        {"video": str(tmp_path/"none.mp4"), "prompt": PROMPTS[0]}, {"video": file, "prompt": " "}])
    assert by_path == by_bytes and math.isfinite(by_path["score"]) and by_path["error"] is None
    for row in (empty, gone, mute): assert set(row) == set(by_path) and math.isnan(row["score"]) and math.isnan(row["overall"]) and row["error"]
    was = dover.model.mos_predictor.predictor[1].weight.detach().clone()
    with torch.no_grad(): dover.model.mos_predictor.predictor[1].weight.fill_(float("nan"))
    try:
        with pytest.raises(RewardError, match="damaged"): scorer.score([{"video": file, "prompt": PROMPTS[0]}])
    finally:
        with torch.no_grad(): dover.model.mos_predictor.predictor[1].weight.copy_(was)
