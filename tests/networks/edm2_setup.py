"""Small EDM2 networks with weights that anyone can rebuild."""

import math
import zlib

import numpy as np
import torch
from network_setup import recipe as recipe_of_two_or_more

from onejump.networks import EDM2UNetConfig

TINY = EDM2UNetConfig(8, 1, 10, 8, (1, 2), 1, (4,), channels_per_head=8, dropout=0.3, dropout_resolution=0)
GOLDEN_CONFIG = EDM2UNetConfig(16, 3, 10, 16, (1, 2), 1, (8,), channels_per_head=16)


def recipe(name, shape):
    """The golden networks' weights, also for scalars and Fourier features."""
    rng, leaf = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF), name.split(".")[-1]
    if leaf == "freqs":
        return torch.tensor(2 * math.pi * rng.standard_normal(shape)).float()
    if leaf == "phases":
        return torch.tensor(2 * math.pi * rng.random_sample(shape)).float()
    if len(shape) == 0:
        return torch.tensor(np.round((0.5 + 0.1 * rng.standard_normal()) * 4096) / 4096).float()
    return recipe_of_two_or_more(name, shape)


def with_golden_weights(module, prefix=""):
    module.load_state_dict({name: recipe(prefix + name, v.shape) for name, v in module.state_dict().items()})
    return module


def lively(config=TINY, dtype=torch.float64):
    """A network whose gains are not zero."""
    return with_golden_weights(config.build()).to(dtype)
