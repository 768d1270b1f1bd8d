"Official DOVER trained through the command line: the losses by hand, one label for both views, labels of each view, pseudo-labels, heads in use."
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from qualivision import cli
from qualivision.official.views import dover_views
from qualivision.data.container import write_video
from qualivision.official import scorer as official
from qualivision.official.datasets import set_metrics
from qualivision.official.dover import DOVER, Branches, DOVERMobile, QualityHead, view_scores
from qualivision.official.fused import SET_WEIGHTS
from qualivision.official.heads import load_head, parts, save_head
from qualivision.models.frozen import state_hash
from qualivision.models.store import S_LAB
from qualivision.models.weights import load_checkpoint
from qualivision.official import transfer as training
from qualivision.devices import seed_all
from qualivision.official.transfer import FreshViews

VIEWS = ("technical", "aesthetic")


class Glance(torch.nn.Sequential):
    "One layer in the place of a backbone."
    def __init__(self, width): super().__init__(torch.nn.Conv3d(3, width, (8, 32, 32), (8, 32, 32)), torch.nn.GELU())
    def forward(self, x): return [super().forward(x)]


class Small(Branches):
    "DOVER's parts as small as they can be, and without chance: no dropout."
    views = VIEWS

    def __init__(self, checkpointing=False, width=32, hidden=8):
        super().__init__()
        self.add({v: QualityHead(width, hidden, 0.) for v in VIEWS}, **{v: Glance(width) for v in VIEWS})


class Other(Small):
    def __init__(self, checkpointing=False): super().__init__(width=24)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    "Six clips with more and more noise, a broken file, weights of the small model."
    folder = tmp_path_factory.mktemp("set")
    for i in range(6):
        frames = 128 + np.random.default_rng(i).normal(0, 4 + 8 * i, (4, 64, 80, 3))
        write_video(folder/f"{i}.mp4", frames.clip(0, 255).astype(np.uint8), crf=12)
    (folder/"broken.mp4").write_bytes(b"no video")
    torch.manual_seed(0)
    torch.save(Small().state_dict(), folder/"small.pth")
    return folder


@pytest.fixture
def call(videos, monkeypatch, tmp_path):
    "The command in an empty folder, with small models in the place of the large ones."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUALIVISION_WEIGHTS", str(tmp_path/"w"))
    monkeypatch.setitem(official.NETWORKS, "dover", Small)
    monkeypatch.setitem(official.NETWORKS, "dover-mobile", Other)
    def run(*args):
        r = CliRunner().invoke(cli.app, [*map(str, args)])
        assert r.exception is None or isinstance(r.exception, SystemExit), r.exception
        return r.exit_code, json.loads(r.stdout) if "--json" in args and r.stdout else r.stdout, r.stderr
    return run


def labels(text: str, name="labels.csv") -> Path:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text)
    return Path(name)


OVERALL = "name,mos\n" + "".join(f"{i}.mp4,{5 - .6 * i:.2f}\n" for i in range(6))
ONE_STEP = ("--epochs", 1, "--test", .34, "--batch-size", 4, "--json")


def by_hand(s, y) -> tuple[float, float]:
    "(1 − r)/2, and how far pairs stand in the wrong order, pair by pair."
    s, y = np.asarray(s, float), np.asarray(y, float)
    z, wrong = (s - s.mean()) / s.std(), []
    for i in range(len(y)):
        for j in range(len(y)):
            if y[i] > y[j]: wrong.append(max(0, z[j] - z[i]))
    return (1 - np.corrcoef(s, y)[0, 1]) / 2, np.mean(wrong)


def first_scores(model, videos, report) -> tuple[dict, list]:
    "What the untrained model says of the videos of the only step, and which these are."
    table = pd.DataFrame({"group": [f"{i}.mp4" for i in range(6)]})
    rows, _ = training.hold_out(table, .34, 0)
    assert report["splits"][0]["train"] == len(rows) == 4
    views = FreshViews([videos/f"{i}.mp4" for i in range(6)], 0)
    with torch.no_grad(): found = view_scores(model({v: torch.stack([views[i][v] for i in rows]) for v in VIEWS}))
    return {v: s.numpy() for v, s in found.items()}, rows.tolist()


