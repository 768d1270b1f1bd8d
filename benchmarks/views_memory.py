"""How much memory do the views of a large video take, cut frame by frame, against all of its frames in memory first?

Each way runs in a process of its own, which reports how far its largest size in memory rose above that after the imports. Both must give
equal views. Without --video a clip is written here first: H.264, a pattern that moves.
"""
import hashlib
import tempfile
from pathlib import Path

from benchmarks.common import Report, child, compared, interleaved, peak_mb, written_clip

VIEWS = ("dover", "cover", "square", "processor")


def once(path: str, view: str, whole: bool) -> dict:
    "The views of one file; `whole`: all frames that they show are in memory before the first is cut."
    import time

    from qualivision.data import sampling
    from qualivision.data.video import read_frames
    from qualivision.official import views

    def all_first(path, indices, reader="auto", damaged="error", each=None):
        return [each(frame, k) for k, frame in enumerate(read_frames(path, indices, "pyav", damaged))]
    if whole: sampling.read_frames = views.read_frames = all_first
    before, start = peak_mb(), time.perf_counter()
    if view in ("dover", "cover"): made = list(getattr(views, f"{view}_views")(path).values())
    else: made = [sampling.Sampling(64, 640 if view == "square" else 384, view)(path)]
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "above_imports_mb": peak_mb() - before,
            "sha256": hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in made)).hexdigest()}


def options(parser):
    parser.add_argument("--view", choices=VIEWS, action="append", help="may be given several times; dover without")
    parser.add_argument("--video", help="a file, in place of a written one")
    parser.add_argument("--frames", type=int, help="of the written one")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)


def run(args) -> Report:
    frames, height, width = (125, 2160, 3840) if args.full else (50, 1080, 1920)
    frames, height, width = args.frames or frames, args.height or height, args.width or width
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = args.video or written_clip(Path(folder)/"large.mp4", frames, height, width)
        for view in args.view or (VIEWS if args.full else VIEWS[:1]):
            ways = {name: child("benchmarks.views_memory:once", path=str(path), view=view, whole=whole)
                    for name, whole in (("all frames first", True), ("frame by frame", False))}
            samples = interleaved(ways, args.repeat)
            assert len({s["sha256"] for way in samples.values() for s in way}) == 1, "the views differ"
            found = compared(samples)
            rows += [{"view": view, **row, "times less memory": found[0]["above_imports MB"] / row["above_imports MB"]} for row in found]
    return Report(rows, [f"{args.video or f'{frames} frames of {width}×{height}'}; the views of both ways are equal"])
