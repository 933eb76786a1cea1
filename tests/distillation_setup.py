"""Analytic networks, exact solutions and recorded draws for the tests of CT, CD, CTM and their samplers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from onejump.model import ConsistencyModel, per_sample
from onejump.precond import CM, EDM, Euler, Scalings

EPS, C = 0.002, 0.5  # where jumps end; the deviation of Gaussian data


class Sine(nn.Module):
    """F = sin(a x) + b cos(ln t) + c sin(ln s): the network of the published codes' golden numbers."""

    def __init__(self, a: float, b: float = 0.0, c: float = 0.0):
        super().__init__()
        self.a, self.b, self.c = a, b, c

    def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
        F = torch.sin(self.a * x) + self.b * torch.cos(per_sample(4 * c_noise, x))
        return F if c_noise_s is None else F + self.c * torch.sin(per_sample(4 * c_noise_s, x))


class Is(nn.Module):
    """F = D(x, t), a function of the unscaled x: with NoScaling."""

    def __init__(self, D: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.D = D

    def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
        return self.D(x, per_sample((4 * c_noise).exp(), x))


@dataclass(frozen=True)
class NoScaling:
    def __call__(self, t):
        return Scalings(torch.zeros_like(t), torch.ones_like(t), torch.ones_like(t), EDM()(t).c_noise)


def wavy(x, t):
    """The denoiser of the published samplers' golden numbers."""
    return 0.25 * x / (t**2 + 0.25) + 0.1 * torch.sin(x) * t / (1 + t**2)


def shrink(t: Tensor, s: Tensor, c: float | Tensor = C) -> Tensor:
    """The exact jump of data N(0, c^2) is x(s) = shrink(t, s) x(t)."""
    return ((c**2 + s**2) / (c**2 + t**2)).sqrt()


def flow(denoise, x, t, r):
    """The solver that makes no error, for data N(0, C^2)."""
    return per_sample(shrink(t, r), x) * x


class Exact(nn.Module):
    """The F with which model(x, t, s) = shrink(t, s, theta) x, through EDM's preconditioning and this jump.

    theta = C is the exact solution. For s = t, where the jump says nothing of D, it is the denoiser of N(0, theta^2).
    """

    def __init__(self, jump, theta: float = C):
        super().__init__()
        self.jump, self.theta = jump, nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.last_weight = self.theta

    def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
        t = (4 * c_noise).exp()
        s = torch.full_like(t, EPS) if c_noise_s is None else (4 * c_noise_s).exp()
        a, b = self.jump(t, s)
        far = t - s > 1e-9 * t
        D = torch.where(far, (shrink(t, s, self.theta) - a) / torch.where(far, b, 1.0), self.denoiser(t))
        c_skip, c_out, c_in, _ = EDM()(t)
        return per_sample((D - c_skip) / (c_out * c_in), x) * x

    def denoiser(self, t):
        return self.theta**2 / (self.theta**2 + t**2)


class GaussianTeacher(Exact):
    """The denoiser of N(0, C^2)."""

    def __init__(self):
        super().__init__(CM())

    def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
        t = (4 * c_noise).exp()
        c_skip, c_out, c_in, _ = EDM()(t)
        return per_sample((self.denoiser(t) - c_skip) / (c_out * c_in), x) * x


def teacher() -> ConsistencyModel:
    return ConsistencyModel(GaussianTeacher())


def exact_cm(theta: float = C) -> ConsistencyModel:
    return ConsistencyModel(Exact(CM(), theta), jump=CM())


def exact_ctm(theta: float = C) -> ConsistencyModel:
    return ConsistencyModel(Exact(Euler(), theta), jump=Euler(), second_time=True)


def gaussian(n: int, shape: tuple[int, ...] = (5,), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return C * torch.randn(n, *shape, dtype=torch.float64, generator=generator)


@dataclass
class Replay:
    """Makes torch return recorded numbers. Dropout keys, which are drawn below 2^62, stay random."""

    patch: pytest.MonkeyPatch
    uniforms: list[Tensor] = field(default_factory=list)

    def index(self, i: Tensor) -> None:
        drawn = torch.randint
        self.patch.setattr(torch, "randint", lambda *a, **k: drawn(*a, **k) if a[0] == 2**62 else i)

    def noise(self, *eps: Tensor) -> None:
        """One a call; the last goes on."""
        left = list(eps)
        self.patch.setattr(torch, "randn_like", lambda x: (left.pop(0) if left[1:] else left[0]).to(x.dtype))

    def uniform(self, *u: Tensor) -> None:
        left = list(u)
        self.patch.setattr(torch, "rand", lambda *a, **k: left.pop(0) if left[1:] else left[0])

    def ctm_times(self, t: Tensor, s: Tensor, k: int) -> None:
        """Indices of t and s on the ascending grid, and the number of solver steps."""
        self.index(t)
        self.uniform((s + 0.5) / (t - k + 1))
        self.patch.setattr("onejump.methods.ctm.random_steps", lambda step, most: k)


def order(errors: list[float]) -> list[float]:
    """log2 of the ratios of errors at halved steps."""
    return [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
