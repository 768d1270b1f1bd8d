"A data set, a model and a checkpoint small enough for tests: seconds to train, milliseconds to score."
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from qualivision.data.sampling import Sampling
from qualivision.data.container import write_video
from qualivision.models.dover_mos import DoverPlusPlus
from qualivision.models.weights import save_checkpoint
from qualivision.quality import COLUMNS
from qualivision.training.train import Task, model_config, train_model
from qualivision.training.loop import TrainConfig

CONFIG = model_config("embedded", dict(frames=4, size=32, dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), stem=(1, 4, 4), kernel=(3, 3, 3),
                                       grid=(2, 1, 1), feature_dim=16, fusion_width=16))
PROMPTS = ["a red boat", "a green tree", "a blue car", "a grey cat", "snow at night", "a yellow sun", "a white dog", "rain on a window"]


def clip(path: Path, colour, frames=6, size=32):
    "A clip of one colour that brightens a little."
    ramp = np.linspace(0.8, 1.0, frames)[:, None, None, None]
    write_video(path, (np.broadcast_to(np.asarray(colour, float), (frames, size, size, 3)) * ramp).astype(np.uint8))


def data_set(root: Path, train=6, val=4, test=0, labelled_test=False) -> Path:
    "A folder in the TaobaoVD-GC layout: two clips of each prompt, labels that follow from their colours."
    rng, k = np.random.default_rng(0), 0
    for split, count in (("train", train), ("val", val), ("test", test)):
        if not count: continue
        videos, file = root/split/"videos", root/split/("" if split == "test" else "labels")/f"{split}_labels.csv"
        videos.mkdir(parents=True); file.parent.mkdir(exist_ok=True)
        label = split != "test" or labelled_test
        rows = [",".join(COLUMNS if label else COLUMNS[:2])]
        for i in range(count):
            for g in "AB":
                colour = rng.integers(0, 256, 3)
                clip(videos/f"{g}_{k:03}.mp4", colour)
                mos = 1 + 4 * np.array([*colour, colour.mean(), colour.max()]) / 255
                prompt = PROMPTS[i % len(PROMPTS)] + (f", {split} scene {i}" if split != "train" or i >= len(PROMPTS) else "")
                rows.append(f'{g}_{k:03}.mp4,"{prompt}"' + "".join(f",{m:.2f}" for m in mos) * label)
                k += 1
        file.write_text("\n".join(rows) + "\n")
    return root


def settings(**kw) -> TrainConfig:
    return TrainConfig(**{**dict(epochs=3, batch_size=4, accumulation=1, lr=1e-3, warmup_steps=2, tracker="none", device="cpu"), **kw})


def train(root: Path, folder: Path, stop_after=None, resume=True, **kw) -> dict:
    "Trains the tiny model; the checkpoint lies in FOLDER/out."
    task = Task(root, folder/"out", folder/"runs", root.parent/"cache", trained_on="simulated labels (tiny)")
    return train_model(task, CONFIG, settings(**kw), stop_after=stop_after, resume=resume, progress=False)


def checkpoint(folder: Path, trained_on="simulated labels (tiny)") -> Path:
    "A checkpoint with random weights."
    torch.manual_seed(0)
    save_checkpoint(folder, DoverPlusPlus(CONFIG), dict(model="dover++", config=asdict(CONFIG), sampling=asdict(Sampling(CONFIG.frames, CONFIG.size)),
                                                        text_encoder="minilm", trained_on=trained_on, licence="MIT"))
    return folder
