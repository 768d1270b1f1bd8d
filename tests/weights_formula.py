"Weights and inputs that any implementation can make: a pure function of name and shape. The parity fixtures were recorded with them."
import zlib

import numpy as np
import torch


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
