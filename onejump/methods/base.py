"""What every method shares: the networks it is handed, the diffused sample, and the pair student / target."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from onejump import draws
from onejump.model import ConsistencyModel, beside, per_sample
from onejump.optim import Optimizer
from onejump.solvers import Solver, denoiser
from onejump.types import Cond, DropoutKey, Samples, Times, UserError

Stats = dict[str, Tensor]  # one number a sample: "t", on the CPU, and "distance" before the weight


Target = Callable[..., Samples]  # f^-, called as a model is; TCM's also takes the flag of the rows below t'


@dataclass(frozen=True)
class Average:
    """theta^-: a running average of the student that serves as target. The loop owns it, updates it and saves it.

    After a step of the student the share decay(step, steps) of it stays.
    """

    model: ConsistencyModel
    decay: Callable[[int, int], float]


@dataclass(frozen=True)
class Critic:
    """The discriminator of a GAN term, its own optimiser and rate. Where turn(step), it alone is trained."""

    net: nn.Module
    optimizer: Optimizer
    rate: float
    turn: Callable[[int], bool]


@dataclass(frozen=True)
class Nets:
    """student: trained. target: f^-, whose weights get no gradient. teacher: the diffusion model, in eval mode.

    frozen: what the target is made of besides the student and its average. solver: of the teacher's ODE, where a method
    that can do without takes x_r from a teacher.
    """

    student: ConsistencyModel
    target: Target
    frozen: tuple[ConsistencyModel, ...] = ()
    teacher: ConsistencyModel | None = None
    average: Average | None = None
    critic: Critic | None = None
    solver: Solver | None = None

    @property
    def models(self) -> tuple[ConsistencyModel, ...]:
        """All that a step runs but the critic."""
        average = (self.average.model,) if self.average else ()
        return (self.student, *average, *self.frozen, *((self.teacher,) if self.teacher else ()))


@runtime_checkable
class Method(Protocol):
    """The loss of one paper. `step` counts optimiser steps, a stage 2's on from stage 1's; `steps` is the end."""

    def nets(self, student: ConsistencyModel) -> Nets:
        """The networks of this method around a student that already has its initial weights."""

    def loss(self, nets: Nets, x0: Samples, cond: Cond, step: int, steps: int) -> tuple[Tensor, Stats]: ...


@runtime_checkable
class Distillation(Protocol):
    """A method that also has a teacher."""

    def nets(self, student: ConsistencyModel, teacher: ConsistencyModel) -> Nets: ...

    def loss(self, nets: Nets, x0: Samples, cond: Cond, step: int, steps: int) -> tuple[Tensor, Stats]: ...


def diffuse(x0: Samples, eps: Samples, t: Times) -> Samples:
    """x_t = x0 + t eps."""
    return x0 + per_sample(t, x0) * eps


def two_samples(nets: Nets, x0: Samples, t: Times, r: Times, cond: Cond) -> tuple[Samples, Samples]:
    """x_t, and x_r of the same noise; in distillation, x_r by a step of the teacher's ODE from x_t."""
    eps = draws.normal_like(x0)
    xt = diffuse(x0, eps, t)
    if nets.solver is None or nets.teacher is None:
        return xt, diffuse(x0, eps, r)
    with torch.no_grad():
        return xt, nets.solver(denoiser(nets.teacher, cond), xt, t, r)


def boundary_count(n: int, rho: float) -> int:
    """floor(rho n) samples, but never none: a batch too small for the share would drop the boundary loss silently."""
    if not 0 < rho < 1:
        raise UserError(f"rho: {rho:g}; a share of the batch, more than 0 and less than 1, is needed")
    if n < 2:
        raise UserError(f"batch: {n} sample(s) a pass; TCM needs 2 or more, one of them at t'")
    return max(int(n * rho), 1)


def frozen_copy(model: ConsistencyModel) -> ConsistencyModel:
    return copy.deepcopy(model).requires_grad_(False)


def dropout_key(x0: Samples) -> Tensor:
    """One key a sample, int64 [b]: networks that get the same key drop the same elements."""
    return draws.keys(len(x0), x0.device)


def averaged(student: ConsistencyModel, decay: Callable[[int, int], float]) -> Average:
    return Average(frozen_copy(student), decay)


def student_and_target(nets: Nets, xt: Samples, t: Times, xr: Samples, r: Times, cond: Cond) -> tuple[Samples, Samples]:
    """f(x_t, t) with gradient and f^-(x_r, r) without, under the same dropout masks."""
    key = dropout_key(xt)
    ft = nets.student(xt, t, cond=cond, key=key)
    with torch.no_grad():
        fr = on_rows(r > nets.student.jump.sigma_min, nets.target, xr, (r,), cond, key)
    return ft, fr


@dataclass(frozen=True)
class Company:
    """The processes that share a batch. same_passes: each makes those that any of them needs, for weights that lie in
    pieces, which a pass gathers from all. mean: of what each has of its own samples."""

    same_passes: bool = False
    mean: Callable[[Tensor], Tensor] = lambda own: own


_company: ContextVar[Company] = ContextVar("company", default=Company())  # noqa: B039  (frozen)


@contextmanager
def together(company: Company) -> Iterator[None]:
    """Within it, methods work in this company; without, alone."""
    before = _company.set(company)
    try:
        yield
    finally:
        _company.reset(before)


def on_rows(rows: Tensor, f: Target, x: Samples, times: tuple[Times, ...], cond: Cond, key: DropoutKey) -> Samples:
    """f(x, *times) on the flagged rows; x on the others, which cost no network pass (f(x, t -> t) = x).

    rows and times are on the CPU: how many rows there are is known without waiting for the device.
    """
    index = rows.nonzero()[:, 0]
    if len(index) == len(rows):
        return f(x, *times, cond=cond, key=key)
    if len(index) == 0 and not _company.get().same_passes:
        return x
    taken = index if len(index) else torch.zeros(1, dtype=torch.int64)  # one row, for nothing but company
    times, taken = tuple(t[taken] for t in times), beside(taken, x)
    cond, key = (None if v is None else v[taken] for v in (cond, key))
    made = f(x[taken], *times, cond=cond, key=key)
    return x.index_copy(0, taken, made) if len(index) else x


def gradient_ratio(of: Tensor, to: Tensor, student: ConsistencyModel, low: float = 0.0, high: float = 1e4) -> Tensor:
    """||grad of|| / (||grad to|| + 1e-4) at the weight of the student's last layer, kept in [low, high]; a constant.

    CTM's adaptive weight of the loss `to` (Kim et al. 2024, after VQGAN). Both losses are means over samples, and count
    over those of all processes.
    """
    W: Any = student.net.last_weight

    def gradient(loss: Tensor) -> Tensor:
        scale = torch.exp2(10 - loss.detach().abs().clamp_min(1).log2().ceil())  # half precision: no 0 and no infinity
        return torch.autograd.grad(scale * loss, W, retain_graph=True)[0] / scale

    above, below = _company.get().mean(torch.stack([gradient(of), gradient(to)])).reshape(2, -1).norm(dim=1)
    return (above / (below + 1e-4)).clamp(low, high).detach()
