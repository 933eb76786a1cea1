"""Improved consistency training."""

from dataclasses import dataclass

from torch import Tensor

from onejump.draws import normal_like
from onejump.losses import pseudo_huber
from onejump.methods.base import Nets, Stats, diffuse, student_and_target
from onejump.model import ConsistencyModel, beside
from onejump.times import check_range, ict_levels, karras_grid, lognormal_index
from onejump.types import Cond, Samples


@dataclass(frozen=True)
class ICT:
    """Improved Techniques for Training Consistency Models (Song & Dhariwal 2024), from data alone.

    The target is the student itself under stop-gradient: no EMA. Published: s0 10, s1 1280.
    """

    s0: int = 10  # discretisation intervals at the start
    s1: int = 1280  # and at the end
    P_mean: float = -1.1
    P_std: float = 2.0
    huber: float = 0.00054  # c = huber * sqrt(number of pixels and channels)

    def __post_init__(self) -> None:
        check_range(at_least=1, s0=self.s0)
        check_range(at_least=self.s0, s1=self.s1)
        check_range(P_mean=self.P_mean)
        check_range(above=0, P_std=self.P_std, huber=self.huber)

    def nets(self, student: ConsistencyModel) -> Nets:
        return Nets(student, target=student)

    def loss(self, nets: Nets, x0: Samples, cond: Cond, step: int, steps: int) -> tuple[Tensor, Stats]:
        """E[d(f(x_t, t), f^-(x_r, r)) / (t - r)] for neighbours r < t of the Karras grid with N(step) times."""
        grid = karras_grid(ict_levels(step, steps, self.s0, self.s1))
        i = lognormal_index(grid, len(x0), self.P_mean, self.P_std)
        r, t = grid[i].to(x0.dtype), grid[i + 1].to(x0.dtype)
        eps = normal_like(x0)
        ft, fr = student_and_target(nets, diffuse(x0, eps, t), t, diffuse(x0, eps, r), r, cond)
        distance = pseudo_huber(ft, fr, c=self.huber * x0[0].numel() ** 0.5)
        return (distance / beside(t - r, x0)).mean(), {"t": t, "distance": distance}
