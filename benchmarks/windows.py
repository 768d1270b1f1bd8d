"""How much faster is DOVER's technical encoder with fused attention inside its windows than with products, softmax and bias one after the other?

The plain form is the one that a gradient takes; both compute the same view of 32×224² pixels (reduced: 8×224²) with the same random weights, in turn.
"""
import torch

from benchmarks.common import Report, Unavailable, compared, interleaved, timed


def run(args) -> Report:
    if args.device != "cpu": raise Unavailable("the fused form is chosen for a CPU's caches")
    from qualivision.official.swin3d import Swin3D
    torch.manual_seed(0)
    net, x = Swin3D().eval().requires_grad_(False), torch.randn(1, 3, 32 if args.full else 8, 224, 224)

    def once(gradient: bool):      # nothing asks for a gradient, but attention takes the form of one
        with torch.set_grad_enabled(gradient): return net(x)[-1]
    far, size = float((once(True) - once(False)).abs().max()), float(once(False).abs().max())
    assert far < 1e-5 * size, f"the forms differ by {far}"
    rows = compared(interleaved({"plain": timed(lambda: once(True), "cpu"), "fused": timed(lambda: once(False), "cpu")}, args.repeat))
    return Report(rows, [f"1×3×{x.shape[2]}×224×224, float32; the forms differ by at most {far / size:.1e} of the largest value"])
