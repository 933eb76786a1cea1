"""Averages of the weights, for evaluation. `decay(n)` is the share kept at update n, counted from 1."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


NEGLIGIBLE = 1e-9  # weights of snapshots below it change no float32; those files are not read
MIN_SIGMA_REL, MAX_SIGMA_REL = 0.001, 12**-0.5  # the latter of gamma = 0, which weighs all steps alike


def check_sigma_rel(name: str, value: float) -> None:
    """Raises UserError unless there is a rising power function of this relative width."""
    if not MIN_SIGMA_REL <= value <= MAX_SIGMA_REL:
        raise UserError(f"{name}: {value:.15g}; a share of training is needed, {MIN_SIGMA_REL} to {MAX_SIGMA_REL:.3f}")


@dataclass(frozen=True)
class Snapshots:
    """Power-function EMAs that are saved along a stage; afterwards they give one of any width.

    Karras et al. 2024, section 3.2. sigma_rels: their relative widths. count: how many times they are saved, evenly
    over the stage.
    """

    sigma_rels: tuple[float, ...] = (0.05, 0.1)
    count: int = 20

    def __post_init__(self) -> None:
        if not self.sigma_rels or len(set(self.sigma_rels)) < len(self.sigma_rels):
            raise UserError(f"sigma_rels: {self.sigma_rels}; one or more different widths are needed, such as 0.05,0.1")
        for width in self.sigma_rels:
            check_sigma_rel("sigma_rels", width)
        if self.count < 1:
            raise UserError(f"count: {self.count}; 1 (at the end alone) or more is needed")

    def due(self, step: int, first_step: int, last_step: int) -> bool:
        """Whether they are saved after this step; the last step is always one."""
        done, steps = step - first_step, last_step - first_step
        return done > 0 and done * self.count // steps > (done - 1) * self.count // steps


@dataclass(frozen=True)
class Profile:
    """p(tau) = (gamma + 1) tau^gamma / step^(gamma + 1) on 0 to step: the weights of an EMA of this relative width.

    It is exact for the updates of PowerEMA, which give theta_k the integral of p from k - 1 to k.
    """

    step: int
    sigma_rel: float

    def share(self, first_step: int) -> float:
        """Of the weights that the stage began with."""
        return (first_step / self.step) ** (gamma_of(self.sigma_rel) + 1)


@dataclass(frozen=True)
class Mix:
    """How a profile is made: a weight for each snapshot, their sum 1; and its relative error in the L2 norm."""

    wanted: Profile
    weights: tuple[float, ...]
    error: float


def overlaps(a: Sequence[Profile], b: Sequence[Profile], first_step: int = 0) -> np.ndarray:
    """Inner products [len(a), len(b)] of profiles as functions of tau.

    What they do before first_step only matters in sum, theta being constant there: they are replaced by their mean.
    """
    ta, tb = (np.array([p.step for p in ps], np.float64) for ps in (a, b))
    ga, gb = (np.array([gamma_of(p.sigma_rel) for p in ps], np.float64) for ps in (a, b))
    ta, ga = ta[:, None], ga[:, None]
    end, power = np.minimum(ta, tb), ga + gb + 1
    scale = (end / ta) ** (ga + 1) * (end / tb) ** (gb + 1) / end
    after = (ga + 1) * (gb + 1) / power * (1 - (first_step / end) ** power)
    before = (first_step / end) ** power
    return scale * (after + before)


def mix(have: Sequence[Profile], wanted: Profile, first_step: int = 0) -> Mix:
    """The combination of the profiles up to wanted.step that comes nearest, scaled to the sum 1 as published."""
    used = [i for i, profile in enumerate(have) if profile.step <= wanted.step]
    assert used, "the caller takes a step of theirs"
    weights = np.zeros(len(have))
    if wanted in have:
        weights[have.index(wanted)] = 1
        return Mix(wanted, tuple(weights.tolist()), 0.0)
    basis = [have[i] for i in used]
    gram, target = overlaps(basis, basis, first_step), overlaps(basis, [wanted], first_step)[:, 0]
    size = np.sqrt(np.diag(gram))
    x = np.linalg.lstsq(gram / np.outer(size, size), target / size, rcond=1e-15)[0] / size
    x /= x.sum()
    norm = overlaps([wanted], [wanted], first_step).item()
    error = math.sqrt(max(norm - 2 * x @ target + x @ gram @ x, 0) / norm)
    weights[used] = np.where(np.abs(x) < NEGLIGIBLE, 0, x)
    return Mix(wanted, tuple(weights.tolist()), error)
