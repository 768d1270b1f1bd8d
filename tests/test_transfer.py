"Transfer: DOVER++'s branch as our backbone, and official DOVER on other people's opinions."
import json

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from scipy.stats import pearsonr
from typer.testing import CliRunner

from qualivision.cli import app
from qualivision.data.clips import DecodeEachTime
from qualivision.data.opinions import LabelError
from qualivision.official.known_sets import known_set
from qualivision.data.container import write_video
from qualivision.official.inflated import INFLATED, InflatedConvNeXt3D
from qualivision.models.convnext3d import ConvNeXt3D
from qualivision.official.dover import DOVER, Branches, DOVERMobile, QualityHead, view_scores
from qualivision.models.dover_mos import EMBEDDED, PUBLISHED, DoverConfig, DoverPlusPlus
from qualivision.models.dover_start import (
    BRANCH, backbone_from_dover, inherited_licence, official_names, start_from_dover)
from qualivision.official.heads import about_head, load_head, parts, save_head
from qualivision.models.frozen import FeatureCache, state_hash
from qualivision.models.store import S_LAB
from qualivision.models.weights import WeightsError, load_strict, read_state, save_checkpoint
from qualivision.quality import QualiVisionError
from qualivision.official.scorer import NETWORKS
from qualivision.official.transfer import (
    DoverSampling, FrozenBackbones, TransferConfig, cached_scores, split_views, train_heads)
from qualivision.official.ratings import hold_out, preset_settings, read_ratings
from qualivision.official.raw_scores import (
    RatingsError, limited_view_loss, plcc_loss, predicted_mos, rank_loss, view_loss)
from qualivision.toy import toy_set
from weights_formula import fill, normals, weight

VIEWS = ("technical", "aesthetic")


# ---- the backbone ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def official() -> dict:
    "All of official DOVER's names; the aesthetic branch has numbers of its own, the rest zeros."
    with torch.device("meta"): names = {k: v.shape for k, v in DOVER().state_dict().items()}
    return {k: weight(k, shape) if k.startswith(BRANCH) else torch.zeros(shape) for k, shape in names.items()}


def test_every_tensor_is_accounted_for(official, root):
    due = json.loads((root/"tests/fixtures/official_keys.json").read_text())["dover"]["keys"]
    mapped, report = backbone_from_dover(official, PUBLISHED)
    assert {m[1] for m in report.moved} | {n.removeprefix(BRANCH) for n, _ in report.unused} == {k.removeprefix(BRANCH) for k in due}
    assert len(report.moved) == len(mapped) == 180 and len(report.unused) == 381 - 180 and not report.new
    assert report.coverage == report.used == 1
    how = pd.Series([m[2] for m in report.moved]).value_counts().to_dict()
    assert how == {"copied": 125, "reshaped": 36, "centred": 18, "folded": 1}
    assert len(report.table()) == 381
    a, b = official[BRANCH + "stages.0.1.dwconv.weight"], mapped["3.0.weight"]
    assert b.shape == (96, 1, 7, 7, 7) and torch.equal(b[:, :, 2:5], a) and b[:, :, :2].abs().max() == b[:, :, 5:].abs().max() == 0
    assert torch.allclose(mapped["0.weight"], official[BRANCH + "downsample_layers.0.0.weight"].sum(2, keepdim=True))
    assert torch.equal(mapped["7.2.weight"].flatten(1), official[BRANCH + "stages.1.0.pwconv1.weight"])


def test_same_features_where_the_forms_agree(official):
    "A constant clip of 32 frames, away from its ends: official steps 6–9 are ours 6–25 (each stands for two of them, and neighbours are equal)."
    theirs, ours = InflatedConvNeXt3D(**INFLATED["tiny"]).eval(), ConvNeXt3D().eval()
    load_strict(theirs, {k.removeprefix(BRANCH): v for k, v in official.items() if k.startswith(BRANCH)})
    load_strict(ours, backbone_from_dover(official, PUBLISHED)[0])
    clip = torch.from_numpy(normals(5, (1, 3, 1, 32, 32)).astype(np.float32)).expand(-1, -1, 32, -1, -1)
    with torch.no_grad(): a, b = theirs(clip), ours(clip)
    for x, y in zip(a, b):
        inside = y[:, :, 6:26]
        assert x[:, :, 6:10].std() > .1 and (x[:, :, 7:8] - inside).abs().max() < 1e-4
        assert (x[:, :, 6:10] - x[:, :, 7:8]).abs().max() < 1e-4
    assert (a[-1][:, :, 0] - b[-1][:, :, 1]).abs().max() > 1e-2             # at the ends they do not: the comparison can fail


