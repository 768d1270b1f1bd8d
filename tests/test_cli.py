"The command line as a user meets it: another process, its stdout, stderr and exit status."
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import yaml
from forked import Forked
from typer.testing import CliRunner

from qualivision.cli import app, main
from qualivision.inference.bulk import FiveMosScorer
from qualivision.inference.score import Scorer
from qualivision.quality import COLUMNS, DIMENSIONS, MOS_COLUMNS
from qualivision.toy import TOY, toy_clip, toy_set

ROOT = Path(__file__).parents[1]
KEYS = ["video", "prompt", *DIMENSIONS, "model", "checkpoint", "trained_on", "error", "error_kind", "reasons", "warnings", "learned_on", "interval"]

pytestmark = pytest.mark.usefixtures("one_thread")      # what is forked may not wait for threads that it has not


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A folder with a checkpoint, two clips, a broken file and a data set."
    folder = tmp_path_factory.mktemp("cli")
    tiny.checkpoint(folder/"checkpoints"/"dover")
    toy_clip(folder/"boat.mp4", (200, 30, 30)); toy_clip(folder/"a name with spaces é.mp4", (30, 200, 30))
    (folder/"broken.mp4").write_bytes(b"no video")
    toy_set(folder/"set", train=1, val=1, test=1)
    return folder


COMMAND = "from qualivision.cli import main; main()"


def run(here, *args, **env):
    "Status, stdout, stderr of `qualivision ARGS`, without a terminal; scores come from the checkpoint of `here`."
    if args[0] in ("score", "predict", "doctor") and "--checkpoint" not in args: args += ("--checkpoint", "checkpoints/dover")
    if not env:                                     # most of the seconds of a process of its own are imports
        process = Forked(main, *args, cwd=here)
        out, err = process.communicate()
        assert "Traceback" not in err, err
        return process.returncode, out, err
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **env}
    r = subprocess.run([sys.executable, "-c", COMMAND, *map(str, args)], cwd=here, env=env, capture_output=True, encoding="utf-8",
                       stdin=subprocess.DEVNULL)
    assert "Traceback" not in r.stderr, r.stderr
    return r.returncode, r.stdout, r.stderr


def strict(text):
    "JSON as the standard has it: NaN and Infinity are refused."
    def refuse(name): raise ValueError(f"{name} is not JSON")
    return json.loads(text, parse_constant=refuse)


HELP = """
import sys, time
start = time.perf_counter()
sys.argv = ["qualivision", "--help"]
from qualivision.cli import main
try: main()
except SystemExit: pass
assert not {"torch", "pandas", "numpy", "scipy"} & set(sys.modules), "too much is imported"
print(time.perf_counter() - start)
"""


@pytest.mark.parametrize("argument,status", [("--help", 0), ("nothing", 2)])
def test_the_console_script_leaves_nothing_undone(argument, status):
    "It skips Python's clean-up of memory, but not what was registered for the end, nor what was not yet written."
    code = "import atexit; atexit.register(print, 'x' * 100_000); from qualivision.cli import program; program()"
    done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status and done.stdout.endswith("x" * 100_000 + "\n") and (done.stderr or "Usage" in done.stdout)


def test_the_console_script_waits_for_work_that_goes_on():
    "A thread that is no daemon ends in its own time, as it does in any Python."
    code = """import threading, time
from qualivision.cli import program
threading.Thread(target=lambda: (time.sleep(1), print("written by a thread"))).start()
program()"""
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.endswith("written by a thread\n") and not done.stderr


def test_help_is_quick_and_imports_no_torch(here):
    r = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    for command in ("score", "evaluate", "predict", "train", "doctor"): assert command in r.stdout
    assert float(r.stdout.split()[-1]) < 5, "a quarter of a second on an idle machine"


def test_score_json_with_good_and_bad_videos(here):
    names = ["boat.mp4", "broken.mp4", "a name with spaces é.mp4", "gone.mp4"]
    status, out, err = run(here, "score", *names, "--prompt", "a red boat", "--json")
    records = strict(out)
    assert status == 1 and [list(r) for r in records] == [KEYS] * 4 and [r["video"] for r in records] == names
    for r in records:
        assert r["prompt"] == "a red boat" and r["checkpoint"] == "checkpoints/dover" and "simulated" in r["trained_on"]
        if r["video"] in ("broken.mp4", "gone.mp4"): assert r["video"] in r["error"] and all(r[d] is None for d in DIMENSIONS)
        else: assert r["error"] is None and all(1 <= r[d] <= 5 for d in DIMENSIONS)


