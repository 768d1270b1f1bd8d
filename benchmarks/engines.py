"""How fast does each engine compute the network of each model, against torch in float32, and how far are its scores?

Every engine and precision runs in a process of its own, which first prepares (recording is kept in --cache), then waits; the runs are interleaved:
torch in float32 and the other one take turns, and both have the machine to themselves while they run. Weights are random, from one seed; inputs are
noise of the size that the samplers make, and --clips of them give the largest and the mean difference of the scores (five MOS; of official models the
mean of each map) and their rank correlation. Without --full: all models but COVER, at reduced sizes; others can be named, and so can pairs of
engine and precision.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.common import ROOT, Report, Unavailable

MODELS = ("dover++", "vjepa2", "frames", "dover", "dover-mobile", "cover")


def made(name: str, full: bool):
    "A model with random weights, and (T,H,W) of what it looks at: one for five MOS, one for each view of an official model."
    from dataclasses import replace

    import torch

    from qualivision.models.dover_mos import PUBLISHED, DoverPlusPlus
    from qualivision.models.frames_mos import FramesMos
    from qualivision.models.vjepa_mos import VJEPA_EMBEDDED, VJepaConfig, VJepaMos
    from qualivision.official.export import view_shapes
    from qualivision.official.scorer import NETWORKS
    torch.manual_seed(0)
    if name == "dover++":
        c = PUBLISHED if full else replace(PUBLISHED, frames=16, size=224)
        return DoverPlusPlus(c).eval(), (c.frames, c.size, c.size)
    if name == "vjepa2":        # ViT-L in full; the whole ViT-g does not fit into an ONNX file
        sizes = dict(hidden_size=1024, layers=24, encoder_heads=16, mlp_ratio=4., frozen_dtype="fp32")
        c = VJepaConfig(frames=16, size=256, **sizes) if full else VJEPA_EMBEDDED
        return VJepaMos(c).eval(), (c.frames, c.size, c.size)
    if name == "frames":
        model = FramesMos().eval()
        for head in model.heads.values(): torch.nn.init.normal_(head.weight, std=.02)
        return model, (16, 224, 224)
    model = NETWORKS[name]().eval()
    if name == "cover":
        for p in model.clip.parameters(): torch.nn.init.normal_(p, std=.02)
    shapes = view_shapes(model)
    if not full: shapes = {v: (2 if t == 20 else t // 4 if t < 40 else 4, *s) for v, (t, *s) in shapes.items()}
    return model, shapes


def compute(model, shapes):
    "A function: number of a clip → its scores."
    import torch
    text = None if isinstance(shapes, dict) else torch.randn(1, model.config.text_dim, generator=torch.Generator().manual_seed(1))
    @torch.no_grad()
    def run(k):
        noise = torch.Generator().manual_seed(k)
        if text is None:
            maps = model({v: torch.randn(1, 3, *s, generator=noise) for v, s in shapes.items()})
            return torch.stack([m.mean() for m in maps.values()])
        light = torch.rand(1, 3, 1, 1, 1, generator=noise)       # clips differ as clips do: in light, contrast and noise
        frames = (255 * (light + .3 * torch.randn(1, 3, *shapes, generator=noise) * torch.rand((), generator=noise))).clamp(0, 255).byte()
        return model(frames, text)["mos"][0]
    return run


def worker(name: str, engine: str, precision: str, full: bool, cache: str, device: str):
    "Answers on stdout, a line of JSON for each line on stdin: `time`, or the number of a clip."
    import resource
    import time

    import torch

    from qualivision.devices import autocast
    from qualivision.models.text import Kept
    from qualivision.official.engine import Engine, network_input
    model, shapes = made(name, full)
    model = model.to(device)
    run, began = compute(model, shapes), time.perf_counter()
    if engine != "torch":
        with torch.no_grad(): x = network_input(model, lambda: run(0))
        model.engine = Engine(model, x, engine, precision, kept=Kept(Path(cache)))
    number = precision if engine == "torch" else "fp32"
    prepared = time.perf_counter() - began
    def scored(k):
        with autocast(device, number): return run(k)
    scored(0)
    for line in sys.stdin:
        began = time.perf_counter()
        scores = scored(0 if line.strip() == "time" else int(line))
        seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": seconds, "scores": scores.float().tolist(), "prepared": prepared,
                          "peak": peak * (1 if sys.platform == "darwin" else 1024)}), flush=True)


class Process:
    "A worker and its answers. It is asked only while no other one computes."
    def __init__(self, *how):
        command = [sys.executable, "-m", "benchmarks.engines", json.dumps(how)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ask(self, what) -> dict:
        print(what, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if line: return json.loads(line)
        said = self.process.stderr.read().strip().splitlines()
        raise RuntimeError(said[-1] if said else "it died")

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def compared(name: str, engine: str, precision: str, args) -> dict:
    "One line of the table."
    from scipy.stats import spearmanr
    plain, other = Process(name, "torch", "fp32", args.full, args.cache, args.device), None
    try:
        plain.ask("time")
        other = Process(name, engine, precision, args.full, args.cache, args.device)
        first = other.ask("time")
        pairs = [(plain.ask("time"), other.ask("time")) for _ in range(args.repeat)]
        ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
        ours, theirs = ([p.ask(k)["scores"] for k in range(args.clips)] for p in (plain, other))
        off = [abs(a - b) for x, y in zip(ours, theirs) for a, b in zip(x, y)]
        ranks = [spearmanr(a, b).statistic for a, b in zip(zip(*ours), zip(*theirs))] if args.clips > 2 else []
        return {"model": name, "engine": engine, "precision": precision, "seconds": median(b["seconds"] for _, b in pairs),
                "of torch": median(a["seconds"] for a, _ in pairs), "times as fast": median(ratios), "least": min(ratios), "most": max(ratios),
                "peak MB": other.ask("time")["peak"] / 1e6, "of torch, MB": plain.ask("time")["peak"] / 1e6, "largest difference": max(off),
                "mean": sum(off) / len(off), "Spearman": min(ranks, default=None), "prepared in": first["prepared"]}
    except RuntimeError as e: return {"model": name, "engine": engine, "precision": precision, "not measured": str(e)}
    finally:
        for p in (plain, other):
            if p: p.end()


def options(parser):
    parser.add_argument("--models", nargs="+", choices=MODELS, default=None)
    parser.add_argument("--engines", nargs="+", choices=("torch", "openvino", "onnx"), default=["openvino", "onnx"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--cache", help="folder of recorded graphs; default: a temporary one")


def run(args) -> Report:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        args.cache = args.cache or folder
        for name in args.models or MODELS[:len(MODELS) - (not args.full)]:
            for engine in args.engines:
                for precision in args.precisions:
                    if (engine, precision) == ("torch", "fp32") or (engine != "torch" and args.device != "cpu"): continue
                    rows.append(compared(name, engine, precision, args))
                    print(rows[-1], file=sys.stderr, flush=True)
    if not rows: raise Unavailable("engines compute on a CPU; torch itself: --engines torch --precisions bf16")
    return Report(rows, ["against torch in float32, in turns; prepared in: seconds of the first call on a machine, recording included; "
                         f"differences and Spearman (the least of the scores) over {args.clips} clips of noise"])


if __name__ == "__main__": worker(*json.loads(sys.argv[1]))
