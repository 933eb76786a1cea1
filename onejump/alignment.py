"""How far from its teacher a preconditioning puts the optimal student: consistency gaps along the exact flow.

Zheng et al. 2025. A student jumps by f = a x_t + b D_theta(x_t, t, s). With Phi the teacher's exact flow, the best that
D_theta can be is D*(x_t, t, s) = (Phi(x_t; t -> s) - a x_t) / b, and its gap is what it has to learn beyond the
teacher's denoiser: D* - D(x_s, s) at the end of the jump, D* - D(x_t, t) at its start.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from onejump.model import ConsistencyModel
from onejump.precond import Jump
from onejump.solvers import Denoiser, denoiser, heun
from onejump.types import Cond, Grid, Samples, Times

Square = Float64[Tensor, "n n"]  # [i, j] is the jump from grid[i] down to grid[j], NaN where there is none
Report = Callable[[int, int], None]  # of progress: network passes done and in all, each over one batch
NEAR = 6.0  # a jump t -> s is near up to this ratio t / s


@dataclass(frozen=True, eq=False)
class Gaps:
    """Of one preconditioning: RMS per coordinate over the trajectories."""

    to_end: Square  # D*(x_t, t, s) - D(x_s, s)
    to_start: Square  # D*(x_t, t, s) - D(x_t, t)
    untrained: Square  # f(x_t, t -> s) - Phi while the student is its teacher: D_theta(x_t, t, s) = D(x_t, t)


@dataclass(frozen=True, eq=False)
class Alignment:
    """Gaps of each preconditioning, and the error of a student's own jumps: RMS per coordinate."""

    grid: Grid
    gaps: dict[str, Gaps]
    student: Square | None  # f - Phi; NaN also where this student does not jump
    trajectories: int
    substeps: int
    flow_error: float  # of Phi, the largest at any time of the grid: a third of the change from half the sub-steps


class Counter:
    """Of network passes, each over one batch."""

    def __init__(self, total: int, progress: Report):
        self.done, self.total, self.progress = 0, total, progress

    def add(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)

    def counted(self, denoise: Denoiser) -> Denoiser:
        def counting(x: Samples, t: Times) -> Samples:
            self.add()
            return denoise(x, t)

        return counting


def kinds(grid: Grid) -> dict[str, Bool[Tensor, "n n"]]:
    """Which jumps are of which kind: to eps = grid[0]; of the others near ones, t / s <= 6, and mid ones, longer."""
    down = torch.ones(len(grid), len(grid), dtype=torch.bool).tril(-1)
    to_eps = down & (grid == grid[0])
    near = down & ~to_eps & (grid[:, None] <= NEAR * grid)
    return {"all": down, "near": near, "mid": down & ~to_eps & ~near, "to eps": to_eps}


def mean_by_kind(values: Square, grid: Grid) -> dict[str, float]:
    """Means over those jumps of each kind that have a value, NaN where none has."""
    return {kind: values[mask].nanmean().item() for kind, mask in kinds(grid).items()}


def flow(denoise: Denoiser, xT: Samples, grid: Grid, substeps: int) -> Iterator[Samples]:
    """Phi of xT, which is at grid[-1], at every time of the grid from the last to the first.

    `substeps` Heun steps between two neighbours, even in ln t.
    """
    x, nodes = xT, grid.flip(0).tolist()
    yield x
    for start, end in zip(nodes[:-1], nodes[1:], strict=True):
        times = [start * (end / start) ** (k / substeps) for k in range(substeps + 1)]
        for t, r in zip(times[:-1], times[1:], strict=True):
            x = heun(denoise, x, at(t, x), at(r, x))
        yield x


def at(t: float, x: Samples) -> Tensor:
    """The same time for every sample."""
    return x.new_full((len(x),), t)


def coefficients(jump: Jump, grid: Grid) -> tuple[Square, Square]:
    """a(t, s) and b(t, s) for every pair of the grid, NaN where t -> s does not go down."""
    down = kinds(grid)["all"]
    a, b = (torch.full(down.shape, torch.nan, dtype=torch.float64) for _ in range(2))
    i, j = down.nonzero(as_tuple=True)
    a[down], b[down] = jump(grid[i], grid[j])
    return a, b