def test_people_are_told_what_the_labels_were(here):
    "In a narrow window that is no terminal; all videos are good, so the status is 0."
    status, out, err = run(here, "score", "boat.mp4", "--prompt", "a red boat", COLUMNS="60", TERM="dumb")
    assert status == 0 and all(d in out for d in DIMENSIONS) and "simulated labels" in out
    assert "\x1b" not in out, "no colours where there is no terminal"
    assert all(len(line) <= 60 for line in out.splitlines() if line.startswith("  "))


def test_forty_columns_and_names_that_cannot_be_shown(here):
    "A narrow window, a code page without blocks, a name that is no UTF-8, one that the reader writes in another way."
    names = ["boat.mp4", "./gone.mp4", os.fsdecode(b"gone\xff.mp4")]
    status, out, err = run(here, "score", *names, "--prompt", "a red boat", COLUMNS="40", PYTHONIOENCODING="cp1252", LC_ALL="C.UTF-8")
    lines = out.splitlines()
    assert status == 1 and not err and all(len(line) <= 40 for line in lines), lines
    assert [len(line.split()[2]) for line in lines[1:6]] == [16] * 5 and set(lines[1].split()[2]) <= set("#.")
    assert lines[6:9] == ["./gone.mp4", "  not scored: there is no such file.", "  Check the path."] and lines[9] == "gone\\udcff.mp4"
    assert "1 of 3 videos scored (2 unreadable)." in lines
    status, out, err = run(here, "score", names[2], "--prompt", "été", "--json", PYTHONIOENCODING="cp1252", LC_ALL="C.UTF-8")
    record, = strict(out)
    assert status == 1 and record["video"] == names[2] and record["prompt"] == "été"


WRONG = ["score boat.mp4", "score --prompt x", "score boat.mp4 --prompt=", "nonsense", "score boat.mp4 --prompt x --cheese",
         "score boat.mp4 --prompt x --device gpu", "predict --data set", "predict --data set --out o.csv --split all",
         "evaluate a.csv b.csv --pred x"]


def test_wrong_use_is_status_2(here):
    for args in WRONG:
        status, out, err = run(here, *args.split())
        assert status == 2 and not out and err, args


def test_without_a_checkpoint(here, tmp_path):
    status, out, err = run(here, "score", "boat.mp4", "--prompt", "a boat", "--checkpoint", tmp_path/"none")
    assert status == 1 and not out and "qualivision train" in err and len(err.strip().splitlines()) == 1
    status, out, err = run(here, "score", "boat.mp4", "--prompt", "a boat", "--checkpoint", tmp_path/"none", "--json")
    assert status == 1 and "qualivision train" in strict(out)[0]["error"]


def test_predict_an_unlabelled_split(here, tmp_path):
    status, out, err = run(here, "predict", "--data", "set", "--split", "test", "--out", tmp_path/"test.csv", "--json")
    assert status == 0 and strict(out)["videos"] == 2 and strict(out)["failed"] == []
    with open(tmp_path/"test.csv", newline="") as f: rows = list(csv.reader(f))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 3
    status, out, err = run(here, "predict", "--data", tmp_path/"nowhere", "--out", tmp_path/"x.csv", "--json")
    assert status == 1 and "nowhere" in strict(out)["error"] and not (tmp_path/"x.csv").exists()


def test_a_folder_with_a_label_file_there_and_back(here, tmp_path):
    "Scored without a split, and compared by the names of its own columns."
    folder, split = tmp_path/"own", here/"set"/"train"/"videos"
    (folder/"videos").mkdir(parents=True)
    for i in range(6): (folder/"videos"/f"{i}.mp4").symlink_to(sorted(split.iterdir())[i % 2])
    (folder/"labels.csv").write_text("video,prompt,static_quality,alignment\n" + "".join(f"{i}.mp4,boat {i},{i},{i or ''}\n" for i in range(6)))
    predict = ("predict", "--data", folder, "--out", tmp_path/"p.csv", "--checkpoint", "checkpoints/dover", "--json")
    status, out, err = run(here, *predict)
    assert status == 0 and strict(out)["videos"] == 6
    status, out, err = run(here, "evaluate", tmp_path/"p.csv", folder/"labels.csv", "--group", "prompt", "--json")
    assert status == 0 and {d: r["n"] for d, r in strict(out).items()} == dict(traditional=6, alignment=5, aesthetic=0, temporal=0, overall=0)
    status, out, err = run(here, *predict, "--split", "test")
    assert status == 1 and "no split test" in strict(out)["error"]


