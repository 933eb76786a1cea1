"""Consistency training and distillation in continuous time: the limit r -> t, by one forward-mode derivative."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from onejump.draws import normal_like
from onejump.losses import Distance, mean_l1, mean_l2
from onejump.methods.base import Nets, Stats, diffuse, dropout_key
from onejump.model import ConsistencyModel, beside, per_sample
from onejump.times import KarrasUniform
from onejump.types import Cond, PerSample, Samples, Times, UserError


@dataclass(frozen=True)
class ContinuousCT:
    """Consistency Models (Song et al. 2023, appendix B), from data alone: dx/dt = (x - x0) / t = eps."""

    times: KarrasUniform = KarrasUniform()
    distance: Distance = mean_l2
    stop_gradient: bool = True

    def __post_init__(self) -> None:
        check_distance(self.distance, self.stop_gradient)

    def nets(self, student: ConsistencyModel) -> Nets:
        return Nets(student, target=student)

    def loss(self, nets: Nets, x0: Samples, cond: Cond, step: int, steps: int) -> tuple[Tensor, Stats]:
        t, eps = beside(self.times(len(x0)).to(x0.dtype), x0), normal_like(x0)
        f, df = slope(nets.student, diffuse(x0, eps, t), t, eps, cond)
        return pseudo_loss(self.distance, f, df, self.stop_gradient).mean(), {
            "t": t,
            "distance": df.flatten(1).norm(dim=1),
        }


@dataclass(frozen=True)
class ContinuousCD:
    """Consistency Models (Song et al. 2023, appendix B) with a diffusion teacher: dx/dt = (x - D(x, t)) / t."""

    times: KarrasUniform = KarrasUniform()
    distance: Distance = mean_l2
    stop_gradient: bool = False

    def __post_init__(self) -> None:
        check_distance(self.distance, self.stop_gradient)

    def nets(self, student: ConsistencyModel, teacher: ConsistencyModel) -> Nets:
        return Nets(student, target=student, teacher=teacher)

    def loss(self, nets: Nets, x0: Samples, cond: Cond, step: int, steps: int) -> tuple[Tensor, Stats]:
        assert nets.teacher is not None
        t = beside(self.times(len(x0)).to(x0.dtype), x0)
        xt = diffuse(x0, normal_like(x0), t)
        with torch.no_grad():
            dx = (xt - nets.teacher.denoise(xt, t, cond=cond)) / per_sample(t, xt)
        f, df = slope(nets.student, xt, t, dx, cond)
        return pseudo_loss(self.distance, f, df, self.stop_gradient).mean(), {
            "t": t,
            "distance": df.flatten(1).norm(dim=1),
        }


def check_distance(distance: Distance, stop_gradient: bool) -> None:
    """Raises UserError for l1 with stop-gradient: its Hessian is 0 wherever it has one, and nothing would train."""
    if stop_gradient and distance is mean_l1:
        raise UserError("distance: mean_l1 has no gradient under stop_gradient=true; use mean_l2 or LPIPS, or false")


def slope(student: ConsistencyModel, xt: Samples, t: Times, dx: Samples, cond: Cond) -> tuple[Samples, Samples]:
    """f(x_t, t) and its derivative df/dt along the ODE, where dx/dt = dx."""
    key = dropout_key(xt)

    def f(x: Samples, t: Times) -> Samples:
        return student(x, t, cond=cond, key=key)

    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward-mode derivative
        ft, df, *_ = torch.func.jvp(f, (xt, t), (dx, torch.ones_like(t)))
    return ft, df


def pseudo_loss(distance: Distance, f: Samples, df: Samples, stop_gradient: bool) -> PerSample:
    """Whose gradient is that of the discrete loss as r -> t.

    With stop-gradient f . sg(H df), H the Hessian of the distance at its minimum (the identity for l2). Without it
    what vanishes with df: its norm for l2, mean |df| for l1, df . H df otherwise.
    """
    if stop_gradient:
        H_df = df if distance is mean_l2 else hessian_times(distance, f, df)
        return (f * H_df.detach()).flatten(1).sum(1)
    if distance is mean_l2:
        return df.flatten(1).norm(dim=1)
    if distance is mean_l1:
        return df.flatten(1).abs().mean(1)
    return (df * hessian_times(distance, f, df)).flatten(1).sum(1)


def hessian_times(distance: Distance, f: Samples, v: Samples) -> Samples:
    """H v, where H is the Hessian of distance(f, y) in y at y = f; differentiable in v, H a constant."""
    x = f.detach()
    y = x.clone().requires_grad_()
    gradient = torch.autograd.grad(distance(x, y).sum(), y, create_graph=True)[0]
    return torch.autograd.grad(gradient, y, v, create_graph=True)[0]
