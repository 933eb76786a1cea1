"""Consistency training of 2023, from data alone."""

from dataclasses import dataclass

from torch import Tensor

from onejump.draws import integers, normal_like
from onejump.losses import Distance, Weight, mean_l2, uniform
from onejump.methods.base import Nets, Stats, averaged, diffuse, student_and_target
from onejump.model import ConsistencyModel, beside
from onejump.times import check_range, ct_decay, ct_levels, karras_grid
from onejump.types import Cond, Samples


@dataclass(frozen=True)
class CT:
    """Consistency Models (Song et al. 2023, algorithm 3). Published distance: LPIPS.

    The target is an average of the student whose memory grows with the number of levels.
    """

    s0: int = 2  # levels at the start
    s1: int = 150  # intervals at the end: one level more
    mu0: float = 0.9  # share of the target kept a step, at the start
    distance: Distance = mean_l2
    weight: Weight = uniform

    def __post_init__(self) -> None:
        check_range(at_least=1, s0=self.s0)
        check_range(at_least=self.s0, s1=self.s1)
        check_range(above=0, below=1, mu0=self.mu0)

    def levels(self, step: int, steps: int) -> int:
        return ct_levels(step, steps, self.s0, self.s1)

    def nets(self, student: ConsistencyModel) -> Nets:
        average = averaged(student, lambda step, steps: ct_decay(self.levels(step, steps), self.s0, self.mu0))
        return Nets(student, target=average.model, average=average)

    def loss(self, nets: Nets, x0: Samples, cond: Cond, step: int, steps: int) -> tuple[Tensor, Stats]:
        """E[lambda(t) d(f(x_t, t), f^-(x_r, r))] for neighbours r < t of the Karras grid, all equally likely."""
        grid = karras_grid(self.levels(step, steps)).to(x0.dtype)
        i = integers(0, len(grid) - 1, len(x0))
        r, t = grid[i], grid[i + 1]
        eps = normal_like(x0)
        ft, fr = student_and_target(nets, diffuse(x0, eps, t), t, diffuse(x0, eps, r), r, cond)
        distance = self.distance(ft, fr)
        return (beside(self.weight(t, r), x0) * distance).mean(), {"t": t, "distance": distance}
