"""How much cheaper is training the V-JEPA 2 model with its bottom 85 % frozen, and kept, than the way it was published?

published: transformers' VJEPA2Model with its predictor on and all hidden states kept, float32 weights, `requires_grad` off for embeddings
           and the bottom 85 % of the layers but nothing else done about them, the first token as feature, the concatenation head.
ours:      VJepaMos as the embedded (on a GPU: the published) configuration has it: no predictor, frozen layers in bf16 without stored
           activations, attentive pooling, quality-aware fusion. `cached`: the frozen part computed once per video and read from disk.
Both run under bf16 autocast with AdamW over the same clips. On a CPU every run is a process of its own, so that its peak memory is its
own (resident set, above that after imports); the ways take turns, and the medians are compared. Building the cache counts.
On a CUDA device: the published size, 64 frames of 384×384, batch 6; steps after a warm-up, peak as torch counts it.
`--dry` runs the GPU's path on the CPU at the embedded size: it shows that the script works, and no number of it means anything.
Usage: python benchmarks/vjepa2_training.py [--epochs 10] [--clips 48] [--rounds 3] [--steps 4] [--json]
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from qualivision.models.registry import CONFIGS
from qualivision.models.documented import ConcatHead
from qualivision.models.vjepa_mos import VJepaMos, config_of_encoder
from qualivision.models.measures import input_channels
from qualivision.models.frozen import FeatureCache
from qualivision.models.vjepa2 import training_memory

BATCH, LR = 16, 1e-4


class Published(nn.Module):
    "The published way."
    def __init__(self, config):
        super().__init__()
        from transformers import VJEPA2Model
        encoder = config_of_encoder(config)
        encoder.pred_hidden_size = max(config.encoder_heads * 12, 384 * config.hidden_size // 1408 // config.encoder_heads * config.encoder_heads)
        encoder.pred_num_attention_heads = config.encoder_heads
        self.video_encoder, self.head = VJEPA2Model(encoder), ConcatHead(config.hidden_size + config.text_dim)
        frozen = [self.video_encoder.encoder.embeddings, *self.video_encoder.encoder.layer[:int(.85 * config.layers)]]
        for part in frozen: part.requires_grad_(False)

    def forward(self, frames, text):
        out = self.video_encoder(input_channels(frames).transpose(1, 2), output_hidden_states=True)      # the predictor runs
        return 1 + 4 * self.head(out.last_hidden_state[:, 0], text)[0].float().sigmoid(), out


class Clips:
    "Clips that lie in a file, as a clip cache's do."
    def __init__(self, folder, count, config):
        self.sampling = type("Sampling", (), {"key": lambda self: f"random{config.frames}x{config.size}"})()
        self.folder, self.shape = Path(folder), (3, config.frames, config.size, config.size)
        for i in range(count):
            if (file := self.folder/f"{i}.bin").exists(): continue
            file.write_bytes(torch.randint(0, 256, self.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(i)).numpy().tobytes())

    def get(self, path, flip=False):
        return torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8).view(self.shape)


def train(way, config, clips, count, epochs, folder, batch=BATCH, device="cpu", steps=None):
    "Trains; returns seconds (the cache's included), videos and the last loss. `steps`: that many are timed, after one that is not."
    torch.manual_seed(0)
    model = (Published(config) if way == "published" else VJepaMos(config)).to(device).train()
    text, mos = torch.randn(count, config.text_dim, device=device), torch.rand(count, 5, device=device) * 4 + 1
    paths = [str(clips.folder/f"{i}.bin") for i in range(count)]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR)
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    begin, source, seen, todo = time.perf_counter(), None, 0, [b for _ in range(epochs) for b in torch.arange(count).split(batch)]
    if way == "cached":
        source = FeatureCache(folder, clips, model.eval())
        source.build(paths, progress=False)
        model.train()
    for i, rows in enumerate(todo):
        if steps is not None and i == 1: sync(); begin, seen = time.perf_counter(), 0
        items = [(source or clips).get(paths[r]) for r in rows]
        frames = torch.stack(items) if torch.is_tensor(items[0]) else {k: torch.stack([x[k] for x in items]).to(device) for k in items[0]}
        if torch.is_tensor(frames): frames = frames.to(device)
        with torch.autocast(device, torch.bfloat16):
            out = model(frames, text[rows])
            pred, kept = out if way == "published" else (out["mos"], None)
        loss = F.smooth_l1_loss(pred, mos[rows])
        loss.backward(); optimiser.step(); optimiser.zero_grad(set_to_none=True)
        del out, kept
        seen += len(rows)
        if steps is not None and i == steps: break
    sync()
    return time.perf_counter() - begin, seen, float(loss.detach())


def child(way, epochs, count, folder):
    "One run on the CPU; prints its numbers as JSON."
    config = CONFIGS["vjepa2_embedded"]
    VJepaMos(replace(config, layers=1, hidden_size=48, encoder_heads=2))      # what transformers imports late
    before = peak()
    seconds, videos, loss = train(way, config, Clips(folder, count, config), count, epochs, f"{folder}/features-{time.time_ns()}")
    print(json.dumps(dict(videos_per_s=videos / seconds, peak_mb=peak() - before, loss=loss)))


def peak():
    "The largest resident set of this process so far, MiB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def on_cpu(args):
    "Every way in processes that take turns."
    rows = {way: [] for way in ("published", "cached")}
    with tempfile.TemporaryDirectory() as folder:
        Clips(folder, args.clips, CONFIGS["vjepa2_embedded"])
        for _ in range(args.rounds):
            for way in rows:
                command = [sys.executable, __file__, "--child", way, "--epochs", str(args.epochs), "--clips", str(args.clips), "--folder", folder]
                rows[way].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return {way: {k: statistics.median(r[k] for r in found) for k in found[0]} for way, found in rows.items()}


def on_gpu(args, name="vjepa2_published", device="cuda"):
    "The published size; ways take turns in this process."
    rows, config = {way: [] for way in ("published", "ours", "cached")}, CONFIGS[name]
    with tempfile.TemporaryDirectory() as folder:
        clips = Clips(folder, 6, config)
        for _ in range(args.rounds):
            for way in rows:
                if device == "cuda": torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
                seconds, videos, loss = train(way, config, clips, 6, args.steps + 1, f"{folder}/features", 6, device, args.steps)
                top = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak()
                rows[way].append(dict(videos_per_s=videos / seconds, peak_mb=top, loss=loss))
    return {way: {k: statistics.median(r[k] for r in found) for k in found[0]} for way, found in rows.items()}


def arithmetic():
    "What the published size needs, computed: GB by cause, and TFLOP a video."
    config = config_of_encoder(CONFIGS["vjepa2_published"])
    memory = {name: sum(training_memory(config, **kw).values()) / 1e9
              for name, kw in {"all activations, float32": dict(micro_batch=0, frozen_bytes=4), "ours, batch 6": dict()}.items()}
    tokens, D, M, layers, frozen = 32 * 24 * 24, 1408, 6144, 40, 34
    layer = (8 * tokens * D * D + 4 * tokens * D * M + 4 * tokens * tokens * D) / 1e12          # TFLOP forward
    return dict(memory_gb=memory, tflop_a_video={"every layer forward, the top 6 backward": layer * (layers + 2 * (layers - frozen)),
                                                 "from the cache": layer * 3 * (layers - frozen)})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="on a CPU")
    parser.add_argument("--clips", type=int, default=48, help="on a CPU")
    parser.add_argument("--steps", type=int, default=4, help="on a GPU: steps that are timed, after one that is not")
    parser.add_argument("--rounds", type=int, default=3, help="how often the ways take turns; the medians are compared")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--dry", action="store_true", help="the GPU's path, small, on the CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child: return child(args.child, args.epochs, args.clips, args.folder)

    gpu = torch.cuda.is_available()
    rows = on_gpu(args, "vjepa2_embedded", "cpu") if args.dry else on_gpu(args) if gpu else on_cpu(args)
    base, best = rows["published"], rows["cached"]
    device = torch.cuda.get_device_name() if gpu else "cpu"
    result = dict(benchmark="vjepa2_training", device=device, torch=torch.__version__, rounds=args.rounds, rows=rows, arithmetic=arithmetic(),
                  ratio=best["videos_per_s"] / base["videos_per_s"], memory_ratio=best["peak_mb"] / base["peak_mb"])
    if args.json: return print(json.dumps(result))
    size = "64×384×384, batch 6" if gpu else f"embedded size, {args.clips} clips, {args.epochs} epochs, building the cache counted in"
    print(f"{'way':<12}{'videos/s':>10}{'peak':>12}   ({size}, {args.rounds} rounds, {device})")
    for way, r in rows.items(): print(f"{way:<12}{r['videos_per_s']:>10.1f}{r['peak_mb']:>9.0f} MB")
    print(f"ratio {result['ratio']:.1f}x the videos/s, {result['memory_ratio']:.2f} of the peak memory")
    if not gpu:
        a = result["arithmetic"]
        print("\n64×384×384, ViT-giant, on a GPU: not measured here. Computed:")
        for name, gb in a["memory_gb"].items(): print(f"  {gb:6.1f} GB  {name}")
        for name, t in a["tflop_a_video"].items(): print(f"  {t:6.1f} TFLOP a video, {name}")


if __name__ == "__main__": main()