def fresh(kind=Small):
    seed_all(0)
    return kind()


# ---- training ---------------------------------------------------------------------------------------------------------

def test_one_label_teaches_both_views_with_plcc_and_rank_loss(call, videos, tmp_path):
    "`train --data`: the loss of the first step is that of both untrained branches under the one label, and everything learns."
    args = "train", "--model", "dover", "--data", labels(OVERALL), "--videos", videos, *ONE_STEP
    status, report, err = call(*args, "--out", "a")
    assert status == 0, err
    start = fresh()
    scores, rows = first_scores(start, videos, report)
    terms = [by_hand(scores[v], [5 - .6 * i for i in rows]) for v in VIEWS]
    assert sum(rank for _, rank in terms) > .05                                  # there is something to order
    assert report["splits"][0]["loss"][0] == pytest.approx(sum(plcc + .3 * rank for plcc, rank in terms), abs=2e-4)
    status, alone, _ = call(*args, "--out", "b", "--rank-weight", 0)
    assert alone["splits"][0]["loss"][0] == pytest.approx(sum(plcc for plcc, _ in terms), abs=2e-4)
    model = Small()
    model.load_state_dict(load_checkpoint("a")[0])
    for part in (f"{v}_{end}" for v in VIEWS for end in ("backbone", "head")):
        assert state_hash(getattr(model, part)) != state_hash(getattr(start, part)), f"{part} has learned nothing"
    assert report["licence"] == "" and report["weights"] is None and report["mode"] == "end-to-end"
    assert json.loads(Path("a/report.json").read_text()) == report
    assert call(*args, "--out", "c")[0] == 0
    assert Path("a/model.safetensors").read_bytes() == Path("c/model.safetensors").read_bytes() != Path("b/model.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.run"))


def test_views_learn_from_opinions_of_their_own(call, videos):
    "Lines as DIVIDE-3k has them: each view under its own label, the overall one counts half; a view nobody was asked about does without."
    own = {"aesthetic": [2, 5, 1, 4, 3, 6], "technical": [1, 3, 2, 6, 4, 5]}
    text = "".join(f"{i}.mp4,{own['aesthetic'][i]},{own['technical'][i]},{5 - .6 * i:.2f}\n" for i in range(6))
    args = "train", "--data", labels(text, "DIVIDE/labels.txt"), "--videos", videos, "--columns", "name,aesthetic,technical,overall", *ONE_STEP
    status, report, err = call(*args, "--out", "a")
    assert status == 0, err
    scores, rows = first_scores(fresh(), videos, report)
    def view_loss(v, y):
        plcc, rank = by_hand(scores[v], [y[i] for i in rows])
        return plcc + .3 * rank
    shared, separate = {v: view_loss(v, [5 - .6 * i for i in range(6)]) for v in VIEWS}, {v: view_loss(v, own[v]) for v in VIEWS}
    assert all(abs(separate[v] - shared[v]) > .02 for v in VIEWS)                 # the labels do disagree
    assert report["splits"][0]["loss"][0] == pytest.approx(sum(separate[v] + .5 * shared[v] for v in VIEWS), abs=2e-4)
    status, only, _ = call(*args, "--out", "b", "--shared-weight", 0)
    assert only["splits"][0]["loss"][0] == pytest.approx(sum(separate.values()), abs=2e-4)
    half = "".join(f"{i}.mp4,,{own['technical'][i]},{5 - .6 * i:.2f}\n" for i in range(6))
    status, half, err = call(*args[:2], labels(half, "DIVIDE/half.txt"), *args[3:], "--out", "c")
    due = separate["technical"] + .5 * shared["technical"] + shared["aesthetic"]
    assert status == 0 and half["splits"][0]["loss"][0] == pytest.approx(due, abs=2e-4), err
    told = report["splits"][0]["after"]                                           # each view is judged by its own opinions
    assert set(told) == {"overall", "technical", "aesthetic"}