@torch.no_grad()
def alignment(
    teacher: ConsistencyModel,
    jumps: Mapping[str, Jump],
    xT: Samples,
    cond: Cond,
    grid: Grid,
    substeps: int = 32,
    student: ConsistencyModel | None = None,
    batch: int = 256,
    progress: Report = lambda done, total: None,
) -> Alignment:
    """Gaps of these preconditionings, and the student's error, for every jump t -> s of the ascending grid.

    xT: samples at grid[-1], where the trajectories start. substeps: an even number of Heun steps of the teacher between
    neighbours, which stand for its exact flow. The student is asked for the jumps in `jumps_of`.
    """
    assert substeps >= 2 and substeps % 2 == 0, f"substeps: {substeps}; an even number"
    n, starts = len(grid), range(0, len(xT), batch)
    asked = torch.zeros(n, n, dtype=torch.bool) if student is None else jumps_of(student, grid)
    passes = len(starts) * (2 * substeps * (n - 1) + n + int(asked.sum())) + substeps * (n - 1)
    counter = Counter(passes, progress)
    ab = {name: coefficients(jump, grid) for name, jump in jumps.items()}
    squares = {name: torch.zeros(2, n, n, dtype=torch.float64) for name in jumps}
    errors = torch.zeros(n, n, dtype=torch.float64).masked_fill(~asked, torch.nan)
    flow_error = 0.0
    for k in starts:
        part, labels = xT[k : k + batch], None if cond is None else cond[k : k + batch]
        denoise = counter.counted(denoiser(teacher, labels))
        x = [*flow(denoise, part, grid, substeps)][::-1]
        if k == 0:
            coarse = [*flow(denoise, part, grid, substeps // 2)][::-1]
            flow_error = max(rms(u - v) for u, v in zip(x, coarse, strict=True)) / 3
        D = [denoise(u, at(t, u)) for u, t in zip(x, grid.tolist(), strict=True)]
        for name, (a, b) in ab.items():
            squares[name] += gap_squares(x, D, a, b)
        if student is not None:
            errors += student_squares(student, x, labels, grid, asked, counter)
    gaps = {name: _gaps(squares[name] / xT.numel(), ab[name][1]) for name in jumps}
    found = None if student is None else (errors / xT.numel()).sqrt()
    return Alignment(grid, gaps, found, len(xT), substeps, flow_error)


def jumps_of(student: ConsistencyModel, grid: Grid) -> Bool[Tensor, "n n"]:
    """All from t_min up if it reads the second time; else its jumps end at the data, and those to grid[0] are meant."""
    made = kinds(grid)["all" if student.second_time else "to eps"]
    return made & (grid >= student.t_min)[:, None]


def gap_squares(x: list[Samples], D: list[Samples], a: Square, b: Square) -> Float64[Tensor, "2 n n"]:
    """Sums over samples and coordinates of (D* - D(x_s, s))^2 and (D* - D(x_t, t))^2."""
    found = torch.full((2, *a.shape), torch.nan, dtype=torch.float64)
    for i, j in pairs(~a.isnan()):
        best = (x[j] - a[i, j].item() * x[i]) / b[i, j].item()
        found[:, i, j] = torch.stack([(best - D[k]).double().square().sum() for k in (j, i)])
    return found


def student_squares(
    student: ConsistencyModel, x: list[Samples], cond: Cond, grid: Grid, asked: Bool[Tensor, "n n"], counter: Counter
) -> Square:
    """Sums of (f(x_t, t -> s) - x_s)^2."""
    found = torch.full(asked.shape, torch.nan, dtype=torch.float64)
    for i, j in pairs(asked):
        f = student(x[i], at(grid[i].item(), x[i]), at(grid[j].item(), x[i]), cond=cond)
        found[i, j] = (f - x[j]).double().square().sum()
        counter.add()
    return found


def pairs(mask: Bool[Tensor, "n n"]) -> list[list[int]]:
    return mask.nonzero().tolist()


def rms(x: Samples) -> float:
    return x.double().square().mean().sqrt().item()


def _gaps(mean_squares: Float64[Tensor, "2 n n"], b: Square) -> Gaps:
    """An untrained student misses by f - Phi = b (D(x_t, t) - D*)."""
    to_end, to_start = mean_squares.sqrt()
    return Gaps(to_end, to_start, b * to_start)


def record(found: Alignment) -> dict[str, Any]:
    """All numbers as JSON can hold them: squares as lists of rows [from t][to s], null where there is no jump."""
    gaps = {
        name: {kind: _numbers(getattr(gap, kind), found.grid) for kind in ("to_end", "to_start", "untrained")}
        for name, gap in found.gaps.items()
    }
    return {
        "times": found.grid.tolist(),
        "near": NEAR,
        "trajectories": found.trajectories,
        "substeps": found.substeps,
        "flow_error": found.flow_error,
        "gaps": gaps,
        "student": None if found.student is None else _numbers(found.student, found.grid),
    }


def _numbers(values: Square, grid: Grid) -> dict[str, Any]:
    means = {kind: _finite(mean) for kind, mean in mean_by_kind(values, grid).items()}
    return {"mean": means, "jumps": [[_finite(v) for v in row] for row in values.tolist()]}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
