"""Samplers: plain functions that call a model, and the small objects in which a model keeps its defaults."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onejump import solvers
from onejump.model import ConsistencyModel
from onejump.solvers import Solver
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
        x = model(x, x.new_full(x.shape[:1], t), cond=cond)
    return x


def refuse_below(t_min: float, times: Sequence[float]) -> None:
    """A model trained on [t', T] knows nothing below t'."""
    if min(times) < t_min:
        raise UserError(
            f"times: {min(times):g} is below t' = {t_min:g}, where this model was never trained; use {t_min:g} or more"
        )


def trajectory(
    model: ConsistencyModel, noise: Tensor, times: Sequence[float], ends: Sequence[float], cond: Cond = None
) -> Samples:
    """Jump from each time to its end, and add the noise that the next time wants (Kim et al. 2024, algorithm 2).

    noise: [len(times), b, ...]. Ends at the next time: no noise is added, the jumps follow the ODE. Ends at sigma_min:
    CM's multistep sampling. Between the two: gamma-sampling. Raises UserError unless times[i + 1] >= ends[i].
    """
    check_jumps(times, ends)
    x, last = torch.zeros_like(noise[0]), 0.0
    for eps, t, s in zip(noise, times, ends, strict=True):
        x = x + math.sqrt(t**2 - last**2) * eps
        x = model(x, x.new_full(x.shape[:1], t), x.new_full((len(x),), s), cond)
        last = s
    return x


def check_jumps(times: Sequence[float], ends: Sequence[float]) -> None:
    """Every jump goes down, and the next starts where it ended or above."""
    for t, s in zip(times, ends, strict=True):
        if not t > s:
            raise UserError(f"jumps: from {t:g} to {s:g}; a jump ends below its start (s < t)")
    for s, t in zip(ends[:-1], times[1:], strict=True):
        if t < s:
            raise UserError(f"jumps: one ends at {s:g} and the next starts at {t:g}; noise can be added, not removed")


def ode(
    model: ConsistencyModel,
    noise: Samples,
    times: Sequence[float],
    cond: Cond = None,
    solver: Solver = solvers.heun,
) -> Samples:
    """The ODE of a model's denoiser from times[0] down to times[-1], then to 0 by Euler (Karras et al. 2022, alg. 1).

    2 len(times) - 1 network calls with solvers of second order, len(times) with Euler's.
    """
    denoise = solvers.denoiser(model, cond)
    x = times[0] * noise
    ts = [x.new_full(x.shape[:1], t) for t in times]
    for t, r in zip(ts[:-1], ts[1:], strict=True):
        x = solver(denoise, x, t, r)
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

    def calls(self, steps: int) -> int:
        return steps

    def __call__(self, model: ConsistencyModel, noise: Tensor, steps: int, cond: Cond = None) -> Samples:
        return multistep(model, noise, self.times(steps), cond)


@dataclass(frozen=True)
class Trajectory:
    """A trajectory model's defaults: jumps between the nodes of a Karras grid with one node more than there are jumps.

    gamma = 0 follows the ODE, 1 goes to the data and adds noise again; between, a jump stops at sqrt(1 - gamma^2) of
    the next time (counted from sigma_min).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    gamma: float = 0.0

    def __post_init__(self) -> None:
        _check_grid(self.sigma_min, self.sigma_max, self.rho)
        check_range(at_least=0, at_most=1, gamma=self.gamma)

    def times(self, steps: int) -> list[float]:
        return self._nodes(steps)[:-1]

    def ends(self, steps: int) -> list[float]:
        *inner, last = self._nodes(steps)[1:]
        share = math.sqrt(1 - self.gamma**2)
        return [min(share * (t - self.sigma_min) + self.sigma_min, t) for t in inner] + [last]  # no rounding above t

    def _nodes(self, steps: int) -> list[float]:
        if steps < 1:
            raise UserError(f"steps: {steps}; 1 or more is needed")
        return karras_grid(steps + 1, self.sigma_min, self.sigma_max, self.rho).flip(0).tolist()

    def draws(self, steps: int) -> int:
        return steps

    def calls(self, steps: int) -> int:
        return steps

    def __call__(self, model: ConsistencyModel, noise: Tensor, steps: int, cond: Cond = None) -> Samples:
        return trajectory(model, noise, self.times(steps), self.ends(steps), cond)


@dataclass(frozen=True)
class Jumps:
    """Jumps of one's own: number i goes from start[i] to end[i]. CTM's two-jump sampling is 80,b to a,eps."""

    start: tuple[float, ...] = (80.0,)
    end: tuple[float, ...] = (0.002,)

    def __post_init__(self) -> None:
        if len(self.start) != len(self.end) or not self.start:
            raise UserError(f"end: {len(self.end)} ends for {len(self.start)} starts; one for each is needed")
        check_jumps(self.start, self.end)

    def times(self, steps: int) -> list[float]:
        if steps != len(self.start):
            raise UserError(f"steps: {steps}; these are {len(self.start)} jumps")
        return list(self.start)

    def draws(self, steps: int) -> int:
        return steps

    def calls(self, steps: int) -> int:
        return steps

    def __call__(self, model: ConsistencyModel, noise: Tensor, steps: int, cond: Cond = None) -> Samples:
        return trajectory(model, noise, self.times(steps), self.end, cond)


@dataclass(frozen=True)
class ODE:
    """A diffusion model's defaults: its ODE on the Karras grid."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    solver: Solver = solvers.heun
    steps: int = 18  # if no number is asked for; EDM's for CIFAR-10

    def __post_init__(self) -> None:
        _check_grid(self.sigma_min, self.sigma_max, self.rho)
        check_range(at_least=2, steps=self.steps)

    def times(self, steps: int) -> list[float]:
        if steps < 2:
            raise UserError(f"steps: {steps}; a diffusion model's ODE needs at least 2 (18 is usual)")
        return karras_grid(steps, self.sigma_min, self.sigma_max, self.rho).flip(0).tolist()

    def draws(self, steps: int) -> int:
        return 1

    def calls(self, steps: int) -> int:
        return steps if self.solver is solvers.euler else 2 * steps - 1

    def __call__(self, model: ConsistencyModel, noise: Tensor, steps: int, cond: Cond = None) -> Samples:
        return ode(model, noise[0], self.times(steps), cond, self.solver)


def _check_grid(sigma_min: float, sigma_max: float, rho: float) -> None:
    check_range(above=0, sigma_max=sigma_max, rho=rho)
    check_range(above=0, below=sigma_max, sigma_min=sigma_min)


Sampler = Multistep | Trajectory | Jumps | ODE
