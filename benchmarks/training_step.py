"""How much faster is a training step of DOVER++ with nothing frozen, as this package takes it, than with eager, contiguous layers?

CPU: the embedded size, batch 16, float32. The eager way has the same weights in nn.Conv3d, contiguous in memory. Each run is a process of
its own, so that its peak memory is its own. Its losses over the first steps must agree before anything counts.
On a GPU the package's steps take Triton's depthwise kernel (chapter 21a), or are not measured. --full, on a GPU: the published size,
64×640×640, batch 4, bfloat16, against the documented model; with and without checkpointing. Without a GPU it says what arithmetic predicts,
and nothing of it is measured. Bytes that autograd keeps for a block are counted on the CPU.
"""
import statistics
import time

import torch
from torch import nn

from benchmarks.common import Report, child, compared, interleaved
from benchmarks.depthwise3d import check_kernel

EAGER, OURS, CHECKPOINTED, DOCUMENTED = "eager, contiguous", "this package", "this package, checkpointing", "documented model, eager"
DEPTHWISE, OTHERS = .77, 4.54      # TFLOP of the published backbone forward, a clip
PEAK, PLAIN, COPY = 790, 67, 4.3   # one H200: TFLOP/s bf16 matrix products, measured; float32 outside tensor cores, data sheet; TB/s, measured
UNFUSED = .047                     # TB that a clip's forward reads and writes, layer by layer, bf16


def eager(model: nn.Module) -> nn.Module:
    "The same weights in torch's own layers, contiguous in memory."
    from qualivision.models.convnext3d import DepthwiseConv3d, PointwiseConv3d
    for module in model.modules():
        if isinstance(module, (DepthwiseConv3d, PointwiseConv3d)): module.__class__ = nn.Conv3d
        if hasattr(module, "channels_last"): module.channels_last = False
    return model


def built(way: str, full: bool) -> tuple:
    "The model of a way, and its configuration."
    from dataclasses import replace

    from qualivision.models.documented import DocumentedDover
    from qualivision.models.dover_mos import EMBEDDED, PUBLISHED, DoverPlusPlus
    config = replace(PUBLISHED if full else EMBEDDED, checkpointing=way == CHECKPOINTED)
    torch.manual_seed(0)
    model = DocumentedDover() if way == DOCUMENTED else DoverPlusPlus(config)
    return (eager(model) if way in (EAGER, DOCUMENTED) else model).train(), config


def steps(way: str, device: str, full: bool, batch: int, count: int) -> dict:
    "Median seconds of some steps after one that does not count; the loss of the first step."
    from qualivision.pipeline.params import keep_memory
    keep_memory()
    model, config = built(way, full)
    model, cuda, times, losses = model.to(device), device.startswith("cuda"), [], []
    frames = torch.randint(0, 256, (batch, 3, config.frames, config.size, config.size), dtype=torch.uint8, device=device)
    text, mos = torch.randn(batch, config.text_dim, device=device), 1 + 4 * torch.rand(batch, 5, device=device)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4)
    for _ in range(count + 1):
        torch.manual_seed(1)
        start = time.perf_counter()
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=cuda): out = model(frames, text)["mos"]
        loss = (out.float() - mos).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))          # waits for the GPU
        times.append(time.perf_counter() - start)
    gpu = {"gpu_mb": torch.cuda.max_memory_allocated() / 1e6} if cuda else {}
    return {"seconds": statistics.median(times[1:]), "first_loss": losses[0], **gpu}


def kept_bytes(call) -> int:
    "Bytes that autograd keeps between forward and backward, parameters left out; a piece of memory counts once."
    kept = {}
    def pack(x):
        if not isinstance(x, nn.Parameter) and not (x._base is not None and isinstance(x._base, nn.Parameter)):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): out = call()
    del out
    return sum(kept.values())


def of_a_block() -> list[str]:
    "What is kept for one block, in units of its input."
    from torch.utils.checkpoint import checkpoint

    from qualivision.models.convnext3d import Block
    block, x = Block(16, (3, 7, 7)), torch.randn(1, 16, 4, 12, 12).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    size = x.numel() * x.element_size()
    ways = {"all kept": lambda: block(x), "checkpointing": lambda: checkpoint(block, x, use_reentrant=False)}
    return [f"autograd keeps {kept_bytes(call) / size:.1f} times a block's input: {name} (counted)" for name, call in ways.items()]


def predicted(batch: int = 4) -> list[str]:
    "What the published step must cost on an H200, by arithmetic: passes, each as long as a forward pass."
    shares = {"matrix products": OTHERS / PEAK, "depthwise sums in float32": DEPTHWISE / PLAIN, "reading and writing": UNFUSED / COPY}
    lines = [f"64×640×640, batch {batch}, bfloat16, one H200: not measured; by arithmetic a clip's forward pass takes at the least "
             + ", ".join(f"{1e3 * t:.1f} ms for {name}" for name, t in shares.items())]
    for name, passes in {"all kept": 3, "checkpointing": 4}.items():
        whole = passes * batch * (OTHERS / PEAK + DEPTHWISE / PLAIN)
        lines.append(f"so a step of {passes} such passes ({name}) takes at least {whole:.2f} s with traffic hidden behind the sums (not measured)")
    return lines


def options(parser): parser.add_argument("--batch", type=int, help="clips in a step; 16, with --full 4")


def run(args) -> Report:
    cuda, batch = args.device.startswith("cuda"), args.batch or (4 if args.full else 16)
    if args.full and not cuda: return Report([], [*of_a_block(), *predicted(batch)])
    if cuda: check_kernel(args.device, torch.bfloat16, (7, 7, 7) if args.full else (3, 7, 7))
    ways = (DOCUMENTED, OURS, CHECKPOINTED) if args.full else (EAGER, OURS)
    samples = interleaved({way: child("benchmarks.training_step:steps", way=way, device=args.device, full=args.full, batch=batch, count=3)
                           for way in ways}, args.repeat)
    losses = {way: samples[way][0]["first_loss"] for way in ways if way != DOCUMENTED}
    assert max(losses.values()) - min(losses.values()) < 1e-2, f"the first losses differ: {losses}"
    for row in (rows := compared(samples)): row["clips/s"] = batch / row["seconds"]
    about = f"batch {batch}, {'64×640×640, bfloat16' if args.full else '16×144×144'}, AdamW included"
    return Report(rows, [about, *of_a_block(), *([] if args.full else predicted())])
