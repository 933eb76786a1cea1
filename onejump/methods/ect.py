"""Easy consistency training, which is also TCM's stage 1."""

import math
from dataclasses import dataclass

from torch import Tensor

from onejump.losses import Weight, inverse_delta, pseudo_huber
from onejump.methods.base import Nets, Stats, student_and_target, two_samples
from onejump.model import ConsistencyModel, beside
from onejump.times import AtLevels, Discretisation, LevelSteps, LogNormal, check_range
from onejump.types import Cond, Samples, UserError


@dataclass(frozen=True)
class ECT:
    """Consistency Models Made Easy (Geng et al. 2024): consistency training that starts from a diffusion model.

    TCM's stage 1 is the same with t kept in [t_min, t_max] = [0.002, 80] and Delta_t kept above a floor.
    """

    times: LogNormal | AtLevels = LogNormal(P_mean=-1.1, P_std=2.0)
    delta: Discretisation | LevelSteps = Discretisation(q=2)
    weight: Weight = inverse_delta
    c: float = 0.0
    t_min: float = 0.0
    t_max: float = math.inf

    def __post_init__(self) -> None:
        check_range(at_least=0, c=self.c, t_min=self.t_min)
        if not self.t_min < self.t_max:
            raise UserError(f"t_max: {self.t_max:.15g}; more than t_min={self.t_min:.15g} is needed")

    def nets(self, student: ConsistencyModel) -> Nets:
        return Nets(student, target=student)

    def loss(self, nets: Nets, x0: Samples, cond: Cond, step: int, steps: int) -> tuple[Tensor, Stats]:
        """E[w(t, r) d(f(x_t, t), f^-(x_r, r))], r = t - Delta_t; the target at r = 0 is the data."""
        t = self.times(len(x0), self.t_min, self.t_max).to(x0.dtype)
        r = self.delta.r(t, step)
        xt, xr = two_samples(nets, x0, t, r, cond)
        ft, fr = student_and_target(nets, xt, t, xr, r, cond)
        distance = pseudo_huber(ft, fr, self.c)
        return (beside(self.weight(t, r), x0) * distance).mean(), {"t": t, "distance": distance}
