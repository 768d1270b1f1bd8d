"Official DOVER, DOVER-Mobile and COVER: names, shapes, and numbers of every stage, with weights and inputs from a formula."
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from qualivision.data.container import NotAVideo
from qualivision.official.cover import IMAGE_ENCODER
from qualivision.official.scorer import OfficialError, OfficialScorer, load_model
from qualivision.official.inflated import INFLATED, InflatedConvNeXt3D
from qualivision.models.convnext3d import Block, GlobalResponseNorm
from qualivision.official.cover import COVER, CLIPImage
from qualivision.official.dover import DOVER, DOVERMobile, ViewError, complexity, fused_logit, view_scores
from qualivision.official.swin3d import Swin3D, SwinBlock, WindowAttention, fit_window, window_cells
from qualivision.models.store import REGISTRY, entry
from qualivision.models.weights import WeightsError, load_strict
from qualivision.quality import QualiVisionError
from weights_formula import MAP, agrees, fill, outputs_of, view, views_of, weights_sha256

MODELS = {"dover": DOVER, "dover_mobile": DOVERMobile}


def test_fixtures_are_small_and_hold_every_case(root, official_numbers, official_keys):
    "Numbers and hashes alone, no videos and no tables of others; every recorded case of the three models."
    files = [f for f in (root/"tests/fixtures").iterdir() if f.is_file()]      # and a folder of our own old checkpoints
    assert {f.suffix for f in files} == {".json", ".npz", ".sha256"} and sum(f.stat().st_size for f in files) < 2_000_000
    assert {tuple(k.split("/")[:2]) for k in official_numbers} == {("dover", "real"), ("dover", "alt"), ("dover_mobile", "real"),
                                                                   ("cover", "alt"), ("cover", "image")}
    assert {n: len(k["keys"]) for n, k in official_keys.items()} == {"dover": 381, "dover_mobile": 288, "cover": 404, "clip": 296}


# ---------------------------------------------------------------- names and shapes

@pytest.mark.parametrize("name", MODELS)
def test_keys_and_shapes(name, official_keys):
    with torch.device("meta"): model = MODELS[name]()
    state, want = model.state_dict(), official_keys[name]
    assert {k: list(v.shape) for k, v in state.items()} == want["keys"] and list(state) == list(want["keys"])
    assert [k for k, v in state.items() if v.dtype == torch.int64] == want["buffers"]


@pytest.mark.parametrize("name", MODELS)
def test_formula_makes_the_recorded_weights(name, filled, official_keys):
    assert weights_sha256(filled(name), official_keys[name]) == official_keys[name]["filled_sha256"]


# ---------------------------------------------------------------- numbers

@pytest.mark.parametrize("name,case", [("dover", "alt"), ("dover", "real"), ("dover_mobile", "real")])
def test_every_stage_gives_the_official_numbers(name, case, filled, official_numbers):
    model, case = filled(name), f"{name}/{case}"
    stages = sorted({k.split("/")[2] + "_backbone." + k.split("/")[4] for k in official_numbers if k.startswith(case) and "/stage/" in k})
    assert len(stages) == 10
    with torch.no_grad(), outputs_of(model, [*stages, "technical_backbone.norm", "aesthetic_backbone.norm"]) as got:
        maps = model(views_of(official_numbers, case, model.views))
    for stage in stages:
        view_name, part = stage.split("_backbone.")
        agrees(got[stage], official_numbers, f"{case}/{view_name}/stage/{part}")
    scores = view_scores(maps)
    for v in model.views:
        agrees(got[f"{v}_backbone.norm"], official_numbers, f"{case}/{v}/feature")
        expected = official_numbers[f"{case}/{v}/score_map"]
        assert maps[v].shape == expected.shape and np.abs(maps[v].numpy() - expected).max() < MAP
        assert np.abs(scores[v].numpy() - official_numbers[f"{case}/{v}/score"]).max() < MAP
    logit = fused_logit(*(scores[v].double().mean() for v in ("technical", "aesthetic")))
    for name, value in (("fused_logit", logit), ("fused_score", logit.sigmoid())):
        assert abs(value.item() - official_numbers[f"{case}/{name}"]) < 1e-4


