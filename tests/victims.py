"Files whose names say what they do to their decoder; in a module of its own, since other processes import it."
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch

CRASHES = {"segv": signal.SIGSEGV, "kill": signal.SIGKILL}


def decode(path):
    "A view of the file, or what its name asks for."
    what = Path(path).name.split(".")[0]
    if what == "hang": time.sleep(1e6)
    if what in CRASHES: os.kill(os.getpid(), CRASHES[what])
    if what == "odd": raise ZeroDivisionError("odd")
    held = []
    while what == "eat": held.append(np.ones(2 ** 21))
    return torch.full((1, 2), len(what)), what


class Victim:
    "Scores a file by the length of its name, as far as it can be decoded."
    name, columns, settings, apart = "victim", ("overall",), {"seed": 0}, None

    def decoder(self): return decode
    def prepare(self, path): return (self.apart or self.decoder())(path)
    def rate(self, views, prompt): return {"overall": float(views[0][0, 0])}
