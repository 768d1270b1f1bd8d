"""How much faster is reading 16 frames of a file with one decode by PyAV, as `reader="auto"` does, than a strict decode and then decord?

Files on which decord is not exact are left out. The pixels of both ways are compared.
"""
from pathlib import Path

import numpy as np

from benchmarks.common import ROOT, Report, Unavailable, compared, interleaved
from qualivision.data.look import decord_module, look_at
from qualivision.data.video import read_frames


def wanted(count): return np.unique(np.linspace(0, count - 1, 16).astype(int))


def both(path):
    "The strict decode finds damage; decord then gives the frames."
    read_frames(path, [0], "pyav")
    return read_frames(path, wanted, "decord")


def options(parser): parser.add_argument("files", nargs="*", type=Path, help="video files; default: some clips of data/")


def run(args) -> Report:
    if decord_module() is None: raise Unavailable("decord is not installed")
    files = args.files or sorted((ROOT/"data").glob("*/videos/*.mp4"))[::8 if args.full else 24]
    files = [f for f in files if look_at(f).info.reader == "decord"]
    if not files: raise Unavailable("there is no file that decord reads exactly; name some")
    equal = all(np.array_equal(read_frames(f, wanted), both(f)) for f in files)
    samples = interleaved({"strict decode, then decord": lambda: [both(f) for f in files],
                           "PyAV once": lambda: [read_frames(f, wanted) for f in files]}, args.repeat)
    return Report(compared(samples), [f"{len(files)} files, pixels {'equal' if equal else 'DIFFER'}"])
