"""How much faster is the ConvNeXt-3D backbone as this package computes it than as plain eager layers?

The plain network is the published chain of nn.Conv3d, nn.GroupNorm and nn.GELU with the same weights, contiguous or channels_last_3d in memory.
All must give the same maps, to 1e-4, before anything is timed. Each run is a process of its own, so that its peak memory is its own.
"""
import statistics
import time

import torch
from torch import nn

from benchmarks.common import Report, child, compared, interleaved

WAYS = ("plain, contiguous", "plain, channels_last_3d", "this package")


def plain(dims=(96, 192, 384, 768), depths=(3, 3, 9, 3)) -> nn.Sequential:
    "The published chain, of torch's own layers."
    parts = [nn.Conv3d(3, dims[0], (1, 4, 4), (1, 4, 4)), nn.GroupNorm(1, dims[0])]
    for i, (d, depth) in enumerate(zip(dims, depths)):
        if i: parts += [nn.Conv3d(dims[i - 1], d, (1, 2, 2), (1, 2, 2)), nn.GroupNorm(1, d)]
        for _ in range(depth):
            parts += [nn.Conv3d(d, d, 7, padding=3, groups=d), nn.GroupNorm(1, d), nn.Conv3d(d, 4 * d, 1), nn.GELU(), nn.Conv3d(4 * d, d, 1)]
    return nn.Sequential(*parts)


def network(way: str, device: str):
    "A function from a clip (1,3,T,S,S) to the last map, with the weights of seed 0."
    from qualivision.models.convnext3d import PUBLISHED_CHAIN, ConvNeXt3D
    torch.manual_seed(0)
    ours = ConvNeXt3D(layers=PUBLISHED_CHAIN, channels_last=True).eval()
    if way == "this package": return lambda x, net=ours.to(device): net(x)[-1]
    net = plain().eval()
    with torch.no_grad():
        for mine, theirs in zip(net.parameters(), ours.parameters(), strict=True): mine.copy_(theirs.view_as(mine))
    if way == "plain, contiguous": return net.to(device)
    net = net.to(device, memory_format=torch.channels_last_3d)
    return lambda x: net(x.contiguous(memory_format=torch.channels_last_3d))


@torch.no_grad()
def once(way: str, frames: int, size: int, device: str, calls: int) -> dict:
    "The median of some calls, after one that does not count."
    net, x = network(way, device), torch.rand(1, 3, frames, size, size, device=device)
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        net(x)
        sync()
        times.append(time.perf_counter() - start)
    gpu = {"gpu_mb": torch.cuda.max_memory_allocated() / 1e6} if device.startswith("cuda") else {}
    return {"seconds": statistics.median(times[1:])} | gpu


def options(parser): parser.add_argument("--shape", action="append", help="frames×pixels, as 16x224; may be given several times")


def run(args) -> Report:
    with torch.no_grad():
        x = torch.rand(1, 3, 3, 64, 96)
        base, *others = (network(way, "cpu")(x) for way in WAYS)
    far = max(float((y - base).abs().max()) for y in others)
    assert far < 1e-4, f"the maps differ by {far}"
    shapes = args.shape or (["16x224", "64x640"] if args.full else ["16x112"])
    rows = []
    for shape in shapes:
        frames, size = map(int, shape.split("x"))
        calls = 1 if frames * size * size > 2e6 else 3
        found = compared(interleaved({way: child("benchmarks.backbone:once", way=way, frames=frames, size=size, device=args.device, calls=calls)
                                      for way in WAYS}, args.repeat))
        rows += [{"input": f"{frames}×{size}²", **row} for row in found]
    return Report(rows, [f"float32, batch 1, forward; the maps of all ways differ by at most {far:.1e} (at 3×64×96)"])
