"""Preconditioning: from the network F to the denoiser D, and from D to the jump f.

D(x, t) = c_skip(t) x + c_out(t) F(c_in(t) x, c_noise(t))        Karras et al. 2022, eq. 7
f(x, t -> s) = a(t, s) x + b(t, s) D(x, t)
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch

from onejump.types import PerSample, Times, UserError
from onejump.vp import VPSchedule

Prediction = Literal["epsilon", "v_prediction"]


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
    """a(t, s), b(t, s) of the jump t -> s. sigma_min: where a jump ends for which no s is given."""

    @property
    def sigma_min(self) -> float: ...

    def __call__(self, t: Times, s: Times) -> tuple[PerSample, PerSample]: ...


@dataclass(frozen=True)
class EDM:
    """EDM's preconditioning (Karras et al. 2022, table 1)."""

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise UserError(f"sigma_data: {self.sigma_data:g}; more than 0 is needed (0.5 is usual for images)")

    def __call__(self, t: Times) -> Scalings:
        norm = (t**2 + self.sigma_data**2).sqrt()
        c_skip = self.sigma_data**2 / (t**2 + self.sigma_data**2)
        c_out = t * self.sigma_data / norm
        c_in = 1 / norm
        c_noise = t.clamp_min(1e-20).log() / 4  # finite at t = 0, where c_out = 0
        return Scalings(c_skip, c_out, c_in, c_noise)


@dataclass(frozen=True)
class StableDiffusion:
    """A network of variance-preserving diffusion, such as Stable Diffusion's, as a denoiser of x_t = x0 + t eps.

    It sees x_t / sqrt(1 + t^2) and the number of the schedule's noise level nearest to t, and gives the noise eps, then
    D = x - t F; or v = (eps - t x0) / sqrt(1 + t^2) (Salimans & Ho 2022), then D = x / (1 + t^2) - t F / sqrt(1 + t^2).
    """

    prediction: Prediction = "epsilon"
    schedule: VPSchedule = VPSchedule()
    sigma_data: ClassVar[float] = 1.0  # of scaled latents

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise UserError(f"prediction: {self.prediction!r}; {' or '.join(get_args(Prediction))} is possible")

    def __call__(self, t: Times) -> Scalings:
        c_in, c_noise = 1 / (1 + t**2).sqrt(), self.schedule.nearest(t).to(t.dtype)
        if self.prediction == "epsilon":
            return Scalings(torch.ones_like(t), -t, c_in, c_noise)
        return Scalings(c_in**2, -t * c_in, c_in, c_noise)


@dataclass(frozen=True)
class ToData:
    """Every jump ends at t = 0: f(x, t) = D(x, t). ECT, TCM, and the diffusion teacher."""

    sigma_min: ClassVar[float] = 0.0

    def __call__(self, t: Times, s: Times) -> tuple[PerSample, PerSample]:
        return torch.zeros_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class CM:
    """Every jump ends at sigma_min = eps, where f(x, eps) = x exactly. CM and iCT (Song et al. 2023, appendix C).

    The paper shifts the distance from the boundary and not the normalisation, on top of the network F:
    c_skip = sigma_data^2 / ((t - eps)^2 + sigma_data^2), c_out = sigma_data (t - eps) / sqrt(sigma_data^2 + t^2).
    As a jump from EDM's denoiser that is b = (t - eps) / t, a = c_skip - b c_skip^EDM.
    """

    sigma_min: float = 0.002
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _check(self.sigma_min)
        EDM(self.sigma_data)

    def __call__(self, t: Times, s: Times) -> tuple[PerSample, PerSample]:
        variance = self.sigma_data**2
        b = (t - self.sigma_min) / t
        return variance / ((t - self.sigma_min) ** 2 + variance) - b * variance / (t**2 + variance), b


@dataclass(frozen=True)
class Euler:
    """An Euler step of the teacher's ODE from t to s: a = s / t, b = 1 - s / t. CTM (Kim et al. 2024, eq. 9).

    With EDM's denoiser inside it is also BCM's: skip (sigma_data^2 + t s) / (sigma_data^2 + t^2).
    """

    sigma_min: float = 0.002

    def __post_init__(self) -> None:
        _check(self.sigma_min)

    def __call__(self, t: Times, s: Times) -> tuple[PerSample, PerSample]:
        return s / t, 1 - s / t


def _check(sigma_min: float) -> None:
    if not 0 < sigma_min < math.inf:
        raise UserError(f"sigma_min: {sigma_min:g}; more than 0 is needed (0.002 is usual)")
