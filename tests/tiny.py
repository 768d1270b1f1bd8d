"A model and a checkpoint small enough for tests, beside the toys of chapter 04: seconds to train, milliseconds to score; and a command's call."
import json
from dataclasses import asdict
from pathlib import Path

import torch
from typer.testing import CliRunner

from qualivision.cli import app
from qualivision.data.sampling import Sampling
from qualivision.models.dover_mos import DoverPlusPlus
from qualivision.models.weights import save_checkpoint
from qualivision.official.dover import Branches, QualityHead
from qualivision.official.inflated import INFLATED, InflatedConvNeXt3D
from qualivision.toy import TOY
from qualivision.training.train import Task, model_config, train_model
from qualivision.training.loop import TrainConfig

CONFIG = model_config("embedded", TOY["dover"])


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


def command(*args) -> tuple:
    "A command in this process: its status; what it said, read where it is JSON; stderr. No error of a program passes for a refusal."
    r = CliRunner().invoke(app, [*map(str, args)])
    assert r.exception is None or isinstance(r.exception, SystemExit), r.exception
    return r.exit_code, json.loads(r.stdout) if "--json" in args and r.stdout else r.stdout, r.stderr


class Mobile(Branches):
    "The form of DOVER-Mobile in a tenth of its width."
    views = ("technical", "aesthetic")

    def __init__(self, clip=None, checkpointing=False):
        super().__init__()
        form = {**INFLATED["v2-femto"], "dims": (4, 8, 16, 32), "depths": (1, 1, 1, 1), "classes": 0, "checkpointing": checkpointing}
        self.add({v: QualityHead(32, 8) for v in self.views}, **{v: InflatedConvNeXt3D(**form) for v in self.views})
