"""What the benchmarks share: ways that take turns, a child process for peak memory, the machine, a section in RESULTS.md.

A benchmark is a module of this package. Its docstring begins with the question that it answers. It has
    run(args) -> Report         args: device, repeat, full (published shapes, not the reduced ones), and what `options` adds
    options(parser)             not needed: arguments of its own
and leaves parsing, printing and writing to `python -m benchmarks NAME`. Most are five lines around
    samples = interleaved({"reference": f, "ours": g}, args.repeat)      # the first one is the baseline
    return Report(compared(samples), notes=["16×224², batch 1"])
"""
import gc
import importlib
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent/"RESULTS.md"
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")


class Unavailable(Exception):
    "A benchmark cannot run here; its text says why and what would help."


@dataclass
class Report:
    "What a benchmark found."
    rows: list[dict]                                  # one for each way; column → number or text
    notes: list[str] = field(default_factory=list)    # shapes, what was equal, what was not measured


# ---------------------------------------------------------------- measuring

def interleaved(ways: dict, repeat: int = 3, warm: int = 1) -> dict[str, list[dict]]:
    """Each way in turn, `repeat` times; → for each way its samples {seconds, …}. A way is a function without arguments; what it returns is
    dropped, unless it is a dict with `seconds` (of `child`, or measured by itself): that is the sample. `warm` first turns do not count;
    those of a `child` are left out, because each child is new."""
    samples = {name: [] for name in ways}
    for k in range(-warm, repeat):
        for name, way in ways.items():
            if k < 0 and getattr(way, "child", False): continue
            start = time.perf_counter()
            out = way()
            seconds = time.perf_counter() - start
            if k >= 0: samples[name].append(out if isinstance(out, dict) and "seconds" in out else {"seconds": seconds})
            del out
            gc.collect()
    return samples


def child(function: str, env: dict | None = None, **given):
    """A way that runs in a process of its own: `function` is module:name and gets `given`, which JSON can hold. It may return a dict; what
    it lacks is added: `seconds` of the call, without imports, and `peak_mb`, the process's largest size in memory."""
    def way():
        command = [sys.executable, "-m", "benchmarks.common", function, json.dumps(given)]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True)
        if done.returncode: raise RuntimeError(f"{function} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])
    way.child = True
    return way


def peak_mb() -> float:
    "The largest size of this process in memory so far, MB (10⁶ bytes)."
    status = Path("/proc/self/status")          # ru_maxrss begins with the size of the parent
    if status.exists(): return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def command(argv: list, folder: str | None = None) -> dict:
    "Runs a whole command, which must succeed; for `child`: the peak is the command's own."
    start = time.perf_counter()
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode: raise RuntimeError(f"{' '.join(map(str, argv[:4]))} failed:\n{done.stderr[-2000:]}")
    return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6}


def in_this_process(function: str, given: dict) -> dict:
    "The sample of one call; see `child`."
    module, name = function.split(":")
    call = getattr(importlib.import_module(module), name)
    start = time.perf_counter()
    out = call(**given)
    return {"seconds": time.perf_counter() - start, "peak_mb": peak_mb(), **(out if isinstance(out, dict) else {})}


def compared(samples: dict[str, list[dict]]) -> list[dict]:
    """A row for each way: median seconds; how many times as fast as the first one, as median, least and most over the rounds, each compared
    within its round; the median of every other number in the samples."""
    base, rows = next(iter(samples.values())), []
    for name, own in samples.items():
        ratios = [b["seconds"] / s["seconds"] for b, s in zip(base, own)]
        row = {"way": name, "seconds": statistics.median(s["seconds"] for s in own), "times as fast": statistics.median(ratios),
               "least": min(ratios), "most": max(ratios)}
        others = [k for k, v in own[0].items() if k != "seconds" and isinstance(v, (int, float))]
        rows.append(row | {k.replace("_mb", " MB"): statistics.median(s[k] for s in own) for k in others})
    return rows


