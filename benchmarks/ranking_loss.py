"""How much faster is the ranking term as one broadcast than as the three loops of its formula?

Both are timed in the same run, forward and backward, turn by turn, and must agree before anything is timed.
On a CPU both run on one thread, so that other work on the machine does not favour either.
Usage: python benchmarks/ranking_loss.py [--batch 192] [--rounds 3] [--device cuda] [--json]
"""
import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F

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


def timed(loss, pred, target, repeats=1):
    "Seconds of one forward and backward pass, and the loss and gradient."
    sync = torch.cuda.synchronize if pred.is_cuda else (lambda: None)
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        leaf = pred.clone().requires_grad_()
        value = loss(leaf, target)
        value.backward()
    sync()
    return (time.perf_counter() - start) / repeats, value.detach(), leaf.grad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=192, help="clips in a batch; 192 is the published V-JEPA 2 model's")
    parser.add_argument("--rounds", type=int, default=3, help="how often the two take turns; the medians are compared")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    args = parser.parse_args()
    torch.set_num_threads(1)

    generator = torch.Generator().manual_seed(0)
    pred = (torch.rand(args.batch, 5, generator=generator) * 4 + 1).to(args.device)
    target = ((torch.rand(args.batch, 5, generator=generator) * 12).round() / 3 + 1).to(args.device)   # thirds, as three raters give
    small = slice(0, min(8, args.batch))                                                               # warm up both, and compare
    for _ in range(2):
        timed(pairwise_ranking, pred, target)
        _, fast, fast_grad = timed(pairwise_ranking, pred[small], target[small])
        _, slow, slow_grad = timed(ranking_loops, pred[small], target[small])
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(fast_grad, slow_grad)

    vectorised, loops = [], []
    for _ in range(args.rounds):
        vectorised.append(timed(pairwise_ranking, pred, target, repeats=20)[0])
        loops.append(timed(ranking_loops, pred, target)[0])
    v, s = statistics.median(vectorised), statistics.median(loops)
    result = dict(benchmark="ranking_loss", batch=args.batch, device=args.device, rounds=args.rounds,
                  vectorised_ms=v * 1e3, loops_ms=s * 1e3, ratio=s / v)
    if args.json: return print(json.dumps(result))
    print(f"{'form':<12}{'median':>14}   (B={args.batch}, forward and backward, {args.rounds} rounds, {args.device})")
    print(f"{'loops':<12}{s * 1e3:>11.2f} ms\n{'vectorised':<12}{v * 1e3:>11.2f} ms")
    print(f"ratio {s / v:.0f}x")


if __name__ == "__main__": main()
