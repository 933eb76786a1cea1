"""Optimisers and learning-rate laws. `rate(step, progress)`: steps gone before, and the share of this stage."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ConstantRate:
    """The same rate throughout, after a linear warm-up over `rampup` steps."""

    lr: float = 1e-4
    rampup: int = 0

    def rate(self, step: int, progress: float) -> float:
        return self.lr * min(step / self.rampup, 1) if self.rampup else self.lr


@dataclass(frozen=True)
class InverseSqrtRate:
    """EDM2's law alpha_ref / sqrt(max(step / t_ref, 1)) (Karras et al. 2024, eq. 67), after a linear warm-up."""

    lr: float = 1e-3
    t_ref: float = 2000
    rampup: int = 0

    def rate(self, step: int, progress: float) -> float:
        lr = self.lr / math.sqrt(max(step / self.t_ref, 1)) if self.t_ref else self.lr
        return lr * min(step / self.rampup, 1) if self.rampup else lr


@dataclass(frozen=True)
class CosineRate:
    """From lr to 0 along half a cosine over the stage: for short runs that must end settled."""

    lr: float = 1e-3

    def rate(self, step: int, progress: float) -> float:
        return self.lr * (1 + math.cos(math.pi * progress)) / 2


Rate = ConstantRate | InverseSqrtRate | CosineRate


@dataclass(frozen=True)
class RAdam:
    """Rectified Adam: CM, iCT, ECT, TCM on CIFAR-10."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.RAdam(parameters, lr=0.0, betas=self.betas, eps=self.eps)


@dataclass(frozen=True)
class Adam:
    """Adam: EDM; EDM2, ECT and TCM on ImageNet-64 with betas (0.9, 0.99)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.0, betas=self.betas, eps=self.eps)


Optimizer = RAdam | Adam
