"""How much faster is a depthwise 3-D convolution, forward and backward, as this package computes it than nn.Conv3d, contiguous in memory?

Shapes: the four maps of the embedded network (batch 16, kernel 3×7×7); with --full those of the published one (kernel 7×7×7), on a CPU at
16×224², on a GPU at 64×640², batch 4. On a GPU in bfloat16, and the package's way is Triton's kernel of chapter 21a, or it is not measured.
Before anything is timed, each way's output and three gradients for one clip of at most 16 frames must agree with float64.
Beside each time stands what arithmetic predicts: the operations at the rate of a float32 matrix product, or the bytes at that of a copy,
whichever takes longer; both rates measured in this run. The sums are in float32, and a GPU's tensor cores take no part in them.
"""
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common import Report, Unavailable, compared, interleaved, rates, timed

EMBEDDED = [((16, c, 16, s, s), (3, 7, 7)) for c, s in ((40, 16), (64, 8), (128, 4), (192, 2))]
PUBLISHED = [((1, c, 16, s, s), (7, 7, 7)) for c, s in ((96, 56), (192, 28), (384, 14), (768, 7))]
LARGE = [((4, c, 64, s, s), (7, 7, 7)) for c, s in ((96, 160), (192, 80), (384, 40), (768, 20))]
OURS = "this package"
WAYS = ("nn.Conv3d, contiguous", "nn.Conv3d, channels_last_3d", OURS)
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}       # error, of the largest value


def layer(way: str, shape: tuple, kernel: tuple, device: str, dtype: torch.dtype):
    "A function → [output, gradients of input, kernel and bias], with the same weights and input for every way; what it computes with."
    from qualivision.models.convnext3d import DepthwiseConv3d
    torch.manual_seed(0)
    ours = DepthwiseConv3d(shape[1], kernel)
    net = ours if way == OURS else nn.Conv3d(shape[1], shape[1], kernel, padding=ours.padding, groups=shape[1])
    net.load_state_dict(ours.state_dict())
    torch.manual_seed(1)
    memory = torch.contiguous_format if way.endswith("contiguous") else torch.channels_last_3d
    x, grad = (torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=memory) for _ in range(2))
    net, x = net.to(device, dtype), x.requires_grad_()

    def both():
        y = net(x)
        return [y, *torch.autograd.grad(y, [x, net.weight, net.bias], grad)]
    return both, (x, net.weight, net.bias, grad)


def error(shape: tuple, kernel: tuple, device: str, dtype: torch.dtype) -> float:
    "The largest difference of all ways' four results from float64, each relative to its largest value; one clip of at most 16 frames."
    ways = [layer(way, (1, shape[1], min(shape[2], 16), *shape[3:]), kernel, device, dtype) for way in WAYS]
    *leaves, grad = (a.detach().to(torch.float64, memory_format=torch.contiguous_format) for a in ways[0][1])     # all have these
    for a in leaves: a.requires_grad_()
    y = F.conv3d(*leaves, padding=[k // 2 for k in kernel], groups=shape[1])
    exact = [y, *torch.autograd.grad(y, leaves, grad)]
    pairs = [(a.detach().double(), b.detach()) for both, _ in ways for a, b in zip(both(), exact)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def counts(shape: tuple, kernel: tuple, size: int) -> tuple[float, float]:
    "GFLOP of the forward and both backward passes; GB that they must read and write at the least, numbers of `size` bytes."
    B, C, T, H, W = shape
    places, taps = B * C * T * H * W, kernel[0] * kernel[1] * kernel[2]
    return 3 * 2 * places * taps / 1e9, 7 * places * size / 1e9       # x → y; ∂y → ∂x; x, ∂y → ∂w; ∂y → ∂b


def check_kernel(device: str, dtype: torch.dtype, kernel: tuple):
    "On a GPU the package's way must be its own. Raises Unavailable."
    from qualivision.models.depthwise_gpu import fast
    if fast(torch.device("cuda", torch.cuda.current_device()), dtype, kernel) is None:
        raise Unavailable("Triton's kernel cannot run (above); pip install -e '.[gpu]'")


def run(args) -> Report:
    cuda = args.device.startswith("cuda")
    dtype, rows, far = torch.bfloat16 if cuda else torch.float32, [], 0.
    shapes = (LARGE if cuda else PUBLISHED) if args.full else EMBEDDED
    if cuda: check_kernel(args.device, dtype, shapes[0][1])
    flops, copied = rates(args.device)
    for shape, kernel in shapes:
        far = max(far, error(shape, kernel, args.device, dtype))
        assert far < ALLOWED[dtype], f"off by {far} at {shape}"
        ways = {way: timed(layer(way, shape, kernel, args.device, dtype)[0], args.device) for way in WAYS}
        gflop, gb = counts(shape, kernel, dtype.itemsize)
        found, predicted = compared(interleaved(ways, args.repeat)), max(gflop / flops, gb / copied)
        rows += [{"map": "×".join(map(str, shape)), **row, "predicted": predicted, "GFLOP/s": gflop / row["seconds"],
                  "GFLOP": gflop, "GB": gb} for row in found]
    return Report(rows, [f"{str(dtype).split('.')[1]}, forward and backward; off by at most {far:.1e} of the largest value, against float64",
                         "GFLOP: multiplications and additions inside the kernel; GB: what must be read and written at the least",
                         f"predicted: seconds at {flops:,.0f} GFLOP/s (matrix product, float32) and {copied:,.0f} GB/s (copy), measured here"])
