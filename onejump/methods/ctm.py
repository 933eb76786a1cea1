"""Consistency trajectory models (without their GAN term, which is ctm_gan)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from onejump.draws import integers, normal_like, uniform
from onejump.losses import Distance, mean_l2
from onejump.methods.base import Nets, Stats, averaged, diffuse, dropout_key, gradient_ratio, on_rows
from onejump.methods.dsm import DSM
from onejump.model import ConsistencyModel
from onejump.solvers import Solver, denoiser, heun
from onejump.times import HalfLogNormal, check_range, karras_grid, random_steps
from onejump.types import Cond, Samples, Times


@dataclass(frozen=True)
class CTM:
    """Consistency Trajectory Models (Kim et al. 2024): the student learns every jump t -> s of the teacher's ODE."""

    n: int = 18  # times on the grid
    max_steps: int = 17  # of the teacher's solver, between t and r
    mu: float = 0.999  # share of the target kept a step
    solver: Solver = heun
    distance: Distance = mean_l2
    dsm: DSM = DSM(HalfLogNormal())

    def __post_init__(self) -> None:
        check_range(at_least=2, n=self.n)
        check_range(at_least=1, below=self.n, max_steps=self.max_steps)
        check_range(at_least=0, below=1, mu=self.mu)

    def nets(self, student: ConsistencyModel, teacher: ConsistencyModel) -> Nets:
        average = averaged(student, lambda step, steps: self.mu)
        return Nets(student, target=average.model, teacher=teacher, average=average)

    def loss(self, nets: Nets, x0: Samples, cond: Cond, step: int, steps: int) -> tuple[Tensor, Stats]:
        """L_CTM + lambda L_DSM, lambda the ratio of their gradients at the last layer: the scale of L_DSM cancels."""
        estimate, target, t = self.at_the_data(nets, x0, cond, step)
        distance = self.distance(estimate, target)
        ctm, (dsm, _) = distance.mean(), self.dsm.loss(nets, x0, cond, step, steps)
        return ctm + gradient_ratio(ctm, dsm, nets.student) * dsm, {"t": t, "distance": distance}

    def at_the_data(self, nets: Nets, x0: Samples, cond: Cond, step: int) -> tuple[Samples, Samples, Times]:
        """f^-(f(x_t, t -> s), s -> eps) and f^-(sg f(x_r, r -> s), s -> eps), for t > r >= s; and t."""
        assert nets.teacher is not None
        grid, k = karras_grid(self.n).to(x0.dtype), random_steps(step, self.max_steps)
        i = integers(k, self.n, len(x0))
        t, r, s = grid[i], grid[i - k], grid[(uniform(len(x0)) * (i - k + 1)).long()]
        xt, key = diffuse(x0, normal_like(x0), t), dropout_key(x0)
        estimate = nets.student(xt, t, s, cond=cond, key=key)
        estimate = on_rows(s > grid[0], nets.target, estimate, (s,), cond, key)  # gradient flows through it
        with torch.no_grad():
            xr = xt
            for m in range(k):
                xr = self.solver(denoiser(nets.teacher, cond), xr, grid[i - m], grid[i - m - 1])
            target = on_rows(r > s, nets.student, xr, (r, s), cond, key)
            target = on_rows(s > grid[0], nets.target, target, (s,), cond, key)
        return estimate, target, t
