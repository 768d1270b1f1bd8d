"The command line as a user meets it: another process, its stdout, stderr and exit status."
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from qualivision.quality import COLUMNS, DIMENSIONS, MOS_COLUMNS

ROOT = Path(__file__).parents[1]
KEYS = ["video", "prompt", *DIMENSIONS, "model", "checkpoint", "trained_on", "error"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A folder with a checkpoint where `score` looks first, two clips, a broken file and a data set."
    folder = tmp_path_factory.mktemp("cli")
    tiny.checkpoint(folder/"checkpoints"/"dover")
    tiny.clip(folder/"boat.mp4", (200, 30, 30)); tiny.clip(folder/"a name with spaces é.mp4", (30, 200, 30))
    (folder/"broken.mp4").write_bytes(b"no video")
    tiny.data_set(folder/"set", train=1, val=1, test=1)
    return folder


COMMAND = "from qualivision.cli import main; main()"


def run(here, *args, **env):
    "Status, stdout, stderr of `qualivision ARGS`, without a terminal."
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


WRONG = ["score boat.mp4", "score --prompt x", "score boat.mp4 --prompt=", "nonsense", "score boat.mp4 --prompt x --cheese",
         "predict --data set", "predict --data set --out o.csv --split all", "evaluate a.csv b.csv --pred x"]


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


def test_doctor(here, tmp_path):
    status, out, err = run(here, "doctor", "--json")
    report = strict(out)
    assert status == 0 and report["packages"]["torch"] and "cpu" in report["devices"]["available"] and report["readers"]["decord"]
    assert report["weights"]["checkpoint"]["trained_on"] == "simulated labels (tiny)"
    status, out, err = run(tmp_path, "doctor")
    assert status == 0 and "no checkpoint in checkpoints/dover" in out and "video readers" in out
