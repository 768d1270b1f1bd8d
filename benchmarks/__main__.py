"""Runs benchmarks and writes what they find into benchmarks/RESULTS.md.

    python -m benchmarks --list                  what there is
    python -m benchmarks                         all of them at reduced shapes, each in a process of its own
    python -m benchmarks --full                  at the published shapes
    python -m benchmarks NAME [--help | …]       one of them, with its own options
    python -m benchmarks NAME NAME … [--full …]  these, with options that all have
"""
import argparse
import importlib
import json
import shlex
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path

from benchmarks.common import RESULTS, Unavailable, environment, section, write_section

ORDER = ("decode", "engines", "backbone", "depthwise3d", "training_step", "score_set", "startup", "official")


def names() -> list[str]:
    "The benchmarks: modules of this folder that are not the harness."
    found = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("__") and p.stem != "common")
    return [n for n in ORDER if n in found] + [n for n in found if n not in ORDER]


def question(name: str) -> str:
    "The first paragraph of a benchmark's docstring, without importing it."
    import ast
    text = ast.get_docstring(ast.parse((Path(__file__).parent/f"{name}.py").read_text(encoding="utf-8"))) or name
    return " ".join(text.split("\n\n")[0].split())


def parser(module=None) -> argparse.ArgumentParser:
    about = argparse.ArgumentParser(prog=f"python -m benchmarks{' NAME' if module is None else ' ' + module.__name__.split('.')[-1]}",
                                    description=(module or sys.modules[__name__]).__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--device", default="cpu", help="cpu or cuda")
    about.add_argument("--repeat", type=int, default=3, help="rounds in which the ways take turns")
    about.add_argument("--full", action="store_true", help="the published shapes; without it reduced ones")
    about.add_argument("--out", type=Path, default=RESULTS, help="file whose section is replaced")
    about.add_argument("--json", action="store_true", help="print JSON alone, and write no file")
    return about


def check_cuda():
    import torch
    if not torch.cuda.is_available(): raise Unavailable("there is no CUDA device")


def one(name: str, arguments: list[str]) -> int:
    "Runs one benchmark in this process; 2: it cannot run here."
    module = importlib.import_module(f"benchmarks.{name}")
    about = parser(module)
    if hasattr(module, "options"): module.options(about)
    args = about.parse_args(arguments)
    try:
        if args.device.startswith("cuda"): check_cuda()
        report = module.run(args)
    except Unavailable as e:
        print(f"{name}: not measured: {e}", file=sys.stderr)
        return 2
    env = environment(args.device)
    if args.json:
        print(json.dumps({"benchmark": name, "rows": report.rows, "notes": report.notes, "environment": env}))
        return 0
    marks = [m for m, on in (("full", args.full), (args.device, args.device != "cpu")) if on]
    title = name + (f" ({', '.join(marks)})" if marks else "")
    shown = [a for k, a in enumerate(arguments) if not a.startswith("--out") and (k == 0 or arguments[k - 1] != "--out")]
    text = section(title, question(name), report, env, shlex.join(["python", "-m", "benchmarks", name, *shown]))
    print(text, flush=True)
    write_section(title, text, args.out)
    return 0


def several(chosen: list[str], arguments: list[str]) -> int:
    "Each benchmark in a process of its own; one that fails does not stop the others."
    parser().parse_args(arguments)
    begin, bad = time.perf_counter(), []
    for name in chosen:
        if subprocess.run([sys.executable, "-m", "benchmarks", name, *arguments]).returncode not in (0, 2): bad.append(name)
    print(f"{len(chosen)} benchmarks in {(time.perf_counter() - begin) / 60:.1f} minutes" + (f"; failed: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


def main(arguments: list[str]) -> int:
    if "--list" in arguments:
        for name in names(): print(f"{name:16}{question(name)}")
        return 0
    chosen = list(takewhile(lambda a: a in names(), arguments))
    if not chosen and arguments and not arguments[0].startswith("-"):
        print(f"there is no benchmark {arguments[0]}; there are {', '.join(names())}", file=sys.stderr)
        return 1
    if len(chosen) == 1: return one(chosen[0], arguments[1:])
    return several(chosen or names(), arguments[len(chosen):])


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
