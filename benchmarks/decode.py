"""How fast, how small and how near to the published way is a model's view of a file: 64 frames of 640×640?

The reference is the published way: decord, all 64 frames at full size, then Pillow's bicubic, frame by frame; it notices no damage. The
floor is FFmpeg that decodes with two threads and drops what comes. Each runs in a process of its own; imports do not count, neither in time
nor in memory. The clips are written here: H.264 of a photograph that drifts, with grain. With --full also DOVER, views and network, on
5 s of 720p and of 4K.
"""
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.common import Report, child, compared, interleaved, peak_mb

COUNT, SIZE = 64, 640
SIZES = {"720p": (720, 1280), "1080p": (1080, 1920), "4K": (2160, 3840)}


def written_clip(path, frames: int, height: int, width: int):
    "A photograph that drifts by whole pixels, with grain that changes."
    import av
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_image
    rng, photo = np.random.default_rng(0), Image.fromarray(load_sample_image("china.jpg"))
    scene = np.array(photo.resize((width + 256, height + 256), Image.LANCZOS), dtype=np.int16)
    grain = rng.normal(0, 3, (height + 64, width + 64, 1)).round().astype(np.int16)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24, options={"preset": "veryfast", "crf": "20"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for k in range(frames):
            top, left = rng.integers(0, 64, 2)
            picture = scene[3*k % 256:][:height, 2*k % 256:][:, :width] + grain[top:top + height, left:left + width]
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")))
        out.mux(stream.encode())


# ---------------------------------------------------------------- the ways; each is called in a process of its own

def measured(make) -> dict:
    "Seconds of one call, and how far the memory rose above that before it."
    before, start = peak_mb(), time.perf_counter()
    make()
    return {"seconds": time.perf_counter() - start, "rise_mb": peak_mb() - before}


def by_decord(path: str):      # -> (64,640,640,3) uint8
    import decord
    import numpy as np
    from PIL import Image
    video = decord.VideoReader(path)
    frames = video.get_batch(np.linspace(0, len(video) - 1, COUNT).astype(int)).asnumpy()          # (64,H,W,3)
    return np.stack([np.array(Image.fromarray(f).resize((SIZE, SIZE), Image.BICUBIC)) for f in frames])


def reference(path: str) -> dict:
    import decord  # noqa: F401
    from PIL import Image
    Image.new("RGB", (8, 8)).resize((4, 4), Image.BICUBIC)
    return measured(lambda: by_decord(path))


def ours(path: str) -> dict:
    import torch
    from qualivision.data.sampling import Sampling, resize_square8
    resize_square8(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), 4)
    return measured(lambda: Sampling(COUNT, SIZE, "square8")(path))


def floor(path: str) -> dict:
    import av
    if shutil.which("ffmpeg"):
        command = ["ffmpeg", "-v", "error", "-threads", "2", "-i", path, "-f", "null", "-"]
        return measured(lambda: subprocess.run(command, check=True))
    def decode():
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count, stream.codec_context.thread_type = 2, "AUTO"
            for _ in container.decode(stream): pass
    return measured(decode)


def apart(path: str) -> dict:
    "How far our pixels are from those of the reference."
    import numpy as np
    from qualivision.data.sampling import Sampling
    d = Sampling(COUNT, SIZE, "square8")(path).permute(1, 2, 3, 0).numpy().astype(np.int16) - by_decord(path)
    return {"decibels": float(10*np.log10(255**2/np.square(d, dtype=np.float32).mean())), "levels": int(np.abs(d).max())}


def dover(path: str) -> dict:
    import torch
    from qualivision.official.dover import DOVER
    from qualivision.official.views import dover_views
    model = DOVER().eval()
    def score():
        with torch.no_grad(): model(dover_views(path))
    return measured(score)


# ---------------------------------------------------------------- together

def of_size(name: str, path: str, repeat: int) -> tuple[list, str]:
    "Rows of one size, and a sentence that sets them against the aims."
    ways = {"reference": reference, "ours": ours, "floor": floor}
    samples = interleaved({w: child(f"benchmarks.decode:{f.__name__}", path=path) for w, f in ways.items()}, repeat)
    rows, near = compared(samples), child("benchmarks.decode:apart", path=path)()
    del rows[-1]["rise MB"]                                                                        # FFmpeg's is another process
    own, base, least = (next(r for r in rows if r["way"] == w) for w in ("ours", "reference", "floor"))
    said = (f"{name}: {own['times as fast']:.2f} times as fast as the reference (aim: 1.8), {own['rise MB'] / base['rise MB']:.2f} of its "
            f"memory (aim: .33), {near['decibels']:.1f} dB from its pixels and {near['levels']} levels at most (aim: 70 dB), "
            f"{own['seconds'] / least['seconds']:.2f} times the floor (aim: 1.5)")
    return [r | {"way": f"{name}: {r['way']}"} for r in rows], said


def options(parser):
    parser.add_argument("--seconds", type=float, help="length of the clips; default: 4, with --full 10")


def run(args) -> Report:
    frames, rows, notes = round(24*(args.seconds or (10 if args.full else 4))), [], []
    with tempfile.TemporaryDirectory() as folder:
        def clip(name, frames):
            path = Path(folder)/f"{name}-{frames}.mp4"
            written_clip(path, frames, *SIZES[name])
            return str(path)
        for name in ("720p", "1080p"):
            path = clip(name, frames)
            found, said = of_size(name, path, args.repeat)
            rows += found
            notes.append(f"{said}; {frames} frames at 24/s, {8*24*Path(path).stat().st_size/frames/1e6:.1f} Mbit/s")
        if args.full:
            rises = {n: child("benchmarks.decode:dover", path=clip(n, 120))()["rise_mb"] for n in ("720p", "4K")}
            notes.append(f"DOVER, 5 s: {rises['720p']:,.0f} MB above the model for 720p, {rises['4K']:,.0f} MB for 4K (aim: at most 1,000 MB more)")
    return Report(rows, notes)