def test_evaluate(here, tmp_path):
    rng = np.random.default_rng(0)
    mos = rng.uniform(1, 5, (30, 5))
    for name, values in (("labels", mos), ("pred", mos + rng.normal(0, .5, mos.shape))):
        lines = [",".join(COLUMNS)] + [f"v{i}.mp4,prompt {i // 5}," + ",".join(map(str, row)) for i, row in enumerate(values)]
        (tmp_path/f"{name}.csv").write_text("\n".join(lines) + "\n")
    status, out, err = run(here, "evaluate", tmp_path/"pred.csv", tmp_path/"labels.csv", "--group", "Prompt", "--json")
    result = strict(out)
    assert status == 0 and list(result) == list(DIMENSIONS)
    for r in result.values(): assert r["n"] == 30 and r["srocc"] > 0.7 and r["ci"]["srocc"][0] <= r["srocc"] <= r["ci"]["srocc"][1]
    status, out, err = run(here, "evaluate", tmp_path/"pred.csv", tmp_path/"labels.csv", "--pred", MOS_COLUMNS[4], "--target", MOS_COLUMNS[4])
    assert status == 0 and "srocc" in out
    status, out, err = run(here, "evaluate", tmp_path/"pred.csv", tmp_path/"gone.csv", "--json")
    assert status == 1 and "gone.csv" in strict(out)["error"] and "gone.csv" in err


MODEL = dict(config="embedded", **TOY["dover"])


def params(data: Path, **train) -> str:
    "A params.yaml with one profile, in which the tiny model is trained."
    train = dict(epochs=2, batch_size=4, accumulation=1, lr=1e-3, warmup_steps=1, tracker="none", device="cpu", augment=True, seed=0) | train
    return yaml.safe_dump({"profile": "tiny", "data": dict(root=str(data), licence="MIT", seed=0, val_fraction=0.1, test_fraction=0.1),
                           "tiny": {"text": {"encoder": "minilm"}, "dover": {"model": MODEL, "train": train}}})


def test_train(here, tmp_path):
    "From a file of parameters to a checkpoint that scores; progress stays off stdout."
    data = toy_set(tmp_path/"set", train=4, val=3)
    (tmp_path/"params.yaml").write_text(params(data))
    status, out, err = run(tmp_path, "train", "--json")
    result = strict(out)
    assert status == 0 and result["finished"] and result["epoch"] == 2 and result["step"] == 4 and len(result["history"]) == 2
    assert "epoch 1/2" in err and "epoch 2/2" in err
    written = {p.relative_to(tmp_path).as_posix() for p in (tmp_path/"checkpoints").rglob("*") if p.is_file()}
    assert written == {f"checkpoints/dover/{name}" for name in ("model.safetensors", "model.json", "history.csv")}
    assert (tmp_path/"results"/"dover"/"curves.csv").read_text().count("\n") == 3
    record = Scorer.from_checkpoint(tmp_path/"checkpoints"/"dover", "cpu").score(here/"boat.mp4", "a red boat")
    assert record.error is None and record.trained_on == result["trained_on"] and record.trained_on.startswith("labels of set, data ")


def test_opinions_are_checked_before_anything_is_trained(tmp_path):
    "MOS of 0–100, one video with two opinions: refused with the remedy, and nothing is left; with --scale trained, and the result says so."
    data = toy_set(tmp_path/"set", train=4, val=3)
    (tmp_path/"params.yaml").write_text(params(data))
    files, five = [data/s/"labels"/f"{s}_labels.csv" for s in ("train", "val")], {}
    for file in files:
        five[file] = file.read_text()
        table = pd.read_csv(file)
        table[list(MOS_COLUMNS)] = 25 * (table[list(MOS_COLUMNS)] - 1)
        table.to_csv(file, index=False)
    status, out, err = run(tmp_path, "train", "--json")
    said = strict(out)["error"]
    assert status == 1 and all(w in said for w in ("MOS outside 1–5", "data.scale: [0, 100]", "--scale 0-100", "train_labels.csv row"))
    assert not (tmp_path/"checkpoints").exists() and not (tmp_path/"runs").exists()
    status, out, err = run(tmp_path, "train", "--json", "--scale", "0-100")
    result = strict(out)
    assert status == 0 and result["trained_on"].startswith("labels of set, opinions mapped from 0–100 to 1–5, data ")
    assert result["history"][0]["loss"] < 9
    assert json.loads((tmp_path/"results"/"dover"/"train.json").read_text())["trained_on"] == result["trained_on"]
    files[0].write_text(five[files[0]].replace("B_0000.mp4", "A_0000.mp4"))
    files[1].write_text(five[files[1]])
    status, out, err = run(tmp_path, "train", "--json")
    assert status == 1 and "duplicate name (2)" in strict(out)["error"]