def test_end_to_end_transfer_begins_with_the_weights(call, videos):
    args = "transfer", "--end-to-end", "--data", labels(OVERALL), "--videos", videos, "--weights", videos/"small.pth", *ONE_STEP
    status, report, err = call(*args, "--out", "a")
    assert status == 0, err
    given = Small()
    given.load_state_dict(torch.load(videos/"small.pth", weights_only=True))
    scores, rows = first_scores(given, videos, report)
    due = sum(plcc + .3 * rank for plcc, rank in (by_hand(scores[v], [5 - .6 * i for i in rows]) for v in VIEWS))
    assert report["splits"][0]["loss"][0] == pytest.approx(due, abs=2e-4)
    assert report["licence"].startswith(S_LAB) and "before that small.pth" in report["trained_on"]
    assert load_checkpoint("a")[1]["licence"] == report["licence"]
    same = call("train", "--data", "labels.csv", "--videos", videos, "--weights", videos/"small.pth", *ONE_STEP, "--out", "b")[1]
    assert same == report and Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    status, (r,), _ = call("dover", videos/"0.mp4", "--weights", "a", "--head", "a", "--json")
    c = load_checkpoint("a")[1]["fusion"]
    z = {v: (r[v] - c[v][0]) / c[v][1] for v in VIEWS}
    mos = ((c["weight"] * z["technical"] + (1 - c["weight"]) * z["aesthetic"]) - c["fused"][0]) / c["fused"][1] * c["mos"][1] + c["mos"][0]
    assert status == 0 and r["mos"] == pytest.approx(mos) and S_LAB in r["weights"]["licence"] and r["weights"]["head"]["data"] == "labels.csv"
    status, said, _ = call("dover", videos/"0.mp4", "--weights", videos/"small.pth", "--head", "a", "--json")
    assert status == 1 and "--weights a" in said[0]["error"]


def test_learns_what_there_is_to_learn(call, videos):
    "More steps through the command: the loss falls."
    status, report, err = call("train", "--data", labels(OVERALL), "--videos", videos, "--epochs", 6, "--test", .34, "--batch-size", 4, "--lr", .05,
                               "--out", "a", "--json")
    loss = report["splits"][0]["loss"]
    assert status == 0 and len(loss) == 6 and loss[-1] < .6 * loss[0], loss


def test_scores_are_pseudo_labels(call, videos):
    "What `score-set` wrote of one model is what `train` teaches another; a video that failed is left out, and said."
    folder = Path("clips")
    folder.mkdir()
    for p in videos.glob("*.mp4"): shutil.copy(p, folder)
    assert call("score-set", folder, "--model", "dover", "--weights", videos/"small.pth", "--out", "scores.csv")[0] == 1      # broken.mp4
    args = "train", "--model", "dover-mobile", "--data", "scores.csv", "--videos", folder
    status, report, err = call(*args, *ONE_STEP, "--out", "a")
    assert status == 0 and report["videos"] == 6 and report["left_out"] == 1 and "1 rows left out" in err
    assert report["trained_on"] == "scores in scores.csv, no opinions, 6 videos"
    taught = pd.read_csv("scores.csv").dropna(subset=["fused"]).sort_values("video")
    scores, rows = first_scores(fresh(Other), folder, report)
    due = 0
    for v in VIEWS:
        for weight, column in ((.5, "fused"), (1, v)):
            plcc, rank = by_hand(scores[v], taught[column].to_numpy()[rows])
            due += weight * (plcc + .3 * rank)
    assert report["splits"][0]["loss"][0] == pytest.approx(due, abs=5e-4)
    status, text, _ = call(*args, *ONE_STEP[:-1], "--out", "a")
    assert status == 0 and "no opinions" in text and "dover VIDEO --mobile --weights a --head a" in text and "Licence: yours" in text
    usual = "--weights", videos/"small.pth", "--out"
    assert call("score-set", folder, "--model", "dover", "--format", "dover", "--pattern", "?.mp4", *usual, "d.csv")[0] == 0
    assert call("transfer", "--data", "d.csv", "--videos", folder, *usual, "h.safetensors", *ONE_STEP)[1]["videos"] == 6