def timed(call, device: str):
    "A way whose sample is the time of one call."
    import torch
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def way():
        sync()
        start = time.perf_counter()
        call()
        sync()
        return {"seconds": time.perf_counter() - start}
    return way


def rates(device: str) -> tuple[float, float]:
    "GFLOP/s of a float32 matrix product and GB/s of a copy, read and written, on this device now: the best of five."
    import torch
    n, count = (8192, 2 ** 30) if device.startswith("cuda") else (1024, 2 ** 26)
    a, b = torch.randn(n, n, device=device), torch.empty(count, dtype=torch.uint8, device=device)
    to = torch.empty_like(b)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False          # the tensor cores' shorter numbers are no float32
    try: product, copy = (min(timed(call, device)()["seconds"] for _ in range(5)) for call in (lambda: a @ a, lambda: to.copy_(b)))
    finally: torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * n ** 3 / product / 1e9, 2 * count / copy / 1e9


def written_clip(path, frames: int, height: int, width: int, seed: int = 0) -> Path:
    "A pattern of blocks that moves, H.264 at 25 frames/s, written one frame after the other."
    import av
    import numpy as np
    blocks = np.random.default_rng(seed).integers(0, 256, (height//8 + 64, width//8 + 64, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "30"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for k in range(frames):
            picture = np.ascontiguousarray(blocks[5*k % 500:][:height, 7*k % 500:][:, :width])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return Path(path)


# ---------------------------------------------------------------- the machine

def environment(device: str = "cpu") -> dict:
    "The machine and the code that the numbers belong to."
    import torch
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines() if Path("/proc/cpuinfo").exists() else []
    first = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in reversed(lines))}
    def git(*command): return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = "+" if git("status", "--porcelain", "--untracked-files=no", "--", "qualivision", "benchmarks/*.py") else ""
    has = set(first.get("flags", "").split())
    about = {"cpu": first.get("model name") or platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))
             if hasattr(os, "sched_getaffinity") else os.cpu_count(), "flags": [f for f in FLAGS if f in has],
             "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
             "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + changed, "date": date.today().isoformat()}
    return about | ({"gpu": torch.cuda.get_device_name()} if device.startswith("cuda") else {})


# ---------------------------------------------------------------- RESULTS.md

def _cell(value) -> str:
    if not isinstance(value, float): return "" if value is None else str(value).replace("|", "\\|")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}" if abs(value) >= .01 or value == 0 else f"{value:.1e}"


def table(rows: list[dict]) -> str:
    "Rows as a Markdown table; a column that a row lacks is empty."
    columns = list(dict.fromkeys(k for r in rows for k in r))
    cells = [columns, *([_cell(r.get(c)) for c in columns] for r in rows)]
    width = [max(3, *(len(row[i]) for row in cells)) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, width)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])


def section(title: str, question: str, report: Report, env: dict, command: str) -> str:
    "One benchmark's part of RESULTS.md."
    about = [f"{k} {'none of note' if v == [] else ' '.join(v) if isinstance(v, list) else v}" for k, v in env.items()]
    parts = [f"## {title}", question, f"`{command}`. {', '.join(about)}.", table(report.rows) if report.rows else "",
             "\n".join(f"- {n}" for n in report.notes)]
    return "\n\n".join(p for p in parts if p) + "\n"


def write_section(title: str, text: str, path: Path = RESULTS):
    "Puts a section in place of the one with the same title, or behind the others; no other byte changes."
    old = path.read_text(encoding="utf-8") if path.exists() else (
        "# Results of the benchmarks\n\nRatios within one run, each round compared with its own; differences under 20 % are ties.\n")
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", old, re.M | re.S)
    if found: new = old[:found.start()] + text + ("\n" if found.end() < len(old) else "") + old[found.end():]
    else: new = old.rstrip("\n") + "\n\n" + text
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__": print(json.dumps(in_this_process(sys.argv[1], json.loads(sys.argv[2]))))
