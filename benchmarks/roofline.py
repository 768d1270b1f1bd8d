"""Where does the time of a score go, and how near is each kind of layer to what the machine can do?

Two bounds are measured first: float32 operations a second of a large matrix product, and bytes a second of a copy. A layer can be no faster than
its operations at the one rate, nor than the bytes of its input, output and weights at the other. Every layer of a forward pass is timed by hooks
and counted: 2 for a multiply-add, 8 for a number of a norm, 10 for one of GELU; a window's attention with its bias. What no layer claims (sums,
copies, fixed filters) is rest. Writes benchmarks/roofline.json, from which chapter 87 draws.
"""
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import Report, Unavailable, environment, rates, written_clip

MODELS = ("DOVER", "DOVER-Mobile", "DOVER++ (16×224²)", "DOVER++ (embedded)")


def _seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def kind(module: nn.Module) -> str | None:
    "What a layer is called here; None: not a layer that is counted."
    from qualivision.models.convnext3d import GlobalResponseNorm
    if isinstance(module, nn.Conv3d):
        if module.groups > 1: return "depthwise convolution"
        return "1×1×1 product" if module.kernel_size == (1, 1, 1) else "stem, halving"
    if isinstance(module, nn.Linear): return "1×1×1 product" if "Pointwise" in type(module).__name__ else "linear"
    if isinstance(module, GlobalResponseNorm): return "response norm"
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)): return "norm"
    return "GELU" if isinstance(module, nn.GELU) else None


def cost(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:     # operations, bytes
    "What a layer has to compute, and to read and write."
    moved = 4 * (x.numel() + y.numel() + sum(p.numel() for p in module.parameters(recurse=False)))
    if isinstance(module, nn.Conv3d): return 2 * y.numel() * module.weight[0].numel(), moved
    if isinstance(module, nn.Linear): return 2 * y.numel() * module.in_features, moved
    return (10 if isinstance(module, nn.GELU) else 8) * y.numel(), moved


def profiled(model: nn.Module, run) -> tuple[float, dict]:
    "Seconds of a forward pass without hooks; kind → seconds, operations, bytes, bound; of the layers, with hooks."
    found, began, hooks = defaultdict(lambda: [0., 0., 0.]), {}, []
    def before(m, args): began[m] = time.perf_counter()
    def after(m, args, y):
        seconds = time.perf_counter() - began.pop(m)
        for k, v in enumerate((seconds, *cost(m, args[0], y))): found[kind(m)][k] += v
    def attended(q, k, v, bias):                # window attention is a function, not a layer
        start = time.perf_counter()
        out = plain(q, k, v, bias)
        moved = 4 * (4 * q.numel() + bias.numel())
        for i, n in enumerate((time.perf_counter() - start, 4 * q.numel() * q.shape[-2], moved)): found["window attention"][i] += n
        return out
    def bias(self, *given):
        start = time.perf_counter()
        out = looked_up(self, *given)
        found["window attention"][0] += time.perf_counter() - start
        return out
    from qualivision.official import swin3d
    whole, plain, looked_up = statistics.median(_seconds(run) for _ in range(2)), swin3d.attended, swin3d.WindowAttention.bias
    for m in model.modules():
        if kind(m): hooks += [m.register_forward_pre_hook(before), m.register_forward_hook(after)]
    swin3d.attended, swin3d.WindowAttention.bias = attended, bias
    try: run()
    finally:
        swin3d.attended, swin3d.WindowAttention.bias = plain, looked_up
        for h in hooks: h.remove()
    return whole, found


def subject(name: str, clip: Path):
    "A model, and a pass through it; where it reads videos, also how long it takes from the file to its views."
    torch.manual_seed(0)
    if name.startswith("DOVER++"):
        from dataclasses import replace

        from qualivision.models.convnext3d import ConvNeXt3D
        from qualivision.models.dover_mos import EMBEDDED, DoverPlusPlus
        if "16×224²" in name:
            model, x = ConvNeXt3D(channels_last=True).eval(), torch.rand(1, 3, 16, 224, 224)
            return model, lambda: model(x), None
        model = DoverPlusPlus(replace(EMBEDDED, checkpointing=False)).eval()
        frames = torch.randint(0, 256, (1, 3, EMBEDDED.frames, EMBEDDED.size, EMBEDDED.size), dtype=torch.uint8)
        text = torch.randn(1, EMBEDDED.text_dim)
        return model, lambda: model(frames, text), None
    from qualivision.official.dover import DOVER, DOVERMobile
    from qualivision.official.scorer import OfficialScorer
    model = (DOVER if name == "DOVER" else DOVERMobile)().eval()
    scorer = OfficialScorer(model, "dover", {"file": "random", "sha256": "0" * 64, "licence": "none", "trained_on": "nothing"})
    prepared = scorer.prepare(clip)
    views = prepared[0] if isinstance(prepared, tuple) else prepared
    return model, lambda: model(views), lambda: scorer.prepare(clip)


@torch.no_grad()
def run(args) -> Report:
    import tempfile
    if args.device != "cpu": raise Unavailable("it times a CPU")
    flops, bandwidth = (1e9 * rate for rate in rates("cpu"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clip = written_clip(Path(folder)/"clip.mp4", 200, 720, 1280)
        for name in MODELS:
            model, forward, read = subject(name, clip)
            forward()
            whole, found = profiled(model, forward)
            reading = statistics.median(_seconds(read) for _ in range(2)) if read else 0.
            layers = [(k, *v) for k, v in sorted(found.items(), key=lambda kv: -kv[1][0])]
            scale = min(1., whole / sum(s for _, s, *_ in layers))          # hooks cost a little
            for what, seconds, operations, moved in layers:
                bound = max(operations / flops, moved / bandwidth)
                rows.append({"model": name, "stage": what, "seconds": seconds * scale, "GFLOP": operations / 1e9, "MB": moved / 1e6,
                             "bound": bound, "of the bound": bound / (seconds * scale)})
            rows.append({"model": name, "stage": "rest", "seconds": max(0., whole - sum(s * scale for _, s, *_ in layers))})
            if read: rows.append({"model": name, "stage": "decoding, views", "seconds": reading})
    for name in MODELS:
        total = sum(r["seconds"] for r in rows if r["model"] == name)
        for r in rows:
            if r["model"] == name: r["share"] = r["seconds"] / total
    if not args.json:
        about = {"operations_per_second": flops, "bytes_per_second": bandwidth, "environment": environment(args.device), "rows": rows}
        (Path(__file__).parent/"roofline.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Report(rows, [f"bounds: {flops / 1e9:.0f} GFLOP/s (matrix product), {bandwidth / 1e9:.1f} GB/s (copy)",
                         "a 720p clip of 8 s, random weights, float32; one forward pass with hooks, scaled to the median of two without"])
