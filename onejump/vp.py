"""The noise levels of variance-preserving diffusion (DDPM, Stable Diffusion).

Such a network was trained on x_vp = sqrt(abar) x0 + sqrt(1 - abar) eps at n discrete times. In our frame that is
x_vp = x_t / sqrt(1 + t^2) at the noise level t = sqrt((1 - abar) / abar).
"""

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from onejump.types import Grid, UserError

Spacing = Literal["scaled_linear", "linear"]


@dataclass(frozen=True)
class VPSchedule:
    """n noise levels from a rising variance beta a step; by default those of Stable Diffusion, 0.0292 to 14.6146.

    spacing: beta even between its ends ("linear", DDPM), or its square root ("scaled_linear", latent diffusion).
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    n: int = 1000
    spacing: Spacing = "scaled_linear"

    def __post_init__(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1:
            ends = f"{self.beta_start:g}, beta_end {self.beta_end:g}"
            raise UserError(f"beta_start: {ends}; two numbers above 0 and below 1 that do not fall are needed")
        if not 2 <= self.n <= 100_000:
            raise UserError(f"n: {self.n}; 2 to 100,000 noise levels are possible")
        if self.spacing not in get_args(Spacing):
            raise UserError(f"spacing: {self.spacing!r}; pick from {', '.join(get_args(Spacing))}")

    @property
    def sigmas(self) -> Grid:
        """Ascending, float64, on the CPU."""
        return _sigmas(self)

    @property
    def sigma_min(self) -> float:
        return self.sigmas[0].item()

    @property
    def sigma_max(self) -> float:
        return self.sigmas[-1].item()

    def nearest(self, t: Tensor) -> Tensor:
        """The number of the noise level nearest to each t, by their ratio: int64, on the device of t."""
        return torch.bucketize(t.detach().contiguous(), _middles(self, t.device, t.dtype))

    def near(self, t: float) -> float:
        """The noise level nearest to t."""
        return self.sigmas[self.nearest(torch.tensor(t, dtype=torch.float64))].item()

    def spread(self, n: int) -> Grid:
        """0 and n - 1 of the noise levels, ascending, evenly many of them apart, the highest among them."""
        if not 2 <= n <= self.n + 1:
            raise UserError(f"n: {n} times; 2 to {self.n + 1} are possible on a schedule of {self.n} noise levels")
        index = (torch.arange(1, n, dtype=torch.float64) * self.n / (n - 1)).round().long() - 1
        return torch.cat([self.sigmas.new_zeros(1), self.sigmas[index]])


@functools.lru_cache(maxsize=8)
def _sigmas(schedule: VPSchedule) -> Tensor:
    power = 2 if schedule.spacing == "scaled_linear" else 1
    first, last = (beta ** (1 / power) for beta in (schedule.beta_start, schedule.beta_end))
    abar = (1 - torch.linspace(first, last, schedule.n, dtype=torch.float64) ** power).cumprod(0)
    return ((1 - abar) / abar).sqrt()


@functools.lru_cache(maxsize=8)
def _middles(schedule: VPSchedule, device: torch.device, dtype: torch.dtype) -> Tensor:
    sigmas = schedule.sigmas
    return (sigmas[:-1] * sigmas[1:]).sqrt().to(dtype).to(device)
