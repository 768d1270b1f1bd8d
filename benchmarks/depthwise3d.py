"""How much faster is a depthwise 3-D convolution, forward and backward, as this package trains it than nn.Conv3d, contiguous in memory?

Shapes: the four maps of the embedded network (batch 16, kernel 3×7×7); with --full those of the published one at 16×224² (kernel 7×7×7).
Output and all three gradients of all ways must agree to 1e-4 of their largest value before anything is timed. On a GPU in bfloat16; there
the package has no kernel of its own yet, and its way is nn.Conv3d too.
"""
import time

import torch
from torch import nn

from benchmarks.common import Report, compared, interleaved

EMBEDDED = [((16, c, 16, s, s), (3, 7, 7)) for c, s in ((40, 16), (64, 8), (128, 4), (192, 2))]
PUBLISHED = [((1, c, 16, s, s), (7, 7, 7)) for c, s in ((96, 56), (192, 28), (384, 14), (768, 7))]
WAYS = ("nn.Conv3d, contiguous", "nn.Conv3d, channels_last_3d", "this package")


def layer(way: str, shape: tuple, kernel: tuple, device: str, dtype: torch.dtype):
    "A function → [output, gradients of input, kernel and bias], with the same weights and input for every way."
    from qualivision.models.convnext3d import DepthwiseConv3d
    torch.manual_seed(0)
    ours = DepthwiseConv3d(shape[1], kernel)
    net = ours if way == "this package" else nn.Conv3d(shape[1], shape[1], kernel, padding=ours.padding, groups=shape[1])
    net.load_state_dict(ours.state_dict())
    torch.manual_seed(1)
    memory = torch.contiguous_format if way.endswith("contiguous") else torch.channels_last_3d
    x, grad = (torch.randn(shape).to(device, dtype).contiguous(memory_format=memory) for _ in range(2))
    net, x = net.to(device, dtype), x.requires_grad_()

    def both():
        y = net(x)
        return [y, *torch.autograd.grad(y, [x, net.weight, net.bias], grad)]
    return both


def timed(call, device: str):
    "A way whose sample is the time of one call."
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def way():
        sync()
        start = time.perf_counter()
        call()
        sync()
        return {"seconds": time.perf_counter() - start}
    return way


def counts(shape: tuple, kernel: tuple, size: int) -> tuple[float, float]:
    "GFLOP of the forward and both backward passes; GB that they must read and write at the least, numbers of `size` bytes."
    B, C, T, H, W = shape
    places, taps = B * C * T * H * W, kernel[0] * kernel[1] * kernel[2]
    return 3 * 2 * places * taps / 1e9, 7 * places * size / 1e9       # x, y; ∂y, ∂x; ∂y, x again; one more for a layout


def run(args) -> Report:
    dtype, rows, far = torch.bfloat16 if args.device.startswith("cuda") else torch.float32, [], 0.
    for shape, kernel in PUBLISHED if args.full else EMBEDDED:
        ways = {way: layer(way, shape, kernel, args.device, dtype) for way in WAYS}
        base, *others = (way() for way in ways.values())
        far = max(far, *(float(((a - b).abs().max() / b.abs().max()).detach()) for other in others for a, b in zip(other, base)))
        gflop, gb = counts(shape, kernel, dtype.itemsize)
        found = compared(interleaved({name: timed(call, args.device) for name, call in ways.items()}, args.repeat))
        rows += [{"map": "×".join(map(str, shape)), **row, "GFLOP/s": gflop / row["seconds"], "GFLOP": gflop, "GB": gb} for row in found]
    assert far < (1e-4 if dtype == torch.float32 else 5e-2), f"the ways differ by {far}"
    return Report(rows, [f"{str(dtype).split('.')[1]}, forward and backward; the ways differ by at most {far:.1e} of the largest value",
                         "GFLOP: multiplications and additions inside the kernel; GB: what must be read and written at the least"])
