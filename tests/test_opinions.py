"Published sets of opinions: every form read from a small file in its exact form, and refused by line and column; pairs; FETV's pull."
import csv
import hashlib
import json
import math
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import command

from qualivision.data.collection import read_opinions, recognised_set
from qualivision.data.opinions import OPINION_SETS, LabelError, opinion_set
from qualivision.files import FileError
from qualivision.inference.score import _rows
from qualivision.official import datasets
from qualivision.quality import DIMENSIONS, MOS_COLUMNS, QualiVisionError

AIGVE = ("technical_quality", "dynamic", "consistency", "physics", "element_presence", "element_quality", "action_presentence",
         "action_quality", "overall")


def aigve(rows, presence="element_presence") -> str:
    clips = [{"id": i, "prompt_gt": f"p{i}", **dict(zip(AIGVE, row)), "model": "lavie", "subject": ["x"], "video_path_pd": f"lavie_{i}.mp4"}
             for i, row in enumerate(rows)]
    text = json.dumps({"metainfo": {"length": len(rows), "note": 'a "data_list": ['}, "data_list": clips}, indent=1)
    return text.replace('"element_presence"', f'"{presence}"')


def lines(*rows) -> str: return "".join(json.dumps(r) + "\n" for r in rows)


def rater(n: int, *scores) -> str:
    rows = [{"model": "wan2.2", "video": f"ball_{i}", "physical_laws": ["gravity"], "na_laws": ["gravity"], "prompt_id": i,
             "scores": {"general": s, "physical": {"gravity": 1}}} for i, s in enumerate(scores)]
    return json.dumps({"annotator_id": f"annotator_{n:03d}", "num_annotations": len(rows), "annotations": rows}, indent=2)


def of_fetv(*scores) -> str:
    names = ("static_quality", "temporal_quality", "alignment", "fine-grained_alignment")
    return lines(*({str(i): {"video_id": f"video{i}", **dict(zip(names, s))}} for i, s in enumerate(scores)))


def conversation(video, mos): return {"video": video, "mos": mos, "conversations": [{"from": "human", "value": "<video>\nrate"}]}


FEEDBACK = {"id": ["1", "2"], "images": [["1_0.jpg"], ["2_0.jpg"]], "text prompt": ["a cat", "a dog"], "video link": ["https://x.org/1.mp4", "2.mp4"],
            "visual quality": [1, 4], "temporal consistency": [2, 3], "dynamic degree": [3, 3], "text-to-video alignment": [4, 1],
            "factual consistency": [2, 2]}
PAIRS = "path_A,path_B,A_model,B_model,prompt,fps_A,num_frames_A,fps_B,num_frames_B,VQ,MQ,TA,Overall\n"

# name: (file, its text, {dimension: the opinions}, generators)
FILES = {
    "taobaovd_gc": ("train_labels.csv", f"video_name,Prompt,{','.join(MOS_COLUMNS)}\nA_1.mp4,\"a cat, red\",1,2,3.67,,5\n",
                    dict(zip(DIMENSIONS, ([1], [2], [3.67], [math.nan], [5]))), ["A"]),
    "taobaovd_gc_lines": ("train_temporal.jsonl", lines(conversation("B_1.mp4", 2.5), conversation("C_1.mp4", 4)),
                          {"temporal": [2.5, 4]}, ["B", "C"]),
    "aigve_bench": ("train.json", aigve([(4, 1, 5, 3, 5, 4, 0, 0, 2), (0, 1, 2.5, 3, 5, 4, 0, 5, None)]),
                    {"traditional": [4.2, 1], "temporal": [5, 3], "alignment": [5, 5], "overall": [2.6, math.nan]}, ["lavie", "lavie"]),
    "phyground": ("annotator_001.json", rater(1, {"persistence": 3, "PTV": 1, "SA": 5}, {"persistence": None}),
                  {"temporal": [3, math.nan], "alignment": [5, math.nan]}, ["wan2.2", "wan2.2"]),
    "fetv": ("cogvideo_rater1.json", of_fetv((4, 3, 5, 1), (None, 2, 1, 1)), {"traditional": [4, math.nan], "temporal": [3, 2], "alignment": [5, 1]},
             ["cogvideo", "cogvideo"]),
    "gaia": ("MOS.csv", "filename,final action subject,final action completeness,final action interaction\nAnmidiff_Abseiling.mp4,50,25,52.1\n",
             {"traditional": [3], "alignment": [2]}, ["Anmidiff"]),
    "hveval": ("labels.txt", "a b.mp4,61.5,40,55,yes\nc.mp4,30,20,10,no\n",
               {"traditional": [61.5, 30], "temporal": [40, 20], "alignment": [55, 10]}, ["", ""]),
    "videophy": ("test.csv", "videopath,caption,sa,pc\nx/1.mp4,a cup,1,0\nx/2.mp4,a bowl,0,1\n", {"alignment": [5, 1]}, ["", ""])}