@pytest.mark.parametrize("args,said", [
    ("train --model dover-mobile", "--data"), ("train --out x", "--data"), ("train --epochs 3", "--data"), ("train --device cpu", "--data"),
    ("train --data l.csv", "folder"), ("train --data l.csv --out x --model vjepa2", "vjepa2"),
    ("train --data l.csv --out x --profile paper", "--data"),
    ("transfer --data l.csv --out x.safetensors --model cover", "cover"), ("score-set . --model cover --out a.csv --head h.safetensors", "DOVER"),
    ("infer-datasets l.csv --model cover --head h.safetensors", "DOVER"),
    ("score-set . --model dover --out a.csv --head h.safetensors --format dover", "no place for mos")])
def test_wrong_use(call, args, said):
    status, out, err = call(*args.split())
    assert status == 2 and not out and said in err


def test_what_cannot_be_trained_on(call, videos):
    "Each refusal names the file, and the line where there is one."
    for text, rest, said in (("name,mos\n0.mp4,3\n1.mp4,x\n", (), "l.csv line 3: overall is 'x'"), (OVERALL, ("--preset", "val-x"), "val-kv1k"),
                             ("0.mp4,-1,-1,3\n1.mp4,-1,-1,30\n", ("--preset", "val-kv1k"), "l.csv line 2: MOS of KoNViD-1k lie from 1 to 5"),
                             ("name,mos\n0.mp4,3\n9.mp4,2\n", (), "l.csv line 3: '9.mp4' is not in"), (OVERALL, ("--batch-size", 2), "batch_size"),
                             (OVERALL, ("--weights", videos/"broken.mp4"), "broken.mp4")):
        for command in (("train", "--out", "a"), ("transfer", "--out", "a.safetensors")):
            status, answer, err = call(*command, "--data", labels(text, "l.csv"), "--videos", videos, *rest, "--json")
            assert status == 1 and said in answer["error"] and said in err and not list(Path().glob("a*")), (command, said)


def test_presets_split_ten_times(call, videos):
    status, report, err = call("transfer", "--data", labels(OVERALL), "--videos", videos, "--weights", videos/"small.pth", "--preset", "val-kv1k",
                               "--epochs", 1, "--test", .5, "--batch-size", 3, "--out", "h.safetensors", "--json")
    assert status == 0 and len(report["splits"]) == 10 and report["config"]["weight"] == .54 and report["data"] == "KoNViD-1k", err
    assert {s["seed"] for s in report["splits"]} == set(range(10)) and report["over_splits"]


# ---- heads in use -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, name, flag, size, heads", [
    (DOVERMobile, "dover-mobile", "--mobile", 110_000, 24_706),
    pytest.param(DOVER, "dover", "--device=cpu", 400_000, 98_562, marks=pytest.mark.slow)])
def test_heads_of_the_real_size(kind, name, flag, size, heads, tmp_path, monkeypatch):
    "Official networks: a small file on the official weights; official fields as without it, and the MOS worked out by hand."
    monkeypatch.chdir(tmp_path)
    write_video("a.mp4", np.random.default_rng(0).integers(0, 255, (8, 64, 96, 3), dtype=np.uint8))
    torch.manual_seed(0)
    model = kind().eval()
    torch.save(model.state_dict(), "official.pth")
    before = {k: v.clone() for k, v in parts(model, "_head").state_dict().items()}
    constants = {"technical": [.1, .05], "aesthetic": [-.2, .1], "fused": [.3, 1.7], "mos": [3.1, .6], "weight": .61}
    for part in parts(model, "_head").values(): torch.nn.init.normal_(part.fc_last.weight)
    save_head("head.safetensors", model, {"model": name, "licence": S_LAB, "data": "mine.csv", "videos": 99, "fusion": constants})
    assert Path("head.safetensors").stat().st_size <= size and sum(p.numel() for p in parts(model, "_head").parameters()) == heads
    seen, computed = [], kind.features
    monkeypatch.setattr(kind, "features", lambda self, views: seen.append(computed(self, views)) or seen[0])
    r = CliRunner().invoke(cli.app, f"dover a.mp4 --weights official.pth {flag} --head head.safetensors --device cpu --json".split())
    (record,), (features,) = json.loads(r.stdout), seen                          # each view is looked at once
    assert r.exit_code == 0, r.stderr
    keys = ["video", "technical", "aesthetic", "fused", "mos", "ranks", "seed", "weights", "error", "error_kind"]
    assert [k for k in record if k != "why_no_ranks"] == keys
    with torch.no_grad():
        own = {v: model.get_submodule(f"{v}_head")(x).mean().item() for v, x in features.items()}
        parts(model, "_head").load_state_dict(before)
        official_scores = {v: model.get_submodule(f"{v}_head")(x).mean().item() for v, x in features.items()}
    assert {v: record[v] for v in VIEWS} == pytest.approx(official_scores, abs=1e-6) and max(abs(own[v] - official_scores[v]) for v in VIEWS) > .01
    mos = 3.1 + .6 * (.61 * (own["technical"] - .1) / .05 + .39 * (own["aesthetic"] + .2) / .1 - .3) / 1.7
    assert record["mos"] == pytest.approx(mos, abs=1e-4)
    assert record["weights"]["head"]["data"] == "mine.csv" and len(record["weights"]["head"]["sha256"]) == 64 and "head" not in record


