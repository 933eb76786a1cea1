"""Analytic-Precond's jump: a and b from two statistics of the teacher (Zheng et al. 2025, "Elucidating the
Preconditioning in Consistency Distillation"; the closed forms are our derivation, the paper has no public code).

In lambda = -ln t the teacher's ODE is dx/dlambda = D - x. With l_t and s_t, one number each for every time,

    L = exp int (1 - l) dlambda,   S = exp int s dlambda,   eta = int L S dlambda,   g = D - l x,   h = g / S

turn it into d(L x)/d eta = h, without approximation. One Euler step of that is the jump:

    forward,  h frozen at the start:  B = (eta_s - eta_t) / (L_s S_t),  a = L_t/L_s - l_t B,         b = B
    backward, h frozen at the end:    A = (eta_s - eta_t) / (L_s S_s),  a = L_t/L_s / (1 + l_s A),   b = A / (1 + l_s A)

l = s = 0 and l = 1, s = -1 are CTM's a = s/t, b = 1 - s/t. The statistics come from `onejump.analytic.estimate`.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from onejump.times import check_range
from onejump.types import PerSample, Times, UserError

Form = Literal["backward", "forward"]


@dataclass(frozen=True)
class Analytic:
    """The jump of a table of l_t and s_t at times even in ln t, from sigma_max down to sigma_min.

    form: "backward" is the paper's; "forward" is better scaled for short jumps, and badly for long ones.
    teacher: the sha256 of the weights that the statistics are of, for the record.
    l and s are linear in ln t between the nodes, and L, S and eta are their integrals from any point on: (a, b) is
    continuous, exactly (1, 0) at s = t, and a short jump is a step of the ODE. Times outside the table count as its
    ends. Raises UserError for a table of no use.
    """

    l_t: tuple[float, ...]
    s_t: tuple[float, ...]
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    form: Form = "backward"
    teacher: str = ""

    def __post_init__(self) -> None:
        check_range(above=0, sigma_max=self.sigma_max)
        check_range(above=0, below=self.sigma_max, sigma_min=self.sigma_min)
        check_form(self.form)
        if not len(self.l_t) == len(self.s_t) >= 2:
            raise UserError(f"l_t, s_t: {len(self.l_t)} and {len(self.s_t)} values; as many of both, 2 or more, needed")
        for value in self.l_t:
            check_range(at_least=0, at_most=1, l_t=value)
        for value in self.s_t:
            check_range(s_t=value)
        steepest = self.cell * sum(map(abs, self.s_t))
        if steepest > 300:  # a teacher's is about 10 to 25, and float64 ends at exp(709)
            raise UserError(f"s_t: S_t would span a factor of exp({steepest:.0f}); this is no teacher's table")

    @property
    def cell(self) -> float:
        """The distance of two nodes in ln t."""
        return math.log(self.sigma_max / self.sigma_min) / (len(self.l_t) - 1)

    def check_times(self, sigma_min: float, sigma_max: float) -> None:
        """Raises UserError unless the table holds all times from sigma_min to sigma_max."""
        if not self.sigma_min <= sigma_min <= sigma_max <= self.sigma_max:
            raise UserError(
                f"jump: a table for another sigma range, {self.sigma_min:.15g} to {self.sigma_max:.15g}, while times "
                f"from {sigma_min:.15g} to {sigma_max:.15g} are asked for; estimate it again for these"
            )

    def __call__(self, t: Times, s: Times) -> tuple[PerSample, PerSample]:
        """(a, b) of the jump t -> s, t >= s; float64 inside, in t's precision outside."""
        nodes = _nodes(self, t.device)
        log_L_t, log_S_t, l_t, eta_left_t = _at(nodes, self.cell, self._position(t))
        log_L_s, log_S_s, l_s, eta_left_s = _at(nodes, self.cell, self._position(s))
        eta, decay = eta_left_t - eta_left_s, torch.exp(log_L_t - log_L_s)
        if self.form == "forward":
            B = eta * torch.exp(-log_L_s - log_S_t)
            a, b = decay - l_t * B, B
        else:
            A = eta * torch.exp(-log_L_s - log_S_s)
            a, b = decay / (1 + l_s * A), A / (1 + l_s * A)
        return a.to(t.dtype), b.to(t.dtype)

    def _position(self, t: Times) -> PerSample:
        """Counted in cells from sigma_max down."""
        return ((math.log(self.sigma_max) - t.double().log()) / self.cell).clamp(0, len(self.l_t) - 1)