UNNAMED = {      # of one form: the caller names them
    "t2vqa_db": ("info.txt", "1.mp4|a cat | a dog|75\n2.mp4|a boat|0\n", {"overall": [4, 1]}, ["", ""]),
    "q_eval_video": ("labels.txt", "1.mp4|a cat|2.5\n", {"overall": [2.5]}, [""])}


@pytest.mark.parametrize("name", [*FILES, *UNNAMED])
def test_each_form(name, tmp_path):
    "All that a file says is in the table, and nothing else; without a name it is recognised, or refused where two sets have its form."
    file, text, opinions, generators = (FILES | UNNAMED)[name]
    path = tmp_path/file
    path.write_text(text)
    if name in FILES: assert recognised_set(path).name == name
    else:
        with pytest.raises(LabelError, match="t2vqa_db and q_eval_video have this form.*--set"): recognised_set(path)
    table = read_opinions(path, name)
    for d in DIMENSIONS:
        assert np.allclose(table[d], opinions.get(d, [math.nan] * len(table)), equal_nan=True), d
    assert table.generator.tolist() == generators and table.attrs["set"] == name and table.attrs["source"]
    if name in FILES: pd.testing.assert_frame_equal(read_opinions(path), table)


WRONG = [     # (set, old, new, what is said: line and column)
    ("taobaovd_gc", "3.67", "5.5", "line 2: `Aesthetic_MOS` is 5.5; .* from 1 to 5"),
    ("taobaovd_gc", "Overall_MOS", "MOS", "line 1: it has no column `Overall_MOS`"),
    ("taobaovd_gc_lines", '"mos": 4', '"mos": "four"', "line 2: `mos` is 'four', no number"),
    ("taobaovd_gc_lines", '"mos": 4,', "", "line 2: it has no column `mos`"),
    ("taobaovd_gc_lines", '"C_1.mp4"', '"B_1.mp4"', "line 2: 'B_1.mp4' stands in line 1 already"),
    ("taobaovd_gc_lines", '{"video": "C_1', '{"video" "C_1', r"line 2: it is no JSON \(column 10"),
    ("aigve_bench", '"consistency": 2.5', '"consistency": 6', "line 25: `consistency` is 6; .* from 0 to 5"),
    ("aigve_bench", '"data_list": [\n', '"list": [\n', "line 1: it has no list `data_list`"),
    ("aigve_bench", '"model": "lavie",\n   "subject": [\n    "x"\n   ],\n   "video_path_pd": "lavie_1.mp4"',
     '"video_path_pd": "lavie_1.mp4"', "line 25: it has no column `model`"),
    ("aigve_bench", '"overall": null', '"overall": ', r"line \d+: it is no JSON"),
    ("phyground", '"SA": 5', '"SA": 9', "line 5: `scores.general.SA` is 9"),
    ("phyground", '"SA"', '"sa"', "line 5: it has no column `scores.general.SA`"),
    ("fetv", '"temporal_quality": 2', '"temporal_quality": "x"', "line 2: `temporal_quality` is 'x'"),
    ("fetv", '"video_id": "video1"', '"video_id": ""', "line 2: `video_id` is empty"),
    ("gaia", ",50,", ",500,", "line 2: `final action subject` is 500"),
    ("gaia", "final action interaction", "interaction", "line 1: it has no column `final action interaction`"),
    ("hveval", "no\n", "maybe\n", "line 2: it is not name, spatial, temporal, text, yes/no"),
    ("hveval", "20", "many", "line 2: `temporal` is 'many'"),
    ("videophy", "bowl,0", "bowl,2", "line 3: `sa` is 2"),
    ("videophy", "x/2.mp4", "", "line 3: `videopath` is empty"),
    ("t2vqa_db", "|0\n", "|bad\n", "line 2: `mos` is 'bad'"),
    ("t2vqa_db", "a boat|", "", r"line 2: it is not name\|prompt\|mos"),
    ("q_eval_video", "2.5", "25", "line 1: `mos` is 25")]


