"""How much memory do the views of a large video take, cut frame by frame, against all of its frames in memory first?

Each way runs in a process of its own, which reports how far its largest size in memory rose above that after the imports. Both must give
equal views. Without --video a clip is written here first: H.264, a pattern that moves.
Usage: python benchmarks/views_memory.py [--view dover|cover|square|processor] [--video FILE] [--frames 125 --height 2160 --width 3840] [--json]
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

VIEWS = ("dover", "cover", "square", "processor")
WAYS = {"frame by frame": "cut", "all frames first": "whole"}
MEASURE = """
import hashlib, json, resource, sys
import numpy as np
import torch
from qualivision.data import sampling, video
path, view, way = sys.argv[1:]

def size(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)     # bytes
def views(source):
    if view in ("dover", "cover"): return getattr(sampling, f"{view}_views")(source)
    return {"": sampling.Sampling(64, 640 if view == "square" else 384, view)(source)}
def all_first(path, indices, reader="auto", damaged="error", each=None):
    return [each(frame, k) for k, frame in enumerate(video.read_frames(path, indices, "pyav", damaged))]

if way == "whole": sampling.read_frames = all_first
before = size()
made = hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in views(path).values())).hexdigest()
print(json.dumps({"bytes": size() - before, "sha256": made}))
"""


def written_clip(path, frames, height, width):
    "A pattern of blocks that moves, one frame after the other."
    import av
    import numpy as np
    blocks = np.random.default_rng(0).integers(0, 256, (height//8 + 64, width//8 + 64, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "30"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for k in range(frames):
            picture = np.ascontiguousarray(blocks[5*k % 500:][:height, 7*k % 500:][:, :width])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--view", choices=VIEWS, default="dover")
    parser.add_argument("--video", help="a file, in place of a written one")
    parser.add_argument("--frames", type=int, default=125)
    parser.add_argument("--height", type=int, default=2160)
    parser.add_argument("--width", type=int, default=3840)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.video or Path(folder)/"large.mp4"
        if not args.video: written_clip(path, args.frames, args.height, args.width)
        found = {name: json.loads(subprocess.run([sys.executable, "-c", MEASURE, str(path), args.view, way], check=True, capture_output=True,
                                                 text=True).stdout) for name, way in WAYS.items()}
    cut, whole = found.values()
    assert cut["sha256"] == whole["sha256"], "the views differ"
    ratio = whole["bytes"]/cut["bytes"]
    if args.json: return print(json.dumps({"view": args.view, "ratio": ratio, **{name: f["bytes"] for name, f in found.items()}}))
    for name, f in found.items(): print(f"{name:18}{f['bytes']/1e6:8,.0f} MB")
    print(f"equal views; {ratio:.1f} times less")


if __name__ == "__main__": main()