SMALL = dict(dims=(4, 6, 8, 10), depths=(1, 2, 1, 1))
CONFIG = DoverConfig(frames=8, size=64, **SMALL, grid=(2, 2, 2), feature_dim=16, text_dim=8, fusion_width=16)


@pytest.fixture
def small() -> dict:
    branch = fill(InflatedConvNeXt3D(**SMALL))
    return {BRANCH + k: v for k, v in branch.state_dict().items()} | {"technical_head.fc_last.bias": torch.zeros(1)}


def test_what_does_not_fit_is_an_error(small):
    assert set(official_names((1, 2, 1, 1))) == set(backbone_from_dover(small, CONFIG)[0])
    other = lambda **changes: DoverConfig(**{**CONFIG.__dict__, **changes})
    for changes in (dict(kernel=(1, 7, 7)), dict(dims=(4, 6, 8, 12)),
                    dict(final_norm=False), dict(depths=(1, 1, 1, 1)), dict(depths=(1, 3, 1, 1))):
        with pytest.raises(WeightsError): backbone_from_dover(small, other(**changes))
    with pytest.raises(WeightsError): backbone_from_dover(small, EMBEDDED)
    state, report = backbone_from_dover(small, other(depths=(1, 3, 1, 1)), at_least=.5)
    assert .5 < report.coverage < 1 and report.used == 1 and {n.split(".")[0] for n, _ in report.new} == {"7"} and "new" in str(report)
    with pytest.raises(WeightsError, match="not DOVER's"): backbone_from_dover({"module." + k: v for k, v in small.items()}, CONFIG)
    with pytest.raises(WeightsError): backbone_from_dover({k: v for k, v in small.items() if "stages.1.1" not in k}, CONFIG)


def test_a_model_starts_from_a_file_and_inherits_its_licence(small, tmp_path):
    torch.save({"state_dict": small, "validation_results": {"x": np.float64(1)}}, tmp_path/"DOVER_plus_plus.pth")
    model = DoverPlusPlus(CONFIG)
    rest = state_hash(model.fusion, model.mos_predictor)
    report = start_from_dover(model, tmp_path/"DOVER_plus_plus.pth")
    assert report.coverage == 1 and rest == state_hash(model.fusion, model.mos_predictor)
    assert torch.equal(model.dover_model.backbone[1].weight, small[BRANCH + "downsample_layers.0.1.weight"])
    assert model(torch.rand(1, 3, 8, 64, 64), torch.randn(1, 8))["mos"].isfinite().all()
    assert inherited_licence("dover++").startswith(S_LAB) and S_LAB in inherited_licence(tmp_path/"DOVER_plus_plus.pth", "MIT")
    save_checkpoint(tmp_path/"mine", model, {"licence": inherited_licence("dover++")})
    assert inherited_licence(tmp_path/"mine") == inherited_licence("dover++") == inherited_licence(tmp_path/"mine"/"model.safetensors")


# ---- heads -----------------------------------------------------------------------------------------------------------

def test_heads_are_small_and_go_back_strictly(tmp_path, official):
    file, again = tmp_path/"head.safetensors", tmp_path/"again.safetensors"
    for cls, most in ((DOVER, 400_000), (DOVERMobile, 110_000)):
        torch.manual_seed(0)
        model = cls()
        about = {"licence": S_LAB, "fusion": {"technical": [.1, .2]}, "data": "KoNViD-1k"}
        save_head(file, model, about), save_head(again, model, about)
        assert file.stat().st_size <= most and file.read_bytes() == again.read_bytes() and about_head(file)["licence"] == S_LAB
        assert set(read_state(file)) == {k for k in model.state_dict() if k.split(".")[0].endswith("_head")}
    with torch.no_grad():
        for p in parts(model, "_head").parameters(): p.zero_()
    report, about = load_head(model, file)
    assert report.coverage == 1 and not report.missing and parts(model, "_head").state_dict()["technical_head.fc_hid.weight"].abs().sum() > 0
    with pytest.raises(WeightsError, match="other backbones"): load_head(DOVERMobile(), file)
    torch.save({"a": torch.zeros(1)}, tmp_path/"x.pth")
    for bad in (tmp_path/"x.pth", tmp_path/"none.safetensors", tmp_path):
        with pytest.raises(WeightsError): about_head(bad)