@pytest.mark.parametrize("name, old, new, said", WRONG)
def test_a_wrong_file_is_refused_by_line_and_column(name, old, new, said, tmp_path):
    file, text, *_ = (FILES | UNNAMED)[name]
    assert old in text, "the test must change the file"
    (tmp_path/file).write_text(text.replace(old, new))
    with pytest.raises(LabelError, match=f"{file} {said}") as e: read_opinions(tmp_path/file, name)
    assert e.value.remedy


def test_names_of_sets():
    assert opinion_set("T2VQA-DB") is OPINION_SETS["t2vqa_db"]
    with pytest.raises(LabelError, match="There are: .*visionrewarddb"): opinion_set("lsvq")
    assert all(s.source and set(s.roles) & {*DIMENSIONS, "*"} for s in OPINION_SETS.values())


def test_nothing_is_filled_in(tmp_path):
    "A file of empty opinions is refused; one without rows too; a spelling of AIGVE-Bench's own page is known."
    (tmp_path/"a.csv").write_text("videopath,caption,sa,pc\nx.mp4,a cup,,\n")
    with pytest.raises(LabelError, match="not one opinion"): read_opinions(tmp_path/"a.csv")
    (tmp_path/"a.csv").write_text("videopath,caption,sa,pc\n")
    with pytest.raises(LabelError, match="`videopath` is empty"): read_opinions(tmp_path/"a.csv")
    (tmp_path/"a.json").write_text(aigve([(4, 1, 5, 3, 4, 4, 2, 0, 2)], "element_presentence"))
    assert read_opinions(tmp_path/"a.json").alignment.tolist() == [pytest.approx(1 + 4 * 3 / 5)]
    (tmp_path/"x.jsonl").write_text(lines(conversation("A_1.mp4", 3)))
    with pytest.raises(LabelError, match="does not say which dimension"): read_opinions(tmp_path/"x.jsonl")
    (tmp_path/"nobody.json").write_text(of_fetv((1, 1, 1, 1)))
    with pytest.raises(LabelError, match="does not say which generator"): read_opinions(tmp_path/"nobody.json", "fetv")
    for name in (None, "gaia", "phyground"):
        with pytest.raises((LabelError, FileError)): read_opinions(tmp_path/"none.csv", name)
    with pytest.raises(LabelError, match="annotator_"): read_opinions(tmp_path, "phyground")


def test_parquet(tmp_path, monkeypatch):
    path = tmp_path/"train.parquet"
    pd.DataFrame(FEEDBACK).to_parquet(path)
    table = read_opinions(path)
    assert table.attrs["set"] == "videofeedback" and table.traditional.tolist() == [1, 5] and table.alignment.tolist() == [5, 1]
    assert table.temporal.tolist() == pytest.approx([1 + 4 / 3, 1 + 8 / 3]) and table.overall.isna().all() and table.video[2] == "https://x.org/1.mp4"
    pd.DataFrame(FEEDBACK | {"visual quality": [1, 5]}).to_parquet(path)
    with pytest.raises(LabelError, match="line 3: `visual quality` is 5; opinions of videofeedback lie from 1 to 4"):
        read_opinions(path, "videofeedback")

    def none(path): raise ImportError("Unable to find a usable engine")
    monkeypatch.setattr(pd, "read_parquet", none)
    with pytest.raises(LabelError, match="nothing here reads Parquet. pip install pyarrow"): read_opinions(path, "videofeedback")