def test_encoding(tmp_path, monkeypatch):
    "Every command that reads a table takes it, and refuses what is no text with the line and this remedy."
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_bytes("video,a,b,Prompt\nx,1,2,caf\u00e9\ny,2,1,z\nz,3,4,z\n".encode("latin-1"))
    Path("set/train/labels").mkdir(parents=True)
    Path("set/train/labels/train_labels.csv").write_bytes("video_name,Prompt\nx,caf\u00e9\n".encode("latin-1"))
    tables = {"evaluate t.csv t.csv --pred a --target b": 0, "gmad t.csv --first a --second b --pairs 1 --tolerance 3": 0,
              "ranks build t.csv --name n --model dover --out o.json": 1, "score-set t.csv --model qualivision --out o.csv": 1,
              "transfer --data t.csv --out o.safetensors": 1, "train --data t.csv --out o": 1, "infer-datasets t.csv": 1,
              "predict --data set --split train --out p.csv": 1}
    for chapter in ("sets", "official"):
        monkeypatch.setattr(f"qualivision.commands.{chapter}.set_scorer", lambda *a, **k: FiveMosScorer.__new__(FiveMosScorer))
    monkeypatch.setattr(FiveMosScorer, "settings", {}, raising=False)
    for command, then in tables.items():
        shown = CliRunner().invoke(app, [*command.split(), "--json"])
        assert shown.exit_code == 1 and "line 2: it is not text in UTF-8 (byte 0xe9)" in shown.stderr and "--encoding" in shown.stderr, command
        shown = CliRunner().invoke(app, [*command.split(), "--json", "--encoding", "latin-1"])
        assert shown.exit_code == then and "not text" not in shown.stderr, (command, shown.output)
        assert "there is no encoding 'klingon'" in CliRunner().invoke(app, [*command.split(), "--encoding", "klingon"]).stderr


def test_train_tells_people_what_came_out(monkeypatch):
    result = dict(epoch=3, step=12, best={"score": 0.51234, "epoch": 2, "step": 8}, checkpoint="checkpoints/dover", trained_on="simulated labels")
    given = []
    monkeypatch.setattr("qualivision.pipeline.train.main", lambda model, **kw: given.append((model, kw)) or result)
    shown = CliRunner().invoke(app, ["train", "--params", "mine.yaml", "--profile", "paper", "--model", "vjepa2"])
    assert shown.exit_code == 0 and given == [("vjepa2", {"params": Path("mine.yaml"), "profile": "paper", "scale": None})]
    for words in ("3 epochs, 12 steps", "0.5123 in epoch 2", "checkpoints/dover", "Trained on simulated labels"): assert words in shown.stdout
    def stopped(model, **kw): raise KeyboardInterrupt
    result["best"] = None
    assert "undefined" in CliRunner().invoke(app, ["train"]).stdout and given[-1][0] == "dover"
    monkeypatch.setattr("qualivision.pipeline.train.main", stopped)
    shown = CliRunner().invoke(app, ["train"])
    assert shown.exit_code == 130 and "The same command goes on" in shown.stderr


def test_train_that_cannot_start(here, tmp_path, monkeypatch):
    "One line that names the setting, status 1, nothing left behind; with --json the same as JSON."
    (tmp_path/"params.yaml").write_text(params(here/"set", learning_rate=1))
    status, out, err = run(tmp_path, "train", "--json")
    assert status == 1 and "train.learning_rate" in strict(out)["error"] and err.strip() == strict(out)["error"]
    assert [p.name for p in tmp_path.iterdir()] == ["params.yaml"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qualivision.pipeline.train.keep_memory", lambda: None)       # it would change this process
    for i, (message, text) in enumerate({"no such file": None, "no profile paper": params(here/"set"), "-1 is not above 0": params(here/"set", lr=-1),
                                         "nowhere": params(here/"nowhere")}.items()):
        if text is not None: Path(f"{i}.yaml").write_text(text)
        shown = CliRunner().invoke(app, ["train", "--params", f"{i}.yaml", *(["--profile", "paper"] if "paper" in message else [])])
        said = [line for line in shown.stderr.strip().splitlines() if not line.startswith("precision:")]
        assert shown.exit_code == 1 and not shown.stdout and message in shown.stderr and len(said) == 1, message
    shown = CliRunner().invoke(app, ["train", "--params", "2.yaml", "--model", "cover"])
    assert shown.exit_code == 1 and "There are: dover, vjepa2" in shown.stderr
    assert not [p.name for p in tmp_path.iterdir() if p.suffix != ".yaml"]


def test_doctor(here, tmp_path):
    status, out, err = run(here, "doctor", "--json")
    report = strict(out)
    assert status == 0 and report["packages"]["torch"] and "cpu" in report["devices"]["available"] and report["readers"]["decord"]
    assert report["weights"]["checkpoint"]["trained_on"] == "simulated labels (tiny)"
    status, out, err = run(tmp_path, "doctor", "--checkpoint", "elsewhere")
    assert status == 0 and "no checkpoint in elsewhere" in out and "video readers" in out and "qualivision" in out