@pytest.fixture
def head(call, videos):
    "Heads that the command trained."
    status, report, err = call("transfer", "--data", labels(OVERALL), "--videos", videos, "--weights", videos/"small.pth", "--epochs", 2,
                               "--test", .34, "--out", "head.safetensors", "--json")
    assert status == 0, err
    return report


@pytest.mark.usefixtures("one_thread")
def test_a_trained_head_is_used_everywhere(call, videos, head):
    usual = "--weights", videos/"small.pth"
    plain, = call("dover", videos/"0.mp4", *usual, "--json")[1]
    with_head, = call("dover", videos/"0.mp4", *usual, "--head", "head.safetensors", "--json")[1]
    assert "mos" not in plain and list(with_head) == ["video", *VIEWS, "fused", "mos", "ranks", "seed", "weights", "error", "error_kind"]
    assert all(with_head[k] == v for k, v in plain.items() if k != "weights")
    model = Small().eval()
    model.load_state_dict(torch.load(videos/"small.pth", weights_only=True))
    load_head(model, "head.safetensors")
    with torch.no_grad(): own = {v: m.mean().item() for v, m in model(dover_views(videos/"0.mp4", seed=0)).items()}
    c = head["splits"][0]["fusion"]
    z = sum(w * (own[v] - c[v][0]) / c[v][1] for v, w in (("technical", c["weight"]), ("aesthetic", 1 - c["weight"])))
    assert with_head["mos"] == pytest.approx((z - c["fused"][0]) / c["fused"][1] * c["mos"][1] + c["mos"][0], abs=1e-4)
    status, text, _ = call("dover", videos/"0.mp4", *usual, "--head", "head.safetensors")
    assert status == 0 and "on the scale of labels.csv" in text and "trained on labels.csv, 6 videos" in text
    status, rows, _ = call("dover", videos/"broken.mp4", *usual, "--head", "head.safetensors", "--json")
    assert status == 1 and rows[0]["mos"] is None
    # a set of videos, its comparison with the labels, and the known sets
    args = "score-set", videos, "--model", "dover", *usual, "--pattern", "?.mp4", "--out", "s.csv"
    assert call(*args, "--json")[1]["scored"] == 6
    again = call(*args, "--head", "head.safetensors", "--json")[1]
    table = pd.read_csv("s.csv")
    assert again["scored"] == 6 and list(table) == ["video", "technical", "aesthetic", "fused", "mos", "error", "error_kind", "sha256"]
    assert table.mos[0] == pytest.approx(with_head["mos"], abs=1e-6) and table.fused[0] == pytest.approx(plain["fused"], abs=1e-6)
    Path("truth.csv").write_text("video,mos\n" + OVERALL.split("\n", 1)[1])
    status, told, err = call("evaluate", "s.csv", "truth.csv", "--pred", "mos", "--target", "mos", "--json")
    assert status == 0, err
    known = labels("".join(f"{i}.mp4,-1,-1,{5 - .6 * i:.2f}\n" for i in range(6)), "KoNViD/labels.txt")
    status, (r,), _ = call("infer-datasets", known, "--videos", videos, *usual, "--head", "head.safetensors", "--json")
    (metrics,) = told.values()
    assert status == 0 and r["head"]["srocc"] == pytest.approx(metrics["srocc"]) and r["head"]["rmse"] == pytest.approx(metrics["rmse"], abs=1e-5)
    assert r["plcc"] == pytest.approx(call("infer-datasets", known, "--videos", videos, *usual, "--json")[1][0]["plcc"], abs=1e-5)
    assert "mos of the heads" in call("infer-datasets", known, "--videos", videos, *usual, "--head", "head.safetensors")[1]