@dataclass(frozen=True)
class Gaussian:
    """Analytic-Precond in closed form, for data of independent coordinates N(mean, std^2): there the jump is exact.

    l = std^2 / (std^2 + t^2), s = -2 l; a + b = 1. No teacher is needed. Times below sigma_min count as sigma_min.
    """

    std: float = 0.5
    sigma_min: float = 0.002
    form: Form = "backward"

    def __post_init__(self) -> None:
        check_range(above=0, std=self.std, sigma_min=self.sigma_min)
        check_form(self.form)

    def __call__(self, t: Times, s: Times) -> tuple[PerSample, PerSample]:
        """(a, b) of the jump t -> s, t >= s; float64 inside, in t's precision outside."""
        var_t, var_s = (time.double().clamp_min(self.sigma_min) ** 2 for time in (t, s))
        total_t, total_s = var_t + self.std**2, var_s + self.std**2
        shrink = (total_s / total_t).sqrt()  # of the distance from the mean
        shrunk = (var_t - var_s) / total_t / (1 + shrink)  # 1 - shrink, to its last digit
        if self.form == "forward":
            b = shrunk * total_t / var_t
        else:
            b = shrunk * total_s / (var_s + self.std**2 * shrunk)
        return (1 - b).to(t.dtype), b.to(t.dtype)


def check_form(form: str) -> None:
    """Raises UserError for a form that does not exist."""
    if form not in get_args(Form):
        raise UserError(f"form: {form!r}; one of {', '.join(get_args(Form))} is needed")


GAUSS = tuple((0.5 + root / 2, weight / 18) for root, weight in ((-math.sqrt(0.6), 5), (0, 8), (math.sqrt(0.6), 5)))


@functools.lru_cache(maxsize=16)
def _nodes(table: Analytic, device: torch.device) -> Float64[Tensor, "5 n"]:
    """l, s, ln L, ln S and the eta left down to sigma_min, at every node.

    eta is summed from sigma_min up, where L S is smallest: differences of small values keep their digits.
    """
    l_t, s_t = torch.tensor([table.l_t, table.s_t], dtype=torch.float64)
    logs = ((rate[1:] + rate[:-1]) / 2 * table.cell for rate in (1 - l_t, s_t))
    log_L, log_S = (torch.cat([step.new_zeros(1), step.cumsum(0)]) for step in logs)
    nodes = torch.stack([l_t, s_t, log_L, log_S, torch.zeros_like(l_t)])
    starts = torch.arange(len(l_t) - 1)
    eta = _eta_to_next_node(nodes, table.cell, starts, torch.zeros(len(starts), dtype=torch.float64))
    nodes[4, :-1] = eta.flip(0).cumsum(0).flip(0)
    return nodes.to(device)


def _at(
    nodes: Float64[Tensor, "5 n"], cell: float, position: PerSample
) -> tuple[PerSample, PerSample, PerSample, PerSample]:
    """ln L, ln S, l, and the eta that is left down to sigma_min."""
    i = position.long().clamp_max(nodes.shape[1] - 2)
    log_L, log_S, l_t = _in_cell(nodes, cell, i, position - i)
    return log_L, log_S, l_t, nodes[4, i + 1] + _eta_to_next_node(nodes, cell, i, position - i)


def _in_cell(nodes: Tensor, cell: float, i: Tensor, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ln L, ln S and l where this part of the cell i is behind: the integrals of 1 - l and s, which are linear."""
    first, last = nodes[:2, i], nodes[:2, i + 1]
    here = torch.lerp(first, last, part)
    mean_l, mean_s = (first + here) / 2
    log_L, log_S = nodes[2, i] + cell * part * (1 - mean_l), nodes[3, i] + cell * part * mean_s
    return log_L, log_S, here[0]


def _eta_to_next_node(nodes: Tensor, cell: float, i: Tensor, part: Tensor) -> Tensor:
    """int L S dlambda from this part of the cell i to its end: Gauss-Legendre with three points, error O(cell^7)."""
    rest = 1 - part
    logs = [(_in_cell(nodes, cell, i, part + rest * point), weight) for point, weight in GAUSS]
    return cell * rest * sum(weight * torch.exp(log_L + log_S) for (log_L, log_S, _), weight in logs)
