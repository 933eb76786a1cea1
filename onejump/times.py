"""Where on the path to train: grids, distributions of t, curricula. Pure functions of (step, steps) and the generator.

Times are noise levels. Distributions and grids are float64; a method casts what it draws to the precision of its x0.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onejump.types import Grid, Times


def karras_grid(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Grid:
    """n ascending times from sigma_min to sigma_max, even in t^(1/rho) (Karras et al. 2022, eq. 5)."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64, device=device)
    grid = (sigma_min ** (1 / rho) + ramp * (sigma_max ** (1 / rho) - sigma_min ** (1 / rho))) ** rho
    grid[0], grid[-1] = sigma_min, sigma_max
    return grid


def ict_levels(step: int, steps: int, s0: int, s1: int) -> int:
    """iCT's number of grid times N(k) = min(s0 2^floor(k/K'), s1) + 1, K' = floor(K / (log2 floor(s1/s0) + 1)).

    Song & Dhariwal 2024, eq. 17: the number of intervals doubles from s0 to s1 in equal parts of the run.
    """
    K_prime = max(math.floor(steps / (math.log2(s1 // s0) + 1)), 1)
    return min(s0 * 2 ** (step // K_prime), s1) + 1


def lognormal_pmf(grid: Grid, P_mean: float, P_std: float) -> Tensor:
    """Mass of a lognormal on each interval [t_i, t_{i+1}] of the grid, normalised (Song & Dhariwal 2024, eq. 10)."""
    cdf = torch.erf((grid.log() - P_mean) / (math.sqrt(2) * P_std))
    return cdf.diff() / (cdf[-1] - cdf[0])


def lognormal_index(grid: Grid, n: int, P_mean: float, P_std: float) -> Tensor:
    """n indices i with probability lognormal_pmf: the pair of times is (t_i, t_{i+1})."""
    return torch.multinomial(lognormal_pmf(grid, P_mean, P_std), n, replacement=True)


@dataclass(frozen=True)
class LogNormal:
    """ln t ~ N(P_mean, P_std^2), conditioned on low <= t <= high."""

    P_mean: float = -1.1
    P_std: float = 2.0

    def quantile(self, u: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
        """The time below which the share u (float64, in [0, 1]) of the mass lies."""
        a, b = (self._cdf(t) for t in (low, high))
        return torch.exp(self.P_mean + self.P_std * torch.special.ndtri(a + (b - a) * u))

    def _cdf(self, t: float) -> float:
        return 0.0 if t == 0 else 0.5 * math.erfc((self.P_mean - math.log(t)) / (self.P_std * math.sqrt(2)))

    def __call__(self, n: int, device: torch.device, low: float = 0.0, high: float = math.inf) -> Times:
        return self.quantile(torch.rand(n, dtype=torch.float64, device=device), low, high)


@dataclass(frozen=True)
class LogStudentT:
    """ln t = mu + sigma X with X Student-t of df degrees of freedom, conditioned on low <= t <= high.

    TCM's psi_t for stage 2 (Lee et al. 2025): mu 0, sigma 0.2, df 0.01 on [t', T]: a quarter of the mass within 5 % of
    t', and a tail that is nearly uniform in ln t.
    """

    mu: float = 0.0
    sigma: float = 0.2
    df: float = 0.01

    def quantile(self, u: Tensor, low: float, high: float) -> Tensor:
        """The time below which the share u (float64, in [0, 1]) of the mass lies: cubic Hermite on the exact table."""
        table = _student_t_table(self.df, *((math.log(t) - self.mu) / self.sigma for t in (low, high)))
        x, slope = (torch.from_numpy(column).to(u.device) for column in table)
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

    def __call__(self, n: int, device: torch.device, low: float, high: float) -> Times:
        return self.quantile(torch.rand(n, dtype=torch.float64, device=device), low, high)


TimeDistribution = LogNormal | LogStudentT


@functools.lru_cache(maxsize=8)
def _student_t_table(df: float, low: float, high: float, cells: int = 8192) -> tuple[np.ndarray, np.ndarray]:
    """F^-1(u) and its slope a cell, at u even between F(low) and F(high): float64, from scipy's exact inverse."""
    from scipy import stats

    student = stats.t(df)
    u = np.linspace(student.cdf(low), student.cdf(high), cells + 1)
    x = student.ppf(u)
    x[0], x[-1] = low, high
    return x, (u[1] - u[0]) / student.pdf(x)


@dataclass(frozen=True)
class Discretisation:
    """How far apart the two times of a pair are: r = t - Delta_t, shrinking by q every `double_every` steps.

    Delta_t = (1 + k sigmoid(-b t)) (1 - ratio) t,   ratio = 1 - q^-(floor(step / double_every) + 1)
    (Geng et al. 2024; Lee et al. 2025 write the exponent as ceil(i / 25000) with i counted from 1.)
    ratio_limit: TCM's floor on Delta_t: 0.999 on CIFAR-10, 0.9961 on ImageNet-64; 1 is ECT, no floor.
    r_min: r is never below it. 0 is ECT, where the target at r = 0 is the data itself; the released TCM has 1e-6.
    """

    q: float = 2.0
    double_every: int = 25_000
    ratio_limit: float = 1.0
    k: float = 8.0
    b: float = 1.0
    r_min: float = 0.0

    def ratio(self, step: int) -> float:
        return min(1 - self.q ** -(step // self.double_every + 1.0), self.ratio_limit)

    def r(self, t: Times, step: int) -> Times:
        delta = (1 + self.k * torch.sigmoid(-self.b * t)) * (1 - self.ratio(step)) * t
        return (t - delta).clamp_min(self.r_min)
