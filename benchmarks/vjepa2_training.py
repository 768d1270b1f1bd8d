"""How much cheaper is training the V-JEPA 2 model with its bottom 85 % frozen, and kept, than the way it was published?

published: transformers' VJEPA2Model with its predictor on and all hidden states kept, float32 weights, `requires_grad` off for embeddings
           and the bottom 85 % of the layers but nothing else done about them, the first token as feature, the concatenation head.
ours:      VJepaMos as the embedded (on a GPU: the published) configuration has it: no predictor, frozen layers in bf16 without stored
           activations, attentive pooling, quality-aware fusion. `cached`: the frozen part computed once per video and read from disk.
Both run under bf16 autocast with AdamW over the same clips. On a CPU every run is a process of its own, so that its peak memory is its
own (resident set, above that after imports). Building the cache counts.
On a CUDA device: the published size, 64 frames of 384×384, batch 6; steps after a warm-up, peak as torch counts it.
`--dry` runs the GPU's path on the CPU at the embedded size: it shows that the script works, and no number of it means anything.
"""
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common import Report, child, compared, interleaved, peak_mb
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


def on_cpu(way: str, epochs: int, count: int, folder: str) -> dict:
    "One run at the embedded size."
    config = CONFIGS["vjepa2_embedded"]
    VJepaMos(replace(config, layers=1, hidden_size=48, encoder_heads=2))      # what transformers imports late
    before = peak_mb()
    seconds, videos, loss = train(way, config, Clips(folder, count, config), count, epochs, f"{folder}/features-{time.time_ns()}")
    return {"seconds": seconds, "videos/s": videos / seconds, "above_imports_mb": peak_mb() - before, "loss": loss}


def on_gpu(way: str, steps: int, folder: str, name="vjepa2_published", device="cuda") -> dict:
    "Some steps at the published size."
    config = CONFIGS[name]
    if device == "cuda": torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    seconds, videos, loss = train(way, config, Clips(folder, 6, config), 6, steps + 1, f"{folder}/features", 6, device, steps)
    top = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_mb()
    return {"seconds": seconds, "videos/s": videos / seconds, "gpu_mb": top, "loss": loss}


def arithmetic():
    "What the published size needs, computed: GB by cause, and TFLOP a video."
    config = config_of_encoder(CONFIGS["vjepa2_published"])
    memory = {name: sum(training_memory(config, **kw).values()) / 1e9
              for name, kw in {"all activations, float32": dict(micro_batch=0, frozen_bytes=4), "ours, batch 6": dict()}.items()}
    tokens, D, M, layers, frozen = 32 * 24 * 24, 1408, 6144, 40, 34
    layer = (8 * tokens * D * D + 4 * tokens * D * M + 4 * tokens * tokens * D) / 1e12          # TFLOP forward
    return dict(memory_gb=memory, tflop_a_video={"every layer forward, the top 6 backward": layer * (layers + 2 * (layers - frozen)),
                                                 "from the cache": layer * 3 * (layers - frozen)})


def options(parser):
    parser.add_argument("--epochs", type=int, help="on a CPU")
    parser.add_argument("--clips", type=int, help="on a CPU")
    parser.add_argument("--steps", type=int, default=4, help="on a GPU: steps that are timed, after one that is not")
    parser.add_argument("--dry", action="store_true", help="the GPU's path, small, on the CPU")


def run(args) -> Report:
    gpu, epochs, count = args.device == "cuda", args.epochs or (10 if args.full else 3), args.clips or (48 if args.full else 16)
    with tempfile.TemporaryDirectory() as folder:
        if gpu or args.dry:
            size = {} if gpu else dict(name="vjepa2_embedded", device="cpu")
            ways = {way: lambda way=way: on_gpu(way, args.steps, folder, **size) for way in ("published", "ours", "cached")}
        else:
            Clips(folder, count, CONFIGS["vjepa2_embedded"])
            ways = {way: child("benchmarks.vjepa2_training:on_cpu", way=way, epochs=epochs, count=count, folder=folder)
                    for way in ("published", "cached")}
        samples = interleaved(ways, args.repeat, warm=0)
    notes = ["64×384×384, batch 6" if gpu else f"embedded size, {count} clips, {epochs} epochs, building the cache counted in"]
    if not gpu:
        computed = arithmetic()
        notes.append("64×384×384, ViT-giant, on a GPU: not measured here. Computed: "
                     + "; ".join([f"{gb:.1f} GB with {name}" for name, gb in computed["memory_gb"].items()]
                                 + [f"{t:.1f} TFLOP a video, {name}" for name, t in computed["tflop_a_video"].items()]))
    return Report(compared(samples), notes)
