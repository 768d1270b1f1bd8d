"Weights and inputs that are a pure function of name and shape; the parity fixtures were recorded with them; and how to compare with these."
import hashlib
import zlib
from contextlib import contextmanager

import numpy as np
import torch

FEATURE, MAP = 1e-4, 1e-5       # absolute tolerances: features, score maps and scores


def normals(seed: int, shape) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape))


def weight(name: str, shape) -> torch.Tensor:
    "One tensor of a state dict."
    n, last = normals(zlib.crc32(name.encode()), shape), name.split(".")[-1]
    if last == "gamma": n = 0.3 + 0.1 * n                                        # layer scale
    elif last.endswith("bias_table"): n = 0.5 * n                                # position bias
    elif last == "weight" and len(shape) == 1: n = 1 + 0.1 * n                   # scale of a norm
    elif len(shape) <= 1 or last == "beta" or last.endswith("bias"): n = 0.1 * n
    else: n = n / np.sqrt(float(np.prod(shape[1:])))
    if name.endswith("fc_last.weight"): n = 0.2 * n                              # small scores
    return torch.from_numpy(np.asarray(n, np.float32))


def fill(module: torch.nn.Module) -> torch.nn.Module:
    "The module with these weights; whole numbers, which it computes itself, stay."
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point(): tensor.copy_(weight(name, tensor.shape))
    return module.eval()


def view(seed: int, shape) -> torch.Tensor:
    "A normalised clip."
    return torch.from_numpy(normals(seed, shape).astype(np.float32))


def clip(seed: int, shape) -> torch.Tensor:
    "Frames between 0 and 1."
    n = normals(seed, shape).astype(np.float32).astype(np.float64)
    return torch.from_numpy((1 / (1 + np.exp(-n))).astype(np.float32))


# ---- against what was recorded of the official code

def weights_sha256(module: torch.nn.Module, keys: dict) -> str:
    "Of all tensors that the formula fills, in the manifest's order."
    digest, state = hashlib.sha256(), module.state_dict()
    for k in keys["keys"]:
        if state[k].is_floating_point(): digest.update(state[k].numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def outputs_of(model, names):
    "What these submodules answer."
    got = {}
    def keep(name): return lambda module, inputs, output: got.__setitem__(name, output)
    hooks = [model.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    try: yield got
    finally:
        for h in hooks: h.remove()


def agrees(x, recorded, prefix, tolerance=FEATURE):
    "A map against its recorded shape, statistics, sixteen of its values, and the means of its channels."
    assert tuple(x.shape) == tuple(recorded[f"{prefix}/shape"]), prefix
    at = x.flatten()[torch.arange(16) * (x.numel() - 1) // 15].numpy()
    assert np.abs(at - recorded[f"{prefix}/at"]).max() < tolerance, prefix
    for name, value in (("mean", x.double().mean()), ("std", x.double().std(correction=0))):
        assert abs(value.item() - recorded[f"{prefix}/{name}"]) < tolerance, (prefix, name)
    if f"{prefix}_channel_mean" in recorded: assert np.abs(x.mean((2, 3, 4)).numpy() - recorded[f"{prefix}_channel_mean"]).max() < tolerance, prefix


def views_of(recorded, case, names):
    return {n: view(int(recorded[f"{case}/{n}/input_seed"]), recorded[f"{case}/{n}/input_shape"]) for n in names}
