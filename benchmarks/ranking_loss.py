"""How much faster is the ranking term as one broadcast than as the three loops of its formula?

Both are timed in the same run, forward and backward, turn by turn, and must agree before anything is timed.
On a CPU both run on one thread, so that other work on the machine does not favour either.
"""
import torch
import torch.nn.functional as F

from benchmarks.common import Report, compared, interleaved
from qualivision.training.losses import pairwise_ranking


def ranking_loops(pred, target, margin=0.2, min_gap=0.1):
    "The formula as it reads; the comparisons run on plain floats, so that only differentiable work costs tensors."
    (B, D), order, total = pred.shape, target.tolist(), pred.sum() * 0.0
    for d in range(D):
        for i in range(B):
            for j in range(i + 1, B):
                gap = order[i][d] - order[j][d]
                if abs(gap) > min_gap: total = total + F.relu(margin - (1.0 if gap > 0 else -1.0) * (pred[i, d] - pred[j, d]))
    return total / (B * (B - 1) / 2 * D)


def both_ways(loss, pred, target):
    "The loss and its gradient, of one forward and backward pass."
    leaf = pred.clone().requires_grad_()
    value = loss(leaf, target)
    value.backward()
    if pred.is_cuda: torch.cuda.synchronize()
    return value.detach(), leaf.grad


def options(parser): parser.add_argument("--batch", type=int, help="clips; 192 is the published V-JEPA 2 model's")


def run(args) -> Report:
    torch.set_num_threads(1)
    batch, generator = args.batch or (192 if args.full else 64), torch.Generator().manual_seed(0)
    pred = (torch.rand(batch, 5, generator=generator) * 4 + 1).to(args.device)
    target = ((torch.rand(batch, 5, generator=generator) * 12).round() / 3 + 1).to(args.device)      # thirds, as three raters give
    ways, small = {"three loops": ranking_loops, "one broadcast": pairwise_ranking}, slice(0, min(8, batch))
    for a, b in zip(*(both_ways(loss, pred[small], target[small]) for loss in ways.values())): torch.testing.assert_close(a, b)
    samples = interleaved({name: lambda loss=loss: both_ways(loss, pred, target) for name, loss in ways.items()}, args.repeat)
    return Report(compared(samples), [f"batch {batch}, forward and backward, one thread; loss and gradient agree"])
