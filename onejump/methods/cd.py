"""Consistency distillation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from onejump.draws import integers, normal_like
from onejump.losses import Distance, Weight, mean_l2, uniform
from onejump.methods.base import Nets, Stats, averaged, diffuse, student_and_target
from onejump.model import ConsistencyModel, beside
from onejump.solvers import Solver, denoiser, heun
from onejump.times import check_range, karras_grid
from onejump.types import Cond, Samples
from onejump.vp import VPSchedule


@dataclass(frozen=True)
class CD:
    """Consistency Models (Song et al. 2023, algorithm 2): a diffusion teacher's ODE, one step at a time.

    With mu = 0 the target is the student itself under stop-gradient, as in the published runs on CIFAR-10.
    """

    n: int = 18  # times on the grid
    mu: float = 0.0  # share of the target kept a step; 0.95 on ImageNet-64
    solver: Solver = heun
    distance: Distance = mean_l2
    weight: Weight = uniform
    levels: VPSchedule | None = None  # the grid is 0 and n - 1 of these noise levels; none: Karras' grid

    def __post_init__(self) -> None:
        check_range(at_least=2, n=self.n)
        check_range(at_least=0, below=1, mu=self.mu)

    def nets(self, student: ConsistencyModel, teacher: ConsistencyModel) -> Nets:
        average = averaged(student, lambda step, steps: self.mu) if self.mu else None
        return Nets(student, target=average.model if average else student, teacher=teacher, average=average)

    def loss(self, nets: Nets, x0: Samples, cond: Cond, step: int, steps: int) -> tuple[Tensor, Stats]:
        """E[lambda(t) d(f(x_t, t), f^-(x_r, r))], x_r the teacher's step from x_t to the next time of the grid."""
        assert nets.teacher is not None
        grid = (karras_grid(self.n) if self.levels is None else self.levels.spread(self.n)).to(x0.dtype)
        i = integers(0, self.n - 1, len(x0))
        r, t = grid[i], grid[i + 1]
        xt = diffuse(x0, normal_like(x0), t)
        with torch.no_grad():
            xr = self.solver(denoiser(nets.teacher, cond), xt, t, r)
        ft, fr = student_and_target(nets, xt, t, xr, r, cond)
        distance = self.distance(ft, fr)
        return (beside(self.weight(t, r), x0) * distance).mean(), {"t": t, "distance": distance}
