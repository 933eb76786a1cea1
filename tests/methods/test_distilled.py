"""ECT and TCM as distillation, on data N(0, s^2), where the teacher and the consistency function are known."""

import math

import pytest
import torch
from test_gaussian import S, fixed, model
from torch import nn

from onejump.draws import integers, normal_like
from onejump.methods.cd import CD
from onejump.methods.distilled import Distilled
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.precond import EDM
from onejump.solvers import euler, heun
from onejump.times import Discretisation
from onejump.vp import VPSchedule


class Zero(nn.Module):
    def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
        return torch.zeros_like(x)


TEACHER = ConsistencyModel(Zero(), EDM(S))  # D = c_skip x = E[x0 | x_t], exactly
HALVING = Discretisation(double_every=1, k=0.0)  # Delta_t = t / 2^(step + 1)


def distance(method, step, theta=S, n=8):
    """Of the exact student from its target, a sample at a time."""
    torch.manual_seed(0)
    student = model(theta)
    distils = isinstance(method, Distilled | CD)
    nets = method.nets(student, TEACHER) if distils else method.nets(student)
    x0 = S * torch.randn(n, 1, dtype=torch.float64)
    loss, stats = method.loss(nets, x0, None, step, 100)
    loss.backward()
    assert all(p.grad is None for p in TEACHER.parameters()) and student.net.theta.grad is not None
    return stats["distance"].detach()


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
@pytest.mark.parametrize("t", [0.3, 2.0])
def test_the_exact_solution_is_left_by_the_local_error_of_the_solver_alone(solver, order, t):
    method = Distilled(ECT(times=fixed(t), delta=HALVING), solver)
    coarse, fine = distance(method, 7), distance(method, 8)
    assert torch.allclose(coarse / fine, torch.full_like(fine, 2.0 ** (order + 1)), rtol=0.05)
    same_noise = ECT(times=fixed(t), delta=HALVING)
    assert (distance(same_noise, 8) > 10 * fine).all() or order == 1


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_a_truncated_students_target_is_the_teachers_step_too(solver, order):
    method = Distilled(TCM(delta=HALVING, c=0.0), solver)
    coarse, fine = distance(method, 9), distance(method, 10)
    assert torch.allclose(coarse / fine, torch.full_like(fine, 2.0 ** (order + 1)), rtol=0.1)


def test_cd_on_a_schedules_levels_ends_at_the_teachers_denoiser():
    """Its first step goes to t = 0, where Euler's x_r is D(x_t) and the target is x_r itself."""
    levels = VPSchedule(n=2)
    low, high = levels.sigmas.tolist()
    assert levels.spread(3).tolist() == [0, low, high]
    found = distance(CD(n=3, solver=euler, levels=levels), 0, n=64)
    torch.manual_seed(0)
    x0 = S * torch.randn(64, 1, dtype=torch.float64)
    from_high = integers(0, 2, 64).bool()
    t = torch.where(from_high, high, low)
    xt = (x0 + t[:, None] * normal_like(x0))[:, 0]
    D = S**2 / (S**2 + t**2) * xt
    xr = torch.where(from_high, low / t * xt + (1 - low / t) * D, D)
    target = torch.where(from_high, S / math.sqrt(S**2 + low**2) * xr, xr)
    torch.testing.assert_close(found, (S / (S**2 + t**2).sqrt() * xt - target) ** 2)
