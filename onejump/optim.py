"""Optimisers and learning-rate laws.

`rate(step, progress)`: the steps gone before, and the share of this stage that is done. Steps are those of the chain's
counter: in a stage that counts on, a warm-up has passed already.
"""

import math
from dataclasses import dataclass

from onejump.types import UserError


def _check(lr: float, rampup: int = 0, t_ref: float = 0) -> None:
    if not 0 < lr < math.inf:
        raise UserError(f"lr: {lr:g}; a rate above 0 is needed, such as 1e-4")
    if rampup < 0:
        raise UserError(f"rampup: {rampup}; 0 (none) or more steps are needed")
    if not 0 <= t_ref < math.inf:
        raise UserError(f"t_ref: {t_ref:g}; 0 (a constant rate) or more steps are needed")


def _check_adam(betas: tuple[float, float], eps: float) -> None:
    if not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"betas: {betas[0]:.15g},{betas[1]:.15g}; each must be 0 or more and less than 1")
    if not 0 <= eps < math.inf:
        raise UserError(f"eps: {eps:g}; 0 or more is needed")


@dataclass(frozen=True)
class ConstantRate:
    """The same rate throughout, after a linear warm-up over `rampup` steps."""

    lr: float = 1e-4
    rampup: int = 0

    def __post_init__(self) -> None:
        _check(self.lr, self.rampup)

    def rate(self, step: int, progress: float) -> float:
        return self.lr * min(step / self.rampup, 1) if self.rampup else self.lr


@dataclass(frozen=True)
class InverseSqrtRate:
    """EDM2's law alpha_ref / sqrt(max(step / t_ref, 1)) (Karras et al. 2024, eq. 67), after a linear warm-up."""

    lr: float = 1e-3
    t_ref: float = 2000
    rampup: int = 0

    def __post_init__(self) -> None:
        _check(self.lr, self.rampup, self.t_ref)

    def rate(self, step: int, progress: float) -> float:
        lr = self.lr / math.sqrt(max(step / self.t_ref, 1)) if self.t_ref else self.lr
        return lr * min(step / self.rampup, 1) if self.rampup else lr


@dataclass(frozen=True)
class CosineRate:
    """From lr to 0 along half a cosine over the stage: for short runs that must end settled."""

    lr: float = 1e-3

    def __post_init__(self) -> None:
        _check(self.lr)

    def rate(self, step: int, progress: float) -> float:
        return self.lr * (1 + math.cos(math.pi * progress)) / 2


Rate = ConstantRate | InverseSqrtRate | CosineRate


@dataclass(frozen=True)
class RAdam:
    """Rectified Adam: CM, iCT, ECT, TCM on CIFAR-10."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check_adam(self.betas, self.eps)


@dataclass(frozen=True)
class Adam:
    """Adam: EDM; EDM2, ECT and TCM on ImageNet-64 with betas (0.9, 0.99)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check_adam(self.betas, self.eps)


Optimizer = RAdam | Adam
