"""What every method shares: the networks it is handed, the diffused sample, and the pair student / target."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from onejump.model import ConsistencyModel, per_sample
from onejump.types import Cond, DropoutKey, Samples, Times, UserError

Stats = dict[str, Tensor]  # one number a sample: "t", and "distance" before the weight


Target = Callable[..., Samples]  # f^-, called as a model is; TCM's also takes the flag of the rows below t'


@dataclass(frozen=True)
class Nets:
    """student: trained. target: f^-, under stop-gradient. frozen: what the target is made of besides the student."""

    student: ConsistencyModel
    target: Target
    frozen: tuple[ConsistencyModel, ...] = ()


@runtime_checkable
class Method(Protocol):
    """The loss of one paper. `step` counts optimiser steps, a stage 2's on from stage 1's; `steps` is the end."""

    def nets(self, student: ConsistencyModel) -> Nets:
        """The networks of this method around a student that already has its initial weights."""

    def loss(self, nets: Nets, x0: Samples, cond: Cond, step: int, steps: int) -> tuple[Tensor, Stats]: ...


def diffuse(x0: Samples, eps: Samples, t: Times) -> Samples:
    """x_t = x0 + t eps."""
    return x0 + per_sample(t, x0) * eps


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
    return torch.randint(2**62, (len(x0),), device=x0.device)


def student_and_target(nets: Nets, xt: Samples, t: Times, xr: Samples, r: Times, cond: Cond) -> tuple[Samples, Samples]:
    """f(x_t, t) with gradient and f^-(x_r, r) without, under the same dropout masks."""
    key = dropout_key(xt)
    ft = nets.student(xt, t, cond=cond, key=key)
    with torch.no_grad():
        fr = on_rows(r > 0, nets.target, xr, r, cond, key)
    return ft, fr


def on_rows(rows: Tensor, f: Target, x: Samples, t: Times, cond: Cond, key: DropoutKey) -> Samples:
    """f on the flagged rows; x on the others, which cost no network pass (f(x, 0) = x)."""
    index = rows.nonzero()[:, 0]  # waits for the device, once
    if len(index) == len(rows):
        return f(x, t, cond=cond, key=key)
    if len(index) == 0:
        return x
    cond, key = (None if v is None else v[index] for v in (cond, key))
    return x.index_copy(0, index, f(x[index], t[index], cond=cond, key=key))