def test_raters(tmp_path):
    "Mean, deviation and number of single raters; prompts of a file beside them; a question left out stays out."
    folder = tmp_path/"annotations"
    folder.mkdir()
    one, two = {"persistence": 5, "PTV": 1, "SA": 2}, {"persistence": 2, "PTV": 1, "SA": 4}
    for n, scores in enumerate(((one, two), (two, {"PTV": 1}), (two,)), 1): (folder/f"annotator_{n:03d}.json").write_text(rater(n, *scores))
    (folder/"manifest.json").write_text("{}")
    (tmp_path/"prompts").mkdir()
    (tmp_path/"prompts"/"phyground.json").write_text(json.dumps([{"id": 1, "video": "ball_1", "prompt": "a ball"}]))
    table = read_opinions(folder).set_index("video")
    assert recognised_set(folder).name == "phyground" and table.index.tolist() == ["wan2.2/ball_0", "wan2.2/ball_1"]
    assert table.temporal.tolist() == [3, 2] and table.temporal_n.tolist() == [3, 1] and table.temporal_sd.iloc[0] == pytest.approx(3 ** .5)
    assert math.isnan(table.temporal_sd.iloc[1]) and table.prompt.tolist() == ["", "a ball"] and table.traditional_n.tolist() == [0, 0]
    bad = folder/"annotator_002.json"
    bad.write_text(bad.read_text().replace('"SA": 4', '"SA": "4!"'))
    with pytest.raises(LabelError, match="annotator_002.json line 5: `scores.general.SA` is '4!'"): read_opinions(folder)


def test_raters_of_fetv_and_a_file_for_each_dimension(tmp_path):
    for name, scores in {"cogvideo_1": (4, 3, 5, 1), "cogvideo_2": (2, 3, 4, 1), "zeroscope_1": (1, 1, 1, 1)}.items():
        (tmp_path/f"{name}.json").write_text(of_fetv(scores))
    (tmp_path/"fetv_data.json").write_text(lines({"video_id": "video0", "prompt": "a dog"}))
    table = read_opinions(tmp_path)
    assert table.video.tolist() == ["cogvideo/video0", "zeroscope/video0"] and table.traditional.tolist() == [3, 1]
    assert table.traditional_n.tolist() == [2, 1] and table.prompt.tolist() == ["a dog"] * 2 and table.generator.tolist() == ["cogvideo", "zeroscope"]
    both = tmp_path/"both"
    both.mkdir()
    (both/"overall.jsonl").write_text(lines(conversation("A_1.mp4", 3), conversation("B_1.mp4", 4)))
    (both/"alignment.jsonl").write_text(lines(conversation("B_1.mp4", 2)))
    table = read_opinions(both)
    assert table.attrs["set"] == "taobaovd_gc_lines" and "overall_n" not in table
    assert table.set_index("video").loc["B_1.mp4", ["overall", "alignment"]].tolist() == [4, 2]


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return command


def predictions(**scores):
    five = pd.DataFrame(scores, index=MOS_COLUMNS).T.rename_axis("video_name").reset_index()
    five.assign(Prompt="p").to_csv("p.csv", index=False)


@pytest.mark.parametrize("text,at", [("[1, 2", "line 1: it is no JSON"), ("[\n{},\n]", "line 3: it is no JSON"),
                                     ("{}\n7\n", "line 2: it is no object"), ("[{}, 7]", "entry 2: it is no object")])
def test_broken_prompts_are_refused_by_line(call, text, at):
    Path("annotator_001.json").write_text(FILES["phyground"][1])
    Path("phyground.json").write_text(text)
    with pytest.raises(LabelError, match=f"phyground.json {at}"): read_opinions(".", "phyground")


