"""Data N(0, s^2), where the consistency function is known: f(x, t) = s x / sqrt(s^2 + t^2)."""

import math

import pytest
import torch
from torch import nn

from onejump.losses import squared_l2
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.ict import ICT
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.precond import EDM
from onejump.times import Discretisation, LogNormal, LogStudentT

S = 0.5
C = 1e4  # so large that pseudo-Huber is d^2 / 2c: only second moments of the data matter


class GaussianNet(nn.Module):
    """The F for which f(x, t) = theta x / sqrt(theta^2 + t^2): exact where theta is the data's deviation."""

    def __init__(self, theta: float):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
        t = (4 * c_noise).exp()
        c_skip, c_out, c_in, _ = EDM()(t)
        k = self.theta / (self.theta**2 + t**2).sqrt()
        return ((k - c_skip) / (c_out * c_in)).view(-1, 1) * x


def model(theta: float) -> ConsistencyModel:
    return ConsistencyModel(GaussianNet(theta))


@pytest.fixture
def moments(monkeypatch):
    """Four samples with the exact second moments of (x0, eps)."""
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", lambda x: signs[:, 1:].repeat(len(x) // 4, 1))
    return S * signs[:, :1]


def gradient(method, theta, x0, step=0, steps=1):
    student = model(theta)
    loss, _ = method.loss(method.nets(student), x0, None, step, steps)
    loss.backward()
    return student.net.theta.grad.item() * C


def fixed(t: float) -> LogNormal:
    return LogNormal(math.log(t), 1e-9)


@pytest.mark.parametrize("t", [0.1, 0.7, 3.0])
def test_ect_is_stationary_at_the_exact_solution_to_second_order_in_delta(moments, t):
    gradients = []
    for stage in (8, 9, 10):
        # Delta / t is the same for every t where k = 0
        method = ECT(fixed(t), Discretisation(2, 1, k=0.0), weight=lambda t, r: torch.ones_like(t), c=C)
        gradients.append(gradient(method, S, moments, step=stage))
    for coarse, fine in zip(gradients[:-1], gradients[1:], strict=True):
        assert abs(coarse / fine - 4) < 0.1
    away = gradient(method, S / 2, moments, step=10)
    assert abs(gradients[-1]) < 0.05 * abs(away)


@pytest.mark.parametrize("t", [0.3, 2.0])
def test_ict_is_stationary_at_the_exact_solution(moments, t):
    method = ICT(s0=1280, s1=1280, P_mean=math.log(t), P_std=1e-3, huber=C)
    exact, below, above = (gradient(method, theta, moments) for theta in (S, 0.8 * S, 1.25 * S))
    assert below < 0 < above  # descent raises a theta that is too small, and lowers one too large
    assert abs(exact) < 0.06 * min(-below, above)


def test_tcm_is_stationary_at_the_exact_solution_when_stage_1_is_exact(moments):
    """Boundary and inner samples, each with the exact moments: 4 at t' and 12 above it."""
    x0 = moments.repeat(4, 1)
    method = TCM(fixed(1.7), Discretisation(2, 1, k=0.0), c=C, t_prime=1.0)
    gradients = {theta: 0.0 for theta in (S, 0.8 * S, 1.25 * S)}
    for theta in gradients:
        nets = method.nets(model(S))  # the boundary network is exact
        nets.student.net.theta.data.fill_(theta)
        loss, _ = method.loss(nets, x0, None, 9, 10)
        loss.backward()
        gradients[theta] = nets.student.net.theta.grad.item()
    exact, below, above = gradients.values()
    assert below < 0 < above
    assert abs(exact) < 0.06 * min(-below, above)


def test_dsm_is_least_at_the_exact_denoiser():
    """EDM's loss of the exact denoiser of N(0, s^2) is d times the posterior variance times the weight: 1 a pixel."""
    torch.manual_seed(0)

    class Zero(nn.Module):
        def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
            return torch.zeros_like(x)

    x0 = S * torch.randn(400_000, 1)
    method = DSM(fixed(0.9))
    loss, _ = method.loss(method.nets(ConsistencyModel(Zero())), x0, None, 0, 1)
    assert abs(loss - 1) < 0.01


@pytest.mark.parametrize(
    "method",
    [
        ICT(s0=160, s1=160, huber=C),
        ECT(LogNormal(-1.0, 1.0), Discretisation(2, 1), c=C),
        TCM(LogStudentT(0.0, 0.2, 0.01), Discretisation(2, 1), c=C, w_b=1.0),
    ],
    ids=["iCT", "ECT", "TCM"],
)
@pytest.mark.parametrize("start", [0.2, 1.0])
def test_training_converges_to_the_exact_solution(method, start):
    torch.manual_seed(0)
    student = model(S)
    nets = method.nets(student)
    student.net.theta.data.fill_(start)
    optimizer = torch.optim.Adam([student.net.theta], lr=2e-2)
    tail = []
    for n in range(600):
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - n / 600)
        loss, _ = method.loss(nets, S * torch.randn(512, 1, dtype=torch.float64), None, 6, 100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tail.append(student.net.theta.item())
    assert abs(sum(tail[-50:]) / 50 - S) < 0.03
    t = torch.full((1000,), 2.0, dtype=torch.float64)
    x = math.sqrt(S**2 + 4) * torch.randn(1000, 1, dtype=torch.float64)
    error = squared_l2(student(x, t), S / math.sqrt(S**2 + 4) * x).mean().sqrt()
    assert error < 0.1 * S
