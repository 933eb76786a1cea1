"""Truncated consistency models, stage 2 (stage 1 is ECT)."""

from dataclasses import dataclass

import torch

from onejump.losses import Weight, inverse_delta, pseudo_huber
from onejump.methods.base import Nets, Stats, boundary_count, dropout_key, frozen_copy, on_rows, two_samples
from onejump.model import ConsistencyModel, beside
from onejump.times import Discretisation, LevelSteps, LogStudentT, TimeDistribution, check_range
from onejump.types import Cond, DropoutKey, Samples, Times


@dataclass(frozen=True)
class Truncated:
    """f_trunc, eq. 5: the student, and below t' the frozen stage-1 network. A sample runs through one of the two."""

    student: ConsistencyModel
    boundary: ConsistencyModel

    def __call__(self, x: Samples, t: Times, below: torch.Tensor, cond: Cond, key: DropoutKey) -> Samples:
        return on_rows(~below, self.student, on_rows(below, self.boundary, x, (t,), cond, key), (t,), cond, key)


@dataclass(frozen=True)
class TCM:
    """Truncated Consistency Models (Lee et al. 2025), algorithm 1, eq. 6: training on [t', T] alone."""

    times: TimeDistribution = LogStudentT(mu=0.0, sigma=0.2, df=0.01)
    delta: Discretisation | LevelSteps = Discretisation(q=2, ratio_limit=0.999, r_min=1e-6)
    weight: Weight = inverse_delta
    c: float = 1e-8
    t_prime: float = 1.0
    t_max: float = 80.0
    rho: float = 0.25  # the share of the batch that sits exactly at t'
    w_b: float = 0.1  # and its weight

    def __post_init__(self) -> None:
        check_range(at_least=0, c=self.c, w_b=self.w_b, t_max=self.t_max)
        check_range(above=0, below=self.t_max, t_prime=self.t_prime)

    def nets(self, student: ConsistencyModel) -> Nets:
        """The student starts as stage 1's EMA; the boundary network is the same model, frozen, its dropout on."""
        student.t_min = self.t_prime
        frozen = frozen_copy(student)
        return Nets(student, Truncated(student, frozen), frozen=(frozen,))

    def loss(self, nets: Nets, x0: Samples, cond: Cond, step: int, steps: int) -> tuple[torch.Tensor, Stats]:
        """The mean over t in [t', T] + w_b * the mean over the samples at t'."""
        n_b = boundary_count(len(x0), self.rho)  # the first n_b samples sit at t'
        at_boundary = torch.arange(len(x0)) < n_b
        t = self.times(len(x0), self.t_prime, self.t_max).to(x0.dtype).masked_fill(at_boundary, self.t_prime)
        r = self.delta.r(t, step)
        (xt, xr), key = two_samples(nets, x0, t, r, cond), dropout_key(x0)
        ft = nets.student(xt, t, cond=cond, key=key)
        with torch.no_grad():
            fr = nets.target(xr, r, at_boundary | (r < self.t_prime), cond, key)
        distance = pseudo_huber(ft, fr, self.c)
        loss = beside(self.weight(t, r), x0) * distance
        return loss[n_b:].mean() + self.w_b * loss[:n_b].mean(), {"t": t, "distance": distance}
