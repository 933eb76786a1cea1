"""Small U-Nets with weights that anyone can rebuild, their inputs, and golden numbers."""

import math
import zlib
from pathlib import Path

import numpy as np
import torch

from onejump.networks import SongUNetConfig

GOLDEN = Path(__file__).parent.parent / "golden"
DIGITS = SongUNetConfig(8, 1, 10, 32, (1, 2), 1, (4,), dropout=0.3)


def golden(name):
    return {k: torch.as_tensor(v) if v.dtype.kind == "f" else v for k, v in np.load(GOLDEN / name).items()}


def recipe(name, shape):
    """The golden networks' weights: pseudo-random numbers seeded by the parameter's name."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    if len(shape) == 1:
        w = name.endswith(".weight") + 0.1 * rng.standard_normal(shape)
    else:
        w = rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
    return torch.tensor(np.round(w * 4096) / 4096, dtype=torch.float32)


def with_recipe_weights(net):
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(recipe(name, p.shape))
    return net


def lively(config=DIGITS, dtype=torch.float64):
    """A network whose last layers are not near zero."""
    return with_recipe_weights(config.build()).to(dtype)


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def batch(n, config=DIGITS, dtype=torch.float64):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, config.img_channels, config.img_resolution, config.img_resolution, generator=g, dtype=dtype)
    return x, torch.randn(n, generator=g, dtype=dtype), torch.randint(config.label_dim, (n,), generator=g)