# ---- losses ----------------------------------------------------------------------------------------------------------

def test_losses():
    torch.manual_seed(1)
    a, b = torch.randn(30, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    assert plcc_loss(a, b).item() == pytest.approx((1 - pearsonr(a, b).statistic) / 2, abs=1e-7)
    pred, mos = torch.tensor([1., 2, 3]), torch.tensor([1., 3, 2])              # r = 1/2; one pair of three wrong, by 1.5^½
    assert plcc_loss(pred, mos).item() == pytest.approx(.25) and rank_loss(pred, mos).item() == pytest.approx(1.5 ** .5 / 3)
    assert view_loss(pred, mos, 2.).item() == pytest.approx(.25 + 2 * 1.5 ** .5 / 3)
    z, wrong, pairs = (a - a.mean()) / a.std(correction=0), 0., 0
    for i in range(30):
        for j in range(30):
            if b[i] > b[j]: wrong, pairs = wrong + max(0., (z[j] - z[i]).item()), pairs + 1
    assert rank_loss(a, b).item() == pytest.approx(wrong / pairs, rel=1e-6)
    assert torch.allclose(view_loss(9 * a - 4, 2 * b), view_loss(a, b), atol=1e-6) and rank_loss(b ** 3, b) == 0
    flat = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    view_loss(flat, b).backward()
    assert flat.grad.isfinite().all()                                           # constant scores can learn


def test_one_label_teaches_both_branches():
    class Both(Branches):
        views = VIEWS
        def __init__(self):
            super().__init__()
            small = dict(dims=(4, 4, 4, 4), depths=(1, 1, 1, 1), scale=1.)
            self.add({v: QualityHead(4, 4, 0.) for v in VIEWS}, **{v: InflatedConvNeXt3D(**small) for v in VIEWS})
    torch.manual_seed(0)
    model = Both()
    scores = view_scores(model({v: torch.randn(4, 3, 4, 32, 32) for v in VIEWS}))
    labels = {"overall": torch.tensor([1., 2, 3, 4]), "aesthetic": torch.tensor([2., float("nan"), 1, 5])}
    limited_view_loss(scores, {"overall": labels["overall"]}).backward(retain_graph=True)
    for part in ("technical_backbone", "technical_head", "aesthetic_backbone", "aesthetic_head"):
        assert sum(p.grad.abs().sum() for p in model.get_submodule(part).parameters()) > 0, part
    there = labels["aesthetic"].isfinite()
    due = view_loss(scores["technical"], labels["overall"]) + .5 * view_loss(scores["aesthetic"], labels["overall"])
    assert torch.allclose(limited_view_loss(scores, labels), due + view_loss(scores["aesthetic"][there], labels["aesthetic"][there]))


# ---- data ------------------------------------------------------------------------------------------------------------

def test_label_files(tmp_path):
    (tmp_path/"videos").mkdir()
    for name in "abcd": (tmp_path/"videos"/f"{name}.mp4").write_bytes(b"x")
    file = tmp_path/"labels.csv"
    def read(text, **rest):
        file.write_text(text)
        return read_ratings(file, **rest)
    assert read("a.mp4,-1,-1,3\nb.mp4,-1,-1,4.5\n").overall.tolist() == [3, 4.5]
    table = read("\ufeffvideo_name,Prompt,Overall_MOS,Aesthetic_MOS\na.mp4,\"one, two\",3,2\nb.mp4,x,1,\n")
    assert table.group.tolist() == ["one, two", "x"] and np.isnan(table.aesthetic[1]) and read_ratings(tmp_path).equals(table)
    for bad in ("a.mp4,3\n", "name,quality\na.mp4,3\n", "name,mos\na.mp4,x\n", "name,mos\na.mp4,3\na.mp4,4\n", "name,mos\nz.mp4,3\n", "",
                "name,mos,score\na.mp4,3,4\n", "name,mos\na.mp4,inf\n"):
        with pytest.raises(QualiVisionError, match="labels.csv"): read(bad)
    with pytest.raises(LabelError, match="labels.csv line 2: MOS of YouTube-UGC lie from 1 to 5, this is 70"):
        read("a.mp4,-1,-1,3\nb.mp4,-1,-1,70\n", known=known_set("val-ytugc"))
    with pytest.raises(RatingsError, match=r"labels.csv line 3: 'z.mp4' is not in .*; 2 of 3 videos"): read("name,mos\na.mp4,3\nz.mp4,2\ny.mp4,2\n")
    with pytest.raises(RatingsError, match="line 3: 'cam2/a.mp4' is not in .*holds a a.mp4"): read("name,mos\na.mp4,3\ncam2/a.mp4,2\n")
    with pytest.raises(LabelError, match="line 3: './a.mp4' is the file .* as 'a.mp4' in line 2"): read("name,mos\na.mp4,3\n./a.mp4,2\n")
    with pytest.raises(RatingsError, match="line 2: 'https://x.org/a.mp4' is an address"): read("name,mos\nhttps://x.org/a.mp4,3\n")
    hundred = "name,mos,technical\na.mp4,0,50\nb.mp4,100,\nc.mp4,25,25\n"
    assert read(hundred).overall.tolist() == [0, 100, 25], "DOVER learns from any scale"
    assert read(hundred, scale="0-100")[["overall", "technical"]].fillna(9).to_numpy().tolist() == [[1, 3], [5, 9], [2, 2]]
    with pytest.raises(RatingsError, match="b.mp4: overall is 100, not from 0 to 50"): read(hundred, scale="0-50")
    assert preset_settings("val-cvd2014") == {"weight": .576, "splits": 10} and preset_settings("DIVIDE-3k", False) == {"weight": .6104}


def test_the_layout_of_a_data_set(tmp_path):
    "Opinions on any scale; but one video has one opinion here too."
    root = toy_set(tmp_path/"set", train=2, val=1)
    file = root/"train"/"labels"/"train_labels.csv"
    table = pd.read_csv(file)
    table["Overall_MOS"] *= 20
    table.to_csv(file, index=False)
    assert read_ratings(root).overall.max() > 20 and read_ratings(root, scale="0-100").overall.between(1, 5).all()
    table.loc[1, "video_name"] = "./" + table.video_name[0]
    table.to_csv(file, index=False)
    with pytest.raises(QualiVisionError, match="duplicate name"): read_ratings(root)


def test_held_out_by_group():
    table = pd.DataFrame({"group": np.repeat([f"p{i}" for i in range(20)], 5)})
    train, test = hold_out(table, .2, 3)
    assert len(test) == 20 and len(train) == 80 and not set(table.group[train]) & set(table.group[test])
    shuffled = table.sample(frac=1, random_state=0).reset_index(drop=True)
    assert set(shuffled.group[hold_out(shuffled, .2, 3)[1]]) == set(table.group[test])       # names decide, not the order of the rows
    with pytest.raises(RatingsError): hold_out(table.iloc[:2], .2, 0)


# ---- the whole way ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    for i in range(6):
        frames = 128 + np.random.default_rng(i).normal(0, 4 + 8 * i, (4, 64, 80, 3))
        write_video(folder/f"{i}.mp4", frames.clip(0, 255).astype(np.uint8), crf=12)
    (folder/"labels.csv").write_text("name,mos\n" + "".join(f"{i}.mp4,{5 - .6 * i:.2f}\n" for i in range(6)))
    torch.save(fill(tiny.Mobile()).state_dict(), folder/"mobile.pth")
    return folder


def test_command(videos, tmp_path, monkeypatch):
    "With a small network of DOVER-Mobile's form."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(NETWORKS, "dover-mobile", tiny.Mobile)
    def call(*args):
        r = CliRunner().invoke(app, ["transfer", "--data", str(videos), "--model", "dover-mobile", *map(str, args)])
        assert r.exception is None or isinstance(r.exception, SystemExit), r.exception
        return r.exit_code, r.stdout, r.stderr
    usual = ("--weights", videos/"mobile.pth", "--epochs", 3, "--test", .5, "--batch-size", 4)
    status, out, err = call("--head-only", "--out", "a.safetensors", *usual, "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["splits"][0]["train"] == report["splits"][0]["test"] == 3 and report["licence"].startswith(S_LAB)
    assert report["splits"][0]["after"]["overall"]["srocc"]["value"] is not None and (tmp_path/"a.json").exists()
    features = sorted(p for p in tmp_path.glob("cache/features-*/*/*.safetensors"))
    times = [p.stat().st_mtime_ns for p in features]
    status, text, _ = call("--head-only", "--out", "b.safetensors", *usual)
    assert status == 0 and "SROCC" in text and "non-commercial" in text
    assert (tmp_path/"a.safetensors").read_bytes() == (tmp_path/"b.safetensors").read_bytes()
    assert (tmp_path/"a.json").read_bytes() == (tmp_path/"b.json").read_bytes()
    assert len(features) == 6 and times == [p.stat().st_mtime_ns for p in features]           # computed once
    model = fill(tiny.Mobile())
    before = state_hash(*parts(model, "_backbone").children())
    fits, about = load_head(model, tmp_path/"a.safetensors")                                  # strictly, onto the weights that it came from
    assert fits.coverage == 1 and before == about["backbones"] and (tmp_path/"a.safetensors").stat().st_size < 110_000
    with torch.no_grad(): scores = {v: s.mean().item() for v, s in view_scores(model(split_views(DoverSampling()(videos/"0.mp4")))).items()}
    store = FeatureCache(tmp_path/"cache", DecodeEachTime(DoverSampling()), FrozenBackbones(model))
    cached = cached_scores(model, store, [videos/"0.mp4"], "cpu")                             # the command's own features
    assert all(abs(cached[v][0] - scores[v]) < 1e-3 for v in scores) and 0 < predicted_mos(scores, about["fusion"]) < 6
    for wrong in (("--head-only", "--from-scratch"), ("--head-only", "--preset", "val-x"), ("--head-only", "--data", "none"),
                  ("--head-only", "--preset", "val-livevqc", "--test", 2)):
        status, _, err = call("--out", "d.safetensors", *wrong)
        assert status and err and not (tmp_path/"d.safetensors").exists(), wrong


def test_heads_learn_from_fixed_features(videos, tmp_path):
    "Features in which the answer stands: the heads find it, from fresh heads too, and the backbones stay."
    class Known(Branches):
        views = VIEWS
        def __init__(self):
            super().__init__()
            self.add({v: QualityHead(4, 4, 0.) for v in VIEWS}, **{v: torch.nn.Conv3d(3, 4, 1) for v in VIEWS})
    class Store:
        def get(self, path): return {v: answers[path].expand(1, 4, 2, 2, 2).half() for v in VIEWS}
    rng = np.random.default_rng(0)
    mos = rng.uniform(1, 5, 40)
    answers = {str(i): torch.tensor(np.r_[m, rng.normal(size=3)]).view(1, 4, 1, 1, 1) for i, m in enumerate(mos)}
    table = pd.DataFrame({"video": list(answers), "path": list(answers), "overall": mos, "group": list(answers)})
    torch.manual_seed(0)
    model = Known()
    backbones = state_hash(*parts(model, "_backbone").children())
    runs = train_heads(model, table, Store(), TransferConfig(epochs=20, lr=3e-2, splits=3, fresh_heads=True))
    assert all(r["after"]["overall"]["srocc"]["value"] > .8 > r["before"]["overall"]["srocc"]["value"] for r in runs)
    assert backbones == state_hash(*parts(model, "_backbone").children()) and len({r["seed"] for r in runs}) == 3
    first = cached_scores(model, Store(), table.path, torch.device("cpu"))
    (alone,) = train_heads(model, table, Store(), TransferConfig(epochs=20, lr=3e-2, fresh_heads=True))
    assert alone == runs[0] and all((first[v] == cached_scores(model, Store(), table.path, torch.device("cpu"))[v]).all() for v in VIEWS)