def test_wrong_heads_are_refused(call, videos, head):
    "Of another model, of other weights, of another size, cut off, without constants, no file of heads, not there."
    torch.manual_seed(5)
    torch.save(Small().state_dict(), "others.pth"); torch.save(Other().state_dict(), "mobile.pth")
    wide = Small(hidden=16)
    state = torch.load(videos/"small.pth", weights_only=True)
    wide.load_state_dict({k: v for k, v in state.items() if "_backbone" in k} | {k: v for k, v in wide.state_dict().items() if "_head" in k})
    save_head("wide.safetensors", wide, {"model": "dover", "fusion": head["splits"][0]["fusion"]})
    given = Small()
    given.load_state_dict(state)
    save_head("bare.safetensors", given, {"model": "dover"})
    save_head("zero.safetensors", given, {"model": "dover", "fusion": head["splits"][0]["fusion"] | {"mos": [3, 0]}})
    whole = Path("head.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[:-64])
    Path("text.safetensors").write_text("no heads")
    usual = ("--weights", videos/"small.pth")
    for args, said in {("--weights", "others.pth", "--head", "head.safetensors"): "trained on other backbones (small.pth)",
                       ("--mobile", "--weights", "mobile.pth", "--head", "head.safetensors"): "heads are of dover, and this is dover-mobile",
                       (*usual, "--head", "wide.safetensors"): "of another shape: technical_head.fc_hid.weight",
                       (*usual, "--head", "cut.safetensors"): "not a whole one",
                       (*usual, "--head", "text.safetensors"): "not a whole one", (*usual, "--head", "bare.safetensors"): "become a MOS",
                       (*usual, "--head", "zero.safetensors"): "become a MOS", (*usual, "--head", videos/"small.pth"): "no file of heads",
                       (*usual, "--head", "gone.safetensors"): "no such file"}.items():
        status, rows, err = call("dover", videos/"0.mp4", *args, "--json")
        assert status == 1 and said in rows[0]["error"] and said in err and rows[0]["mos"] is rows[0]["technical"] is None, (args, err)
        assert rows[0]["error"].startswith(f"{args[-1]}: "), rows[0]["error"]


def test_a_head_goes_with_its_model_s_name(call, videos):
    "Mobile heads on DOVER's weights."
    torch.manual_seed(1)
    torch.save(Other().state_dict(), "mobile.pth")
    status, _, err = call("transfer", "--data", labels(OVERALL), "--videos", videos, "--model", "dover-mobile", "--weights", "mobile.pth",
                          "--epochs", 1, "--test", .34, "--out", "m.safetensors")
    assert status == 0, err
    assert call("dover", videos/"0.mp4", "--mobile", "--weights", "mobile.pth", "--head", "m.safetensors", "--json")[1][0]["mos"] is not None
    status, (r,), _ = call("dover", videos/"0.mp4", "--weights", videos/"small.pth", "--head", "m.safetensors", "--json")
    assert status == 1 and "heads are of dover-mobile, and this is dover" in r["error"]


# ---- set-level fusion -------------------------------------------------------------------------------------------------

class Given:
    "Scores that were worked out beforehand."
    name, columns, settings = "dover", ("technical", "aesthetic", "fused"), {}
    scores = {"0": (-1, -1), "1": (-1, 1), "2": (1, -1), "3": (1, 1)}
    def prepare(self, path): return Path(path).stem
    def rate(self, name, prompt): return dict(zip(self.columns, (.04 * self.scores[name][0] - .1, .09 * self.scores[name][1] + .03, .5)))


def test_a_set_worked_out_on_paper(call, videos, monkeypatch):
    """Standardised, the scores are ±1; with a weight of 0.75 the fused ones are −1, −0.5, 0.5, 1. Opinions 2, 1, 3, 5: one pair of six is in the
    wrong order, the squared differences of ranks add up to 2, the covariance is 1, the variances are 0.625 and 2.1875."""
    monkeypatch.setattr("qualivision.commands.official.set_scorer", lambda *a, **k: Given())
    file = labels("0.mp4,-1,-1,2\n1.mp4,-1,-1,1\n2.mp4,-1,-1,3\n3.mp4,-1,-1,5\n", "l.txt")
    args = "infer-datasets", file, "--videos", videos, "--weight", .75
    status, (r,), err = call(*args, "--json")
    plcc = 1 / (.625 * 2.1875) ** .5
    due = dict(srocc=1 - 6 * 2 / (4 * 15), krcc=(5 - 1) / 6, plcc=plcc, rmse=(2 * 2.1875 * (1 - plcc)) ** .5)
    assert status == 0 and {m: r[m] for m in due} == pytest.approx(due, abs=1e-9), err
    text = " ".join(call(*args)[1].split())
    assert "SROCC 0.8000 PLCC 0.8552 KRCC 0.6667 RMSE 0.7958" in text


# means of technical, aesthetic, MOS and their covariance in DOVER's published predictions; PLCC of the published overall, and of the two branches
PUBLISHED = {"KoNViD-1k": ([-.1108095946504424, .04598554707792573, 3.0295199377225],
                           [[.0017339597147495653, .0030600852785853468, .022826689483941426],
                            [.0030600852785853468, .007122003532722405, .04617081002055423],
                            [.022826689483941426, .04617081002055423, .4106741964291889]], 1200, .8835, .8554, .8537),
             "CVD2014": ([-.09456596540239377, .10884552406675468, 44.9282905982906],
                         [[.00148716687697718, .0026005915034734072, .6816298363635118],
                          [.0026005915034734072, .005747890324083469, 1.2828863643417237],
                          [.6816298363635118, 1.2828863643417237, 459.7987321206808]], 234, .8322, .8243, .7891)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_correlations(name):
    "PLCC of a linear fusion follows from means and covariances: any videos that have the published ones give the published PLCC."
    mean, covariance, n, overall, technical, aesthetic = PUBLISHED[name]
    x = np.random.default_rng(0).normal(size=(n, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, ddof=0))).T @ np.linalg.cholesky(covariance).T + mean
    r = set_metrics({"technical": x[:, 0], "aesthetic": x[:, 1]}, {"overall": x[:, 2]}, SET_WEIGHTS[name])
    assert [round(v, 4) for v in (r["plcc"], *(r["branches"][b]["plcc"] for b in VIEWS))] == [overall, technical, aesthetic]
    assert round(set_metrics({"technical": x[:, 0], "aesthetic": x[:, 1]}, {"overall": x[:, 2]}, .9)["plcc"], 4) != overall


@pytest.mark.slow
def test_the_real_mobile_network_learns_end_to_end(videos, tmp_path, monkeypatch):
    "DOVER-Mobile in its own size through the command: one step, all of it."
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = DOVERMobile()
    torch.save({"state_dict": model.state_dict()}, "m.pth")
    labels("".join(OVERALL.splitlines(keepends=True)[:5]))
    args = "transfer --end-to-end --model dover-mobile --weights m.pth --data labels.csv --epochs 1 --test .25 --batch-size 3 --device cpu --out a"
    r = CliRunner().invoke(cli.app, [*args.split(), "--videos", str(videos), "--json"])
    assert r.exit_code == 0, r.stderr
    report, state = json.loads(r.stdout), load_checkpoint("a")[0]
    assert report["splits"][0]["train"] == 3 and 0 < report["splits"][0]["loss"][0] < 4
    same = [k for k, v in model.state_dict().items() if torch.equal(v, state[k])]
    assert {k.split(".")[1] for k in same} <= {"head", "norm_head"}, same           # 1000 classes that nothing computes; all else has learned
