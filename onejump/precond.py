"""Preconditioning: from the network F to the denoiser D, and from D to the jump f.

D(x, t) = c_skip(t) x + c_out(t) F(c_in(t) x, c_noise(t))        Karras et al. 2022, eq. 7
f(x, t -> s) = a(t, s) x + b(t, s) D(x, t)
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from onejump.types import PerSample, Times, UserError


class Scalings(NamedTuple):
    c_skip: PerSample
    c_out: PerSample
    c_in: PerSample
    c_noise: PerSample


@runtime_checkable
class Precond(Protocol):
    def __call__(self, t: Times) -> Scalings: ...


@runtime_checkable
class Jump(Protocol):
    def __call__(self, t: Times, s: Times | None) -> tuple[PerSample, PerSample]: ...


@dataclass(frozen=True)
class EDM:
    """EDM's preconditioning (Karras et al. 2022, table 1), with the boundary shift of consistency models.

    D(x, sigma_min) = x exactly. sigma_min = 0 is EDM, ECT and TCM; 0.002 is CM, iCT and CTM's boundary (Song et al.
    2023, appendix C: only the distance from the boundary is shifted, the normalisation is not).
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise UserError(f"sigma_data: {self.sigma_data:g}; more than 0 is needed (0.5 is usual for images)")
        if not 0 <= self.sigma_min < math.inf:
            raise UserError(f"sigma_min: {self.sigma_min:g}; 0 or more is needed")

    def __call__(self, t: Times) -> Scalings:
        norm = (t**2 + self.sigma_data**2).sqrt()
        from_boundary = t - self.sigma_min
        c_skip = self.sigma_data**2 / (from_boundary**2 + self.sigma_data**2)
        c_out = from_boundary * self.sigma_data / norm
        c_in = 1 / norm
        c_noise = t.clamp_min(1e-20).log() / 4  # finite at t = 0, where c_out = 0
        return Scalings(c_skip, c_out, c_in, c_noise)


@dataclass(frozen=True)
class ToData:
    """Every jump ends at the data: f(x, t) = D(x, t). CM, iCT, ECT, TCM."""

    def __call__(self, t: Times, s: Times | None) -> tuple[PerSample, PerSample]:
        return torch.zeros_like(t), torch.ones_like(t)