def test_evaluate_on_pairs(call):
    "Accuracy with and without ties per dimension, by hand; intervals by prompt; what has no answer says why."
    predictions(a=(4, 3, 3, 1, 3), b=(2, 3, 3, 2, 3.2), c=(3, 2, 3, 3, 1), d=(1, 1, 3, 4, 5))
    Path("pairs.csv").write_text(PAIRS + "a,b,x,y,p,8,16,8,16,A,same,same,B\nc,d,x,y,q,8,16,8,16,B,B,A,B\na,c,x,y,q,8,16,8,16,A,B,A,\n")
    status, result, _ = call("evaluate", "p.csv", "pairs.csv", "--set", "videogen_rewardbench", "--group", "prompt", "--json")
    assert status == 0 and list(result) == list(DIMENSIONS)
    r = result["traditional"]       # differences 2, 2, 1; A, B, A
    assert (r["n"], r["ties"], r["accuracy"], r["accuracy_with_ties"], r["threshold"]) == (3, 0, pytest.approx(2 / 3), pytest.approx(2 / 3), None)
    r = result["temporal"]          # -1, -1, -2; same, B, B
    assert (r["ties"], r["accuracy"], r["accuracy_with_ties"]) == (1, 1, pytest.approx(2 / 3)) and r["opinions"]["columns"] == "MQ"
    r = result["alignment"]         # 0, 1, 1; same, A, A: a threshold of 0 is right everywhere
    assert (r["accuracy"], r["accuracy_with_ties"], r["threshold"]) == (1, 1, 0) and len(r["ci"]["accuracy_with_ties"]) == 2
    assert r["ci"]["accuracy"] is None and "of the resamples have no value" in r["reasons"]["ci accuracy"]     # p alone has no choice in it
    assert result["overall"]["n"] == 2 and result["aesthetic"] == result["aesthetic"] | {"n": 0, "accuracy": None, "accuracy_with_ties": None}
    assert result["aesthetic"]["reasons"]["accuracy"] == "people were not asked"
    assert read_opinions("pairs.csv").generator_b.tolist() == ["y"] * 3
    status, text, _ = call("evaluate", "p.csv", "pairs.csv")
    assert status == 0 and "without ties" in text and "VideoGen-RewardBench" in text
    status, said, _ = call("evaluate", "p.csv", "pairs.csv", "--set", "visionrewarddb", "--json")
    assert status == 1 and "pairs.csv line 1: it has no column `video1_path`" in said["error"]
    Path("pairs.csv").write_text(PAIRS + "a,b,x,y,p,8,16,8,16,A,same,same,B\na,z,x,y,p,8,16,8,16,A,A,A,A\n")
    assert "1 of its videos are not among the predictions, such as z" in call("evaluate", "p.csv", "pairs.csv")[2]
    Path("pairs.csv").write_text(PAIRS + "a,b,x,y,p,8,16,8,16,A,same,equal,B\n")
    assert "pairs.csv line 2: `TA` is 'equal', none of A, B, same" in call("evaluate", "p.csv", "pairs.csv")[2]
    assert call("evaluate", "p.csv", "pairs.csv", "--pred", "x")[0] == 2


def test_evaluate_on_scores(call):
    "A set's file beside predictions, with and without its name; the usual labels are read as before."
    predictions(**{f"lavie_{i}.mp4": (1 + i, 2, 3, 4 - i, 1 + i) for i in range(4)})
    Path("train.json").write_text(aigve([(i, 1, 5 - i, 3, 4, 4, 0, 0, i or None) for i in range(4)]))
    status, result, _ = call("evaluate", "p.csv", "train.json", "--json")
    assert status == 0 and result["traditional"]["srocc"] == result["temporal"]["srocc"] == 1 and result["overall"]["n"] == 3
    about = {"columns": "technical_quality", "set": "aigve_bench", "scale": [0, 5], "source": OPINION_SETS["aigve_bench"].source}
    assert result["traditional"]["opinions"] == about
    assert result["aesthetic"]["n"] == 0 and "mapped to 1–5" in " ".join(call("evaluate", "p.csv", "train.json", "--set", "aigve-bench")[1].split())
    pd.read_csv("p.csv").to_csv("labels.csv", index=False)
    assert "opinions" not in call("evaluate", "p.csv", "labels.csv", "--json")[1]["overall"]
    assert "no set of opinions of that name" in call("evaluate", "p.csv", "labels.csv", "--set", "mine")[2]


def test_predict_finds_the_videos_of_a_set(tmp_path):
    "Of pairs each video once; of raters under the ending that their names lack; without prompts it is refused, and so is a split."
    for name in ("a.mp4", "b.mp4", "wan2.2/ball_0.mp4"):
        (tmp_path/"videos"/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/"videos"/name).write_bytes(b"x")
    pairs = tmp_path/"pairs.csv"
    pairs.write_text("internal_id,prompt,standard_answer,video1_path,video2_path\n1,p,video1,a.mp4,b.mp4\n2,p,tie,b.mp4,c.mp4\n")
    rows = _rows(pairs, None, None)
    assert rows.video_name.tolist() == ["a.mp4", "b.mp4", "c.mp4"] and rows.path[0] == str(tmp_path/"videos"/"a.mp4") and rows.Prompt[2] == "p"
    folder = tmp_path/"annotations"
    folder.mkdir()
    (folder/"annotator_001.json").write_text(rater(1, {"persistence": 5, "PTV": 1, "SA": 2}))
    with pytest.raises(QualiVisionError, match="1 of its 1 videos have no prompt"): _rows(folder, None, None, "phyground")
    (tmp_path/"phyground.json").write_text(json.dumps([{"id": 0, "video": "ball_0", "prompt": "a ball"}]))
    rows = _rows(folder, None, None, "phyground")
    assert rows.video_name[0] == "wan2.2/ball_0" and rows.path[0] == str(tmp_path/"videos"/"wan2.2"/"ball_0.mp4")
    with pytest.raises(QualiVisionError, match="no split val"): _rows(pairs, "val", None)


