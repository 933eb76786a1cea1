"""Where on the path to train: grids, distributions of t, curricula. Pure functions of (step, steps) and the generator.

Times are noise levels. Distributions and grids are float64, on the CPU; a method casts what it draws to the precision
of its x0.
"""

import functools
import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onejump import draws
from onejump.types import Grid, Times, UserError
from onejump.vp import VPSchedule


def check_range(
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    **values: float,
) -> None:
    """Raises UserError for the first value outside these bounds or, as all must be, not finite."""
    for name, value in values.items():
        if not (at_least <= value <= at_most and above < value < below):
            bounds = {"{} or more": at_least, "more than {}": above, "{} or less": at_most, "less than {}": below}
            needed = [words.format(_exact(bound)) for words, bound in bounds.items() if math.isfinite(bound)]
            text = " and ".join(needed) if abs(value) < math.inf else "a finite number"
            raise UserError(f"{name}: {_exact(value)}; {text} is needed")


def _exact(value: float) -> str:
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def karras_grid(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Grid:
    """n ascending times from sigma_min to sigma_max, even in t^(1/rho) (Karras et al. 2022, eq. 5)."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    grid = (sigma_min ** (1 / rho) + ramp * (sigma_max ** (1 / rho) - sigma_min ** (1 / rho))) ** rho
    grid[0], grid[-1] = sigma_min, sigma_max
    return grid


def ict_levels(step: int, steps: int, s0: int, s1: int) -> int:
    """iCT's number of grid times N(k) = min(s0 2^floor(k/K'), s1) + 1, K' = floor(K / (log2 floor(s1/s0) + 1)).

    Song & Dhariwal 2024, eq. 17: the number of intervals doubles from s0 to s1 in equal parts of the run.
    """
    K_prime = max(math.floor(steps / (math.log2(s1 // s0) + 1)), 1)
    return min(s0 * 2 ** (step // K_prime), s1) + 1


def ct_levels(step: int, steps: int, s0: int, s1: int) -> int:
    """CT's number of grid times N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 (Song et al. 2023)."""
    return max(math.ceil(math.sqrt(step / steps * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1), 1) + 1


def ct_decay(levels: int, s0: int, mu0: float) -> float:
    """CT's share of the target kept a step, mu(k) = exp(s0 ln(mu0) / (N(k) - 1)).

    The paper writes N(k); both published codes divide by N(k) - 1, the number of intervals, and so do we.
    """
    return math.exp(s0 * math.log(mu0) / (levels - 1))


def random_steps(step: int, most: int) -> int:
    """CTM's number k of solver steps for this optimiser step: 1 to `most`, with probability proportional to k.

    A function of `step` alone: the samples of a batch, on all processes, share it (Kim et al. 2024, app. D).
    """
    return random.Random(step).choices(range(1, most + 1), weights=range(1, most + 1))[0]


def lognormal_pmf(grid: Grid, P_mean: float, P_std: float) -> Tensor:
    """Mass of a lognormal on each interval [t_i, t_{i+1}] of the grid, normalised (Song & Dhariwal 2024, eq. 10)."""
    cdf = torch.erf((grid.log() - P_mean) / (math.sqrt(2) * P_std))
    return cdf.diff() / (cdf[-1] - cdf[0])


def lognormal_index(grid: Grid, n: int, P_mean: float, P_std: float) -> Tensor:
    """n indices i with probability lognormal_pmf: the pair of times is (t_i, t_{i+1})."""
    return draws.categories(lognormal_pmf(grid, P_mean, P_std), n)


@dataclass(frozen=True)
class LogNormal:
    """ln t ~ N(P_mean, P_std^2), conditioned on low <= t <= high."""

    P_mean: float = -1.1
    P_std: float = 2.0

    def __post_init__(self) -> None:
        check_range(P_mean=self.P_mean)
        check_range(above=0, P_std=self.P_std)

    def quantile(self, u: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
        """The time below which the share u (float64, in [0, 1]) of the mass lies."""
        a, b = (self._cdf(t) for t in (low, high))
        return torch.exp(self.P_mean + self.P_std * torch.special.ndtri(a + (b - a) * u))

    def _cdf(self, t: float) -> float:
        return 0.0 if t == 0 else 0.5 * math.erfc((self.P_mean - math.log(t)) / (self.P_std * math.sqrt(2)))

    def __call__(self, n: int, low: float = 0.0, high: float = math.inf) -> Times:
        return self.quantile(draws.uniform(n), low, high)


@dataclass(frozen=True)
class KarrasUniform:
    """t^(1/rho) uniform between its values at sigma_min and sigma_max: Karras' grid in continuous time."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_range(above=0, rho=self.rho, sigma_min=self.sigma_min)
        check_range(above=self.sigma_min, sigma_max=self.sigma_max)

    def quantile(self, u: Tensor) -> Tensor:
        first, last = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (first + u * (last - first)) ** self.rho

    def __call__(self, n: int) -> Times:
        return self.quantile(draws.uniform(n))


@dataclass(frozen=True)
class HalfLogNormal:
    """CTM's times for its denoising loss: half of the samples lognormal, the others even over the top of Karras' grid.

    t^(1/rho) of these is uniform over the share `top` of its range that ends at sigma_max.
    """

    lognormal: LogNormal = LogNormal(P_mean=-1.2, P_std=1.2)
    karras: KarrasUniform = KarrasUniform()
    top: float = 0.7

    def __post_init__(self) -> None:
        check_range(above=0, at_most=1, top=self.top)

    def __call__(self, n: int) -> Times:
        u, (place, total) = draws.uniform(n), draws.places(n)
        return torch.where(place < total // 2, self.lognormal.quantile(u), self.karras.quantile(1 - self.top * u))


@dataclass(frozen=True)
class LogStudentT:
    """ln t = mu + sigma X with X Student-t of df degrees of freedom, conditioned on low <= t <= high.

    TCM's psi_t for stage 2 (Lee et al. 2025): mu 0, sigma 0.2, df 0.01 on [t', T]: a quarter of the mass within 5 % of
    t', and a tail that is nearly uniform in ln t.
    """

    mu: float = 0.0
    sigma: float = 0.2
    df: float = 0.01

    def __post_init__(self) -> None:
        check_range(mu=self.mu)
        check_range(above=0, sigma=self.sigma, df=self.df)

    def quantile(self, u: Tensor, low: float, high: float) -> Tensor:
        """The time below which the share u (float64, in [0, 1]) of the mass lies: cubic Hermite on the exact table."""
        a, b = ((math.log(t) - self.mu) / self.sigma for t in (low, high))
        x, slope = _student_t_table(self.df, a, b)
        cells = len(x) - 1
        i = (u * cells).long().clamp(0, cells - 1)
        h = u * cells - i
        X = (
            (1 + 2 * h) * (1 - h) ** 2 * x[i]
            + h * (1 - h) ** 2 * slope[i]
            + h**2 * (3 - 2 * h) * x[i + 1]
            + h**2 * (h - 1) * slope[i + 1]
        )
        return torch.exp(self.mu + self.sigma * X).clamp(low, high)

    def __call__(self, n: int, low: float, high: float) -> Times:
        return self.quantile(draws.uniform(n), low, high)


@dataclass(frozen=True)
class AtLevels:
    """A distribution of times, each moved to the nearest noise level of a schedule that lies in the range asked for."""

    times: LogNormal | LogStudentT
    schedule: VPSchedule = VPSchedule()

    def __call__(self, n: int, low: float = 0.0, high: float = math.inf) -> Times:
        sigmas = self.schedule.sigmas
        sigmas = sigmas[(sigmas >= low * (1 - 1e-9)) & (sigmas <= high * (1 + 1e-9))]
        if not len(sigmas):
            raise UserError(f"times: no noise level of the schedule lies in [{low:g}, {high:g}]; widen the range")
        t = self.times(n, max(low, self.schedule.sigma_min), min(high, self.schedule.sigma_max))
        return sigmas[torch.bucketize(t, (sigmas[:-1] * sigmas[1:]).sqrt())]


TimeDistribution = LogNormal | LogStudentT | AtLevels


@functools.lru_cache(maxsize=8)
def _student_t_table(df: float, low: float, high: float, cells: int = 8192) -> tuple[Tensor, Tensor]:
    """F^-1 and its slope a cell, at even shares of the mass between low and high: float64, from scipy's exact inverse.

    The shares are 1 - F, whose digits do not run out in the upper tail; by symmetry the lower tail is one too. A slope
    is at most 3 times those of the chords beside it, so that the cubic between the nodes rises (Fritsch & Carlson
    1980); it bites in the last cell of a light tail alone. Raises UserError if there is no mass.
    """
    from scipy import stats

    if low + high < 0:
        x, slope = _student_t_table(df, -high, -low, cells)
        return -x.flip(0), slope.flip(0)
    student = stats.t(df)
    share = np.linspace(student.sf(low), student.sf(high), cells + 1)
    if not share[0] > share[-1]:
        raise UserError(
            f"times: no mass {low:g} to {high:g} sigma from mu, with df={df:g}; use a nearer mu or a larger sigma"
        )
    nodes = student.isf(share)
    nodes[0], nodes[-1] = low, high
    with np.errstate(divide="ignore", over="ignore"):
        slopes = (share[0] - share[-1]) / cells / student.pdf(nodes)
    chord = np.diff(nodes)
    slopes = np.minimum(slopes, 3 * np.minimum(np.append(chord, math.inf), np.append(math.inf, chord)))
    return torch.from_numpy(nodes), torch.from_numpy(slopes)


@dataclass(frozen=True)
class Discretisation:
    """How far apart the two times of a pair are: r = t - Delta_t, shrinking by q every `double_every` steps.

    Delta_t = (1 + k sigmoid(-b t)) (1 - ratio) t,   ratio = 1 - q^-(floor(step / double_every) + 1)
    (Geng et al. 2024; Lee et al. 2025 write the exponent as ceil(i / 25000) with i counted from 1.)
    ratio_limit: TCM's floor on Delta_t: 0.999 on CIFAR-10, 0.9961 on ImageNet-64; 1 is ECT, no floor.
    r_min: r is never below it unless t is. 0 is ECT, where the target at r = 0 is the data; the released TCM has 1e-6.
    """

    q: float = 2.0
    double_every: int = 25_000
    ratio_limit: float = 1.0
    k: float = 8.0
    b: float = 1.0
    r_min: float = 0.0

    def __post_init__(self) -> None:
        check_range(above=1, q=self.q)
        check_range(at_least=1, double_every=self.double_every)
        check_range(above=0, at_most=1, ratio_limit=self.ratio_limit)
        check_range(at_least=0, k=self.k, r_min=self.r_min)
        check_range(b=self.b)

    def ratio(self, step: int) -> float:
        return min(1 - self.q ** -(step // self.double_every + 1.0), self.ratio_limit)

    def r(self, t: Times, step: int) -> Times:
        delta = (1 + self.k * torch.sigmoid(-self.b * t)) * (1 - self.ratio(step)) * t
        just_below = torch.nextafter(t, torch.zeros_like(t))  # without a floor, Delta_t ends below t's last digit
        return torch.minimum((t - delta).clamp_min(self.r_min), just_below)


@dataclass(frozen=True)
class LevelSteps:
    """A discretisation whose r is the noise level of a schedule, or 0, at or below r = t - Delta_t, and below t."""

    delta: Discretisation = Discretisation()
    schedule: VPSchedule = VPSchedule()

    def r(self, t: Times, step: int) -> Times:
        levels = torch.cat([self.schedule.sigmas.new_zeros(1), self.schedule.sigmas]).to(t)
        at_or_below = torch.bucketize(self.delta.r(t, step), levels, right=True) - 1
        return levels[torch.minimum(at_or_below, torch.bucketize(t, levels) - 1)]