@pytest.fixture(scope="module")
def filled():
    made = {}
    def get(name):
        if name not in made: made[name] = fill(MODELS[name]())
        return made[name]
    return get


def test_a_branch_computes_alone_what_it_computes_beside_the_other(filled, official_numbers):
    model, views = filled("dover"), views_of(official_numbers, "dover/alt", DOVER.views)
    with torch.no_grad(): alone = model({"aesthetic": views["aesthetic"][1:]})
    assert list(alone) == ["aesthetic"] and np.abs(alone["aesthetic"].numpy() - official_numbers["dover/alt/aesthetic/score_map"][1:]).max() < MAP


def test_state_is_loaded_strictly(filled):
    model = DOVERMobile()
    report = load_strict(model, filled("dover_mobile").state_dict())
    assert report.coverage == 1 and len(report.matched) == 288
    with pytest.raises(QualiVisionError, match="technical_backbone"): load_strict(DOVER(), filled("dover_mobile").state_dict())


@pytest.mark.parametrize("shape", [(1, 3, 2, 32, 32), (1, 3, 5, 40, 100), (3, 3, 9, 64, 32)])
def test_any_shape(shape, filled):
    "Odd lengths: the technical branch fills up, the aesthetic one drops."
    B, _, T, H, W = shape
    with torch.no_grad(): maps = filled("dover")({v: view(0, shape) for v in DOVER.views})
    assert maps["technical"].shape == (B, 1, -(-T // 2), -(-H // 32), -(-W // 32)) and maps["aesthetic"].shape == (B, 1, T // 2, H // 32, W // 32)
    assert all(m.isfinite().all() for m in maps.values())


@pytest.mark.parametrize("views,word", [({}, "no view"), ({"semantic": torch.zeros(1, 3, 8, 32, 32)}, "semantic"),
                                        ({"technical": torch.zeros(3, 8, 32, 32)}, "B,3,T,H,W"),
                                        ({"technical": torch.zeros(1, 3, 1, 32, 32)}, "T ≥ 2"),
                                        ({"aesthetic": torch.zeros(1, 3, 8, 31, 32)}, "≥ 32"),
                                        ({"aesthetic": torch.zeros(1, 3, 8, 32, 32, dtype=torch.uint8)}, "normalised")])
def test_what_is_no_view_is_refused(views, word, filled):
    with pytest.raises(ViewError, match=word): filled("dover_mobile")(views)


def test_complexity_as_published():
    "DOVER-Mobile: 9.86 M parameters, 52.3 GFLOPs."
    with torch.device("meta"): model, clip = DOVERMobile().eval(), torch.empty(1, 3, 32, 224, 224)
    counts = complexity(model, {v: clip for v in model.views})
    assert counts["parameters"] == 10_674_546 and counts["used"] == 9_904_546
    assert f"{counts['products'] / 1e6:.2f}" == "9.86" and int(counts["flops"] / 1e8) == 523


def test_fused_forms():
    assert abs(fused_logit(.1107, -.08285)) < 1e-12 and abs(fused_logit(-.08285, .1107, "corrected")) < 1e-12
    with pytest.raises(QualiVisionError, match="fusion"): fused_logit(0., 0., "exchanged")


# ---------------------------------------------------------------- files, by the road that a downloaded one takes

@pytest.fixture
def pulled(tmp_path, monkeypatch):
    "A folder of weights and a hub cache of our own; says where `weights pull` puts the file of a name."
    monkeypatch.setenv("QUALIVISION_WEIGHTS", str(tmp_path/"w"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"hub"))
    def place(name):
        e = entry(name)
        path = tmp_path/"w"/e.file
        if e.repo:
            cache = tmp_path/"hub"/f"models--{e.repo.replace('/', '--')}"
            (cache/"refs").mkdir(parents=True, exist_ok=True)
            (cache/"refs"/"main").write_text("0" * 40)
            path = cache/"snapshots"/("0" * 40 if e.revision == "main" else e.revision)/e.file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
    return place


@pytest.mark.parametrize("name,wrap", [("dover", lambda s: s), ("dover-mobile", lambda s: s), ("cover", lambda s: {"state_dict": s}),
                                       ("dover++", lambda s: {"state_dict": s, "validation_results": {"KoNViD-1k": np.float64(.88)}})])
def test_each_official_layout_loads_as_pulled_and_as_given(name, wrap, filled, pulled, tmp_path, monkeypatch):
    "As they are published: bare, `state_dict` entry, and that with numbers of numpy beside it."
    if name == "cover":
        model = fill(COVER(CLIPImage(width=64, layers=1, heads=1, patch=32, size=64)))
        save_file(model.clip.state_dict(), pulled(IMAGE_ENCODER))
    else: model = filled({"dover-mobile": "dover_mobile"}.get(name, "dover"))
    torch.save(wrap(model.state_dict()), pulled(name))
    if name == "cover":                                                          # the one whose hash is known
        with pytest.raises(WeightsError, match="262,292,246"): load_model(name)
        monkeypatch.setitem(REGISTRY, name, replace(entry(name), bytes=None, sha256=None))
    given = tmp_path/"mine.pth"
    given.symlink_to(pulled(name))
    for weights in (None, given):
        loaded, about = load_model(name, weights)
        assert type(loaded) is type(model) and all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
        assert len(about["sha256"]) == 64 and about["licence"] == entry(name).licence


class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("wrong,said", [("code", "it wants to call posix.system"), ("cut", "not a file of PyTorch weights, or not a whole one"),
                                        ("another model", r"do not fit DOVERMobile .* \d+ missing: .* \d+ unexpected: .* \d+ of another shape"),
                                        ("no head", r"do not fit DOVERMobile .*284 tensors match, .* 4 missing: technical_head\.fc_hid\.weight")])
def test_what_is_not_the_models_file_is_refused(wrong, said, filled, pulled, tmp_path):
    state, path = filled("dover_mobile").state_dict(), pulled("dover-mobile")
    if wrong == "code": state["x"] = Trap(tmp_path/"ran")
    if wrong == "another model": state = filled("dover").state_dict()
    if wrong == "no head": state = {k: v for k, v in state.items() if not k.startswith("technical_head.")}
    torch.save(state, path)
    if wrong == "cut": path.write_bytes(path.read_bytes()[:10_000_000])
    for weights in (None, path):
        with pytest.raises(WeightsError, match=rf"DOVER-Mobile\.pth: .*{said}"): load_model("dover-mobile", weights)
    assert not (tmp_path/"ran").exists()


# ---------------------------------------------------------------- parts

def test_bias_is_gated_by_the_distance_between_fragments():
    attention, cells = WindowAttention(4, 2, (2, 7, 7), True), window_cells((2, 28, 28), (2, 7, 7), (0, 3, 3))
    with torch.no_grad():
        attention.relative_position_bias_table.fill_(1.)
        attention.fragment_position_bias_table.fill_(0.)
        bias = attention.bias(cells, 98)
    d = (cells[:, :, None] - cells[:, None]).abs().sum(-1)
    assert d.max() > 2 and torch.equal(bias[:, 0, :49, :49], d) and torch.equal(bias[:, 1, 49:, :49], d)


def test_groups_of_windows_do_not_matter(monkeypatch):
    torch.manual_seed(0)
    block, x = SwinBlock(8, 2, (2, 7, 7), True, True).eval(), torch.randn(2, 4, 20, 28, 8)
    with torch.no_grad():
        whole = block(x)
        monkeypatch.setattr("qualivision.official.swin3d.GROUP", 1)
        assert torch.allclose(block(x), whole, atol=1e-6)


def test_windows_are_cut_to_the_map():
    assert fit_window((4, 24, 32), (8, 7, 7), True) == ((4, 7, 7), (0, 3, 3)) and fit_window((4, 6, 8), (8, 7, 7), True) == ((4, 6, 7), (0, 0, 3))
    assert fit_window((16, 56, 56), (8, 7, 7), False) == ((8, 7, 7), (0, 0, 0))
    with pytest.raises(QualiVisionError, match="heads"): WindowAttention(10, 3, (1, 1, 1), False)


def test_response_norm_is_the_papers_on_a_single_frame():
    "Woo et al., 2023, eq. 1–3, written out."
    torch.manual_seed(0)
    x, norm = torch.randn(2, 6, 1, 5, 4), GlobalResponseNorm(6, "HW")
    with torch.no_grad(): norm.gamma.normal_(), norm.beta.normal_()
    size = x.square().sum((2, 3, 4)).sqrt()
    share = (size / (size.mean(1, keepdim=True) + 1e-6)).view(2, 6, 1, 1, 1)
    assert torch.allclose(norm(x), x + norm.gamma.view(6, 1, 1, 1) * x * share + norm.beta.view(6, 1, 1, 1), atol=1e-5)
    with pytest.raises(QualiVisionError, match="response"): GlobalResponseNorm(6, "W")


def test_named_block_is_the_numbered_one():
    torch.manual_seed(0)
    a, b = Block(8, (3, 7, 7), scale=.5), Block(8, (3, 7, 7), scale=.5, named=True)
    b.load_state_dict({k: v.view_as(w) for (k, w), v in zip(b.state_dict().items(), a.state_dict().values(), strict=True)})
    x = torch.randn(1, 8, 3, 9, 9)
    assert torch.allclose(a(x), b(x), atol=1e-6) and torch.equal(Block(8, scale=None)(x).isfinite().all(), torch.tensor(True))


@pytest.mark.parametrize("make", [lambda **o: InflatedConvNeXt3D((8, 12), (1, 2), **o),
                                  lambda **o: InflatedConvNeXt3D((8, 12), (1, 2), scale=None, grn="TH", **o),
                                  lambda **o: Swin3D(8, (1, 2), (2, 2), (2, 3, 3), (True, False), **o)])
def test_backbones_train(make):
    "Every parameter learns, and recomputation gives the same gradient."
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = make(checkpointing=checkpointing).train()
        for n, p in net.named_parameters():
            if n.endswith(("gamma", "beta")): torch.nn.init.constant_(p, .5)
        (F.gelu(net(view(0, (2, 3, 4, 32, 40)))[-1]) ** 2).mean().backward()
        gradients.append({n: p.grad for n, p in net.named_parameters()})
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[0].values())
    assert all(torch.allclose(gradients[1][n], g, rtol=1e-3, atol=1e-7) for n, g in gradients[0].items())
    net = make(drop_path=.5).train()
    assert not torch.equal(net(view(0, (2, 3, 4, 32, 40)))[-1], net(view(0, (2, 3, 4, 32, 40)))[-1])


def test_inflated_forms_are_the_two_published_ones():
    assert list(INFLATED) == ["tiny", "v2-femto"]


@pytest.mark.cuda
def test_gpu_gives_the_official_numbers(filled, official_numbers):
    model = filled("dover").cuda()
    with torch.no_grad(): maps = model({k: v.cuda() for k, v in views_of(official_numbers, "dover/alt", DOVER.views).items()})
    model.cpu()
    for v in DOVER.views: assert np.abs(maps[v].cpu().numpy() - official_numbers[f"dover/alt/{v}/score_map"]).max() < 5e-4     # TF32 convolutions


@pytest.mark.parametrize("name,kind", [("a.png", "PNG"), ("a.jfif", "JPEG"), ("a.mp4", "WEBP"), ("a", "TIFF")])
def test_dover_says_where_pictures_go(name, kind, tmp_path):
    "Told by content; of a name that lies as well. What is neither is not called a picture."
    scorer = OfficialScorer(torch.nn.Identity(), "dover", {"file": "f", "sha256": "0" * 64})
    Image.new("RGB", (32, 32)).save(tmp_path/name, kind)
    with pytest.raises(OfficialError, match="it is a picture.*`qualivision cover`"): scorer.prepare(tmp_path/name)
    (tmp_path/name).write_text("no picture " * 9)
    with pytest.raises(NotAVideo, match="it is text"): scorer.prepare(tmp_path/name)
