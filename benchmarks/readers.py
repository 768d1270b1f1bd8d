"""Reading 16 frames of each file: PyAV alone, as `reader="auto"` does, against a strict decode and then decord.

    python benchmarks/readers.py FILE [...]     # default: every eighth clip of data/

Files on which decord is not exact are left out. Prints seconds, their ratio, and whether all pixels are equal; medians of three rounds,
the two ways taking turns."""
import sys
import time
from pathlib import Path

import numpy as np

from qualivision.data.look import look_at
from qualivision.data.video import read_frames

ROOT = Path(__file__).parents[1]


def wanted(count): return np.unique(np.linspace(0, count - 1, 16).astype(int))


def both(path):
    "The strict decode finds damage; decord then gives the frames."
    read_frames(path, [0], "pyav")
    return read_frames(path, wanted, "decord")


def seconds(read, files) -> tuple[list, float]:
    began = time.perf_counter()
    return [read(f) for f in files], time.perf_counter() - began


files = [Path(f) for f in sys.argv[1:]] or sorted((ROOT/"data").glob("*/videos/*.mp4"))[::8]
files = [f for f in files if look_at(f).info.reader == "decord"]
once, twice, equal = [], [], True
for _ in range(3):
    a, s = seconds(lambda f: read_frames(f, wanted), files); once.append(s)
    b, s = seconds(both, files); twice.append(s)
    equal &= all(np.array_equal(x, y) for x, y in zip(a, b))
print(f"{len(files)} files: PyAV once {np.median(once):.1f} s, strict decode and decord {np.median(twice):.1f} s, "
      f"ratio {np.median(twice) / np.median(once):.2f}, pixels {'equal' if equal else 'DIFFER'}")