# ---- FETV ----------------------------------------------------------------------------------------------------------

def test_registry_of_fetv():
    "104 addresses at one commit, none of people's own footage; labels.csv is, byte for byte, the file that the figures were measured on."
    s = datasets.file_set("FETV")
    assert len(s["rows"]) == 104 and "CC BY 4.0" in s["attribution"] and s["commit"] in s["files_at"].format(**s) and s["changes"]
    for video, _, generator, index, *_, path, size, sha in s["rows"]:
        assert path.endswith(f"/{generator}/{index}.gif") and "/gt/" not in path and 0 < size < 2e6 and len(sha) == 64 and video.startswith(generator)
    assert hashlib.sha256(datasets._labels(s)).hexdigest() == "578915dd4549edf49abdc8929d54c898d30ec9c41fcc0d512692ef7bd1bad56a"
    assert sum(row[5] != "" for row in s["rows"]) == 40 and sum(row[7] != "" for row in s["rows"]) == 64


@pytest.fixture
def small(tmp_path, monkeypatch):
    "FETV's stand-in: two clips on a server of this machine."
    (tmp_path/"site"/"x").mkdir(parents=True)
    clips = {"a.gif": b"GIF89a one", "b.gif": b"GIF89a another"}
    for name, content in clips.items(): (tmp_path/"site"/"x"/name).write_bytes(content)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_): asked.append(self.path)
    asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path/"site"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    real = datasets.file_set("fetv")
    s = real | {"files_at": f"http://127.0.0.1:{server.server_port}/", "columns": ["video", "prompt", "alignment"], "rows": [
        [f"gen_{name}", "a, b", "3", f"x/{name}", len(content), hashlib.sha256(content).hexdigest()] for name, content in clips.items()]}
    monkeypatch.setattr(datasets, "file_set", lambda name: s if name == "fetv" else None)
    yield tmp_path/"site"/"x", asked
    server.shutdown()
    server.server_close()


def test_pull_fetv(call, small):
    "The licence first; both clips and their labels; again nothing is asked; what is of another content is neither taken nor overwritten."
    site, asked = small
    status, about, err = call("data", "pull", "fetv", "--json")
    assert status == 0 and about["fetched"] == 2 and "CC BY 4.0" in err and "Yuanxin Liu" in err
    folder = Path("datasets/fetv")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == ["labels.csv", "videos/gen_a.gif", "videos/gen_b.gif"]
    with open(folder/"labels.csv", newline="") as f: assert [r["prompt"] for r in csv.DictReader(f)] == ["a, b"] * 2
    assert [p.name for p in Path("datasets").iterdir()] == ["fetv"], "nothing is left of the download"
    asked.clear()
    assert call("data", "pull", "fetv", "--json")[1]["fetched"] == 0 and not asked
    (folder/"videos"/"gen_a.gif").write_bytes(b"my own")
    status, said, _ = call("data", "pull", "fetv", "--json")
    assert status == 1 and "gen_a.gif: its SHA-256" in said["error"] and (folder/"videos"/"gen_a.gif").read_bytes() == b"my own"
    (site/"b.gif").write_bytes(b"GIF89a changed")
    status, said, _ = call("data", "pull", "fetv", "--to", "other", "--json")
    assert status == 1 and "x/b.gif: its SHA-256" in said["error"]
    assert [p.name for p in Path("other").rglob("*.*")] == ["gen_a.gif"], "no clip of another content, and no labels before all clips are there"
    assert "fetv" in [r["name"] for r in call("data", "list", "--json")[1]]


@pytest.mark.online
def test_fetv_lies_at_its_address(tmp_path):
    s = datasets.file_set("fetv")
    assert datasets.pull_files(s | {"rows": s["rows"][:1]}, tmp_path)["fetched"] == 1
