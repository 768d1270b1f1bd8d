"""How much faster is an epoch of loading from the clip cache than decoding every video again?

Both go through the same data set class, sampling, order and DataLoader, turn by turn in one run, and must give equal batches before
anything is timed. The page cache is warm for both: the videos and the cached clips have just been read or written. Building the cache
is timed apart. Without --data the clips are written here first: H.264, drifting colours and some noise.
"""
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from benchmarks.common import Report, compared, interleaved
from qualivision.data.clips import (
    ClipCache, DecodeEachTime, EpochSampler, VideoQualityDataset, collate)
from qualivision.data.dataset import load_dataset
from qualivision.data.sampling import Sampling
from qualivision.data.container import write_video


def written_clips(folder, count, frames, size):
    "A table of `count` videos that it writes."
    rng, rows = np.random.default_rng(0), []
    y, x = np.mgrid[:size, :size][..., None]/size          # (H,W,1) each
    for i in range(count):
        phase = np.arange(frames).reshape(-1, 1, 1, 1)/frames
        waves = np.sin(2*np.pi*(x*rng.integers(1, 6) + y*rng.integers(1, 6) + phase*rng.uniform(.5, 2) + rng.random(3)))
        clip = 127 + 90*waves + rng.normal(0, 4, (frames, size, size, 3))
        rows.append((f"clip_{i:04d}.mp4", f"prompt {i}", str(Path(folder)/f"clip_{i:04d}.mp4")))
        write_video(rows[-1][-1], clip.clip(0, 255).astype(np.uint8), fps=24)
    return pd.DataFrame(rows, columns=["video_name", "Prompt", "path"])


def loader(data, args):
    "Batches in a shuffled order; workers stay from epoch to epoch, so that their start is not timed."
    return DataLoader(data, batch_size=args.batch, sampler=EpochSampler(len(data), seed=0), num_workers=args.workers,
                      collate_fn=collate, persistent_workers=args.workers > 0)


def epoch(batches, number):
    "Seconds for one epoch."
    batches.sampler.set_epoch(number)
    start, seen = time.perf_counter(), 0
    for batch in batches: seen += len(batch["frames"])
    assert seen == len(batches.dataset)
    return time.perf_counter() - start


def options(parser):
    parser.add_argument("--clips", type=int, help="how many videos to write, or to take from --data at most")
    parser.add_argument("--frames", type=int, default=48, help="frames of a written video")
    parser.add_argument("--size", type=int, default=144, help="pixels a side of a written video")
    parser.add_argument("--data", help="a folder in the TaobaoVD-GC layout, in place of written videos")
    parser.add_argument("--count", type=int, default=16, help="frames that are sampled")
    parser.add_argument("--pixels", type=int, default=128, help="pixels a side that they are resized to")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0, help="DataLoader workers, for both")


def run(args) -> Report:
    torch.set_num_threads(1)
    count = args.clips or (64 if args.full else 24)
    with tempfile.TemporaryDirectory() as folder:
        frame = load_dataset(args.data)[:count] if args.data else written_clips(folder, count, args.frames, args.size)
        sampling, text = Sampling(args.count, args.pixels), torch.zeros(len(frame), 1)
        cache = ClipCache(Path(folder)/"cache", sampling)
        time.sleep(2.1)                        # a file that has just been written is hashed at every look, see FileHashes
        start = time.perf_counter()
        stored = cache.build(frame["path"], workers=args.workers, progress=False)
        build = time.perf_counter() - start
        cached, decoded = VideoQualityDataset(frame, cache, text), VideoQualityDataset(frame, DecodeEachTime(sampling), text)
        for i in range(min(8, len(frame))): assert torch.equal(cached[i]["frames"], decoded[i]["frames"]), f"item {i} differs"
        ways, turns = {"decoded every epoch": loader(decoded, args), "clip cache": loader(cached, args)}, iter(range(10_000))
        samples = interleaved({name: lambda batches=batches: epoch(batches, next(turns)) for name, batches in ways.items()}, args.repeat)
    n = len(frame)
    return Report(compared(samples), [
        f"an epoch of {n} videos, {args.count} frames of {args.pixels}×{args.pixels}, batches of {args.batch}, {args.workers} workers",
        f"the page cache is warm; the clip cache: {stored.bytes/1e6:.0f} MB, built in {1e3*build/n:.1f} ms a clip; the batches of both are equal"])
