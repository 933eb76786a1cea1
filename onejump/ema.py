"""Averages of the weights, for evaluation. `decay(n)` is the share kept at update n, counted from 1."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from onejump.types import UserError


@dataclass(frozen=True)
class ConstantEMA:
    """theta_ema <- beta theta_ema + (1 - beta) theta."""

    beta: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise UserError(f"beta: {self.beta:.15g}; 0 or more and less than 1 is needed")

    @property
    def name(self) -> str:
        """As a saved model states it."""
        return f"constant {self.beta:.15g}"

    def decay(self, n: int) -> float:
        return self.beta


@dataclass(frozen=True)
class PowerEMA:
    """Power-function EMA, beta_n = (1 - 1/n)^(gamma + 1) (Karras et al. 2024, eq. 127).

    The profile keeps its shape relative to the length of training. gamma 6.94 (relative width 0.10) is the TCM
    paper's; its released command line has 16.97 (0.05).
    """

    gamma: float = 6.94

    def __post_init__(self) -> None:
        if not -1 < self.gamma < math.inf:
            raise UserError(f"gamma: {self.gamma:.15g}; a number above -1 is needed")

    @property
    def name(self) -> str:
        """As a saved model states it."""
        return f"power sigma_rel {sigma_rel(self.gamma):.3g}"

    def decay(self, n: int) -> float:
        return (1 - 1 / n) ** (self.gamma + 1)


EMA = ConstantEMA | PowerEMA


def sigma_rel(gamma: float) -> float:
    """Relative width of the power function t^gamma, as a share of training (Karras et al. 2024, eq. 123)."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(sigma: float) -> float:
    """The inverse of sigma_rel, the largest real root: gamma^3 + 7 gamma^2 + (16 - sigma^-2) gamma + 12 - sigma^-2."""
    return float(np.roots([1, 7, 16 - sigma**-2, 12 - sigma**-2]).real.max())


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, beta: float) -> None:
    """Parameters are averaged, buffers are left as they are."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - beta)
