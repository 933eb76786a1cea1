"""Golden numbers, and the analytic network they were computed with."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from onejump.model import ConsistencyModel
from onejump.precond import EDM, Scalings


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def f32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array)).float()


def f64(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array)).double()


@dataclass(frozen=True)
class NoInputScaling:
    """EDM's skip and out, with the network reading the unscaled x: that is how the analytic network is written."""

    def __call__(self, t):
        c_skip, c_out, _, c_noise = EDM()(t)
        return Scalings(c_skip, c_out, torch.ones_like(t), c_noise)


class SineNet(nn.Module):
    """F(x) = sin(a x). Notes how many rows each call had."""

    def __init__(self, a: float = 3.0):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.rows: list[int] = []

    def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
        self.rows.append(len(x))
        return torch.sin(self.a * x)


def sine_model(a: float = 3.0) -> ConsistencyModel:
    return ConsistencyModel(SineNet(a), NoInputScaling())
