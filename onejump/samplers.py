"""Samplers: plain functions that call a model, and the small objects in which a model keeps its defaults."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onejump import solvers
from onejump.model import ConsistencyModel
from onejump.times import check_range, karras_grid
from onejump.types import Cond, Samples, UserError


def noise_for(indices: Sequence[int], shape: tuple[int, ...], steps: int = 1, seed: int = 0) -> Tensor:
    """Noise [steps, b, *shape] for the images with these numbers.

    Image k has a counter-based generator of its own, keyed by (seed, k): its noise never depends on the batch it is
    drawn in, and the first of its draws is the same for any number of steps.
    """
    noise = np.empty((steps, len(indices), *shape), dtype=np.float32)
    for column, k in enumerate(indices):
        generator = np.random.Generator(np.random.Philox(key=[seed, k]))
        for row in range(steps):
            noise[row, column] = generator.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(noise)


def multistep(model: ConsistencyModel, noise: Tensor, times: Sequence[float], cond: Cond = None) -> Samples:
    """Jump to the data from each of the falling times, with fresh noise between (Song et al. 2023, algorithm 1).

    noise: [len(times), b, ...], one draw a jump. One time, T, is one-step sampling: f(T eps, T).
    """
    refuse_below(model.t_min, times)
    x = torch.zeros_like(noise[0])
    for eps, t in zip(noise, times, strict=True):
        x = x + t * eps
        x = model(x, x.new_full((len(x),), t), cond=cond)
    return x


def refuse_below(t_min: float, times: Sequence[float]) -> None:
    """A model trained on [t', T] knows nothing below t'."""
    if min(times) < t_min:
        raise UserError(
            f"times: {min(times):g} is below t' = {t_min:g}, where this model was never trained; use {t_min:g} or more"
        )


def heun(model: ConsistencyModel, noise: Samples, times: Sequence[float], cond: Cond = None) -> Samples:
    """The diffusion teacher's ODE from times[0] down to times[-1], then to 0 by Euler (Karras et al. 2022, alg. 1).

    2 len(times) - 1 network calls.
    """

    def denoise(x: Samples, t: Tensor) -> Samples:
        return model.denoise(x, t, cond=cond)

    x = times[0] * noise
    ts = [x.new_full((len(x),), t) for t in times]
    for t, r in zip(ts[:-1], ts[1:], strict=True):
        x = solvers.heun(denoise, x, t, r)
    return solvers.euler(denoise, x, ts[-1], torch.zeros_like(ts[-1]))


@dataclass(frozen=True)
class Multistep:
    """A consistency model's defaults: the first time, and the times of the further steps in the order of their use."""

    sigma_max: float = 80.0
    mid: tuple[float, ...] = (0.821,)

    def __post_init__(self) -> None:
        check_range(above=0, sigma_max=self.sigma_max)
        times = (self.sigma_max, *self.mid, 0.0)
        if not all(t > r for t, r in zip(times[:-1], times[1:], strict=True)):
            mid = ",".join(f"{t:.15g}" for t in self.mid)
            raise UserError(f"mid: {mid}; falling times below sigma_max={self.sigma_max:.15g} and above 0 are needed")

    @property
    def max_steps(self) -> int:
        return 1 + len(self.mid)

    def times(self, steps: int) -> list[float]:
        if not 1 <= steps <= self.max_steps:
            raise UserError(f"steps: {steps}; this model stores times for 1 to {self.max_steps} steps")
        return [self.sigma_max, *self.mid[: steps - 1]]

    def draws(self, steps: int) -> int:
        return steps

    def __call__(self, model: ConsistencyModel, noise: Tensor, steps: int, cond: Cond = None) -> Samples:
        return multistep(model, noise, self.times(steps), cond)


@dataclass(frozen=True)
class Heun:
    """A diffusion model's defaults: the Karras grid of the ODE."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_range(above=0, sigma_max=self.sigma_max, rho=self.rho)
        check_range(above=0, below=self.sigma_max, sigma_min=self.sigma_min)

    def times(self, steps: int) -> list[float]:
        if steps < 2:
            raise UserError(f"steps: {steps}; a diffusion model's ODE needs at least 2 (18 is usual)")
        return karras_grid(steps, self.sigma_min, self.sigma_max, self.rho).flip(0).tolist()

    def draws(self, steps: int) -> int:
        return 1

    def __call__(self, model: ConsistencyModel, noise: Tensor, steps: int, cond: Cond = None) -> Samples:
        return heun(model, noise[0], self.times(steps), cond)


Sampler = Multistep | Heun
