"""CD, CTM and continuous time on data N(0, C^2), where flow, teacher and student are known exactly."""

import math

import pytest
import torch
from distillation_setup import (
    EPS,
    C,
    Exact,
    Replay,
    exact_cm,
    exact_ctm,
    flow,
    gaussian,
    order,
    shrink,
    teacher,
)

from onejump import solvers
from onejump.analytic_jump import Gaussian
from onejump.losses import mean_l1, mean_l2
from onejump.methods.base import Nets, diffuse
from onejump.methods.cd import CD
from onejump.methods.continuous import ContinuousCD, ContinuousCT, slope
from onejump.methods.ct import CT
from onejump.methods.ctm import CTM
from onejump.model import ConsistencyModel
from onejump.times import KarrasUniform
from onejump.types import UserError


def with_backward_jump():
    jump = Gaussian(C, EPS)
    return ConsistencyModel(Exact(jump), jump=jump, second_time=True)


def with_forward_jump():
    """The plain denoiser of N(0, C^2), whatever s: Analytic-Precond's jump is exact with it."""
    return ConsistencyModel(teacher().net, jump=Gaussian(C, EPS, "forward"), second_time=True)


CTM_STUDENTS = {"euler": exact_ctm, "gaussian backward": with_backward_jump, "gaussian forward": with_forward_jump}


@pytest.mark.parametrize("make", CTM_STUDENTS.values(), ids=CTM_STUDENTS)
def test_jumps_of_the_exact_student_are_exact_for_any_end(make):
    student, x = make(), gaussian(200)
    t = torch.logspace(math.log10(0.003), math.log10(80), 200, dtype=torch.float64)
    for part in (0.0, 0.1, 0.5, 0.999):
        s = EPS * (t / EPS) ** part
        torch.testing.assert_close(student(x, t, s), shrink(t, s)[:, None] * x, rtol=1e-8, atol=0)


def test_under_the_backward_jump_the_network_predicts_the_denoiser_at_the_end():
    """D(x_t, t, s) = D(x_s, s), x_s on the ODE through x_t: that is what its closed form a, b are made for."""
    x, t = gaussian(50), torch.logspace(-2, 1.9, 50, dtype=torch.float64)
    s = t / 3
    x_s = shrink(t, s)[:, None] * x
    torch.testing.assert_close(with_backward_jump().denoise(x, t, s), teacher().denoise(x_s, s), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", [CD(solver=flow), CD(n=40, mu=0.95, solver=flow, distance=mean_l1)])
def test_cd_vanishes_at_the_exact_solution(method):
    torch.manual_seed(0)
    nets = method.nets(exact_cm(), teacher())
    loss, _ = method.loss(nets, gaussian(512), None, 0, 1)
    assert 0 <= loss <= 1e-8
    nets.student.net.theta.data.fill_(0.6)
    assert method.loss(nets, gaussian(512), None, 0, 1)[0] > 1e-5


@pytest.mark.parametrize("make", CTM_STUDENTS.values(), ids=CTM_STUDENTS)
def test_consistency_part_of_ctm_vanishes_at_the_exact_solution(make):
    torch.manual_seed(0)
    method = CTM(solver=flow)
    nets = method.nets(make(), teacher())
    for step in range(5):
        _, stats = method.loss(nets, gaussian(256), None, step, 10)
        assert stats["distance"].mean() <= 1e-8
        estimate, target, t = method.at_the_data(nets, gaussian(256), None, step)
        assert target.flatten(1).norm(dim=1).min() > 1e-3  # and not for want of a signal
    nets.student.net.theta.data.fill_(0.8)
    assert method.loss(nets, gaussian(256), None, 0, 10)[1]["distance"].mean() > 1e-5


ORDERS = [(solvers.euler, 2), (solvers.heun, 3), (solvers.dpm2, 3)]


@pytest.mark.parametrize(("solver", "expected"), ORDERS)
def test_distance_of_cd_falls_with_the_error_of_one_solver_step(monkeypatch, solver, expected):
    """Over all pairs of the grid: one order more than the solver's, as its steps are not added up."""
    errors = []
    for n in (321, 641, 1281):
        method, replay = CD(n=n, solver=solver), Replay(monkeypatch)
        replay.index(torch.arange(n - 1))
        replay.noise(gaussian(n - 1) * 0 + 1)
        _, stats = method.loss(method.nets(exact_cm(), teacher()), gaussian(n - 1) * 0 + 0.3, None, 0, 1)
        errors.append(stats["distance"].mean().sqrt().item())
        monkeypatch.undo()
    assert all(abs(found - expected) < 0.1 for found in order(errors))


@pytest.mark.parametrize(("solver", "expected"), [(solvers.euler, 1), (solvers.heun, 2), (solvers.dpm2, 2)])
def test_distance_of_ctm_falls_with_the_error_of_the_solver(monkeypatch, solver, expected):
    """From t = 80 to r at an eighth of the grid, in more and more steps."""
    errors = []
    for n in (161, 321, 641):
        method, replay, k = CTM(n=n, max_steps=n - 1, solver=solver), Replay(monkeypatch), 7 * (n - 1) // 8
        replay.noise(gaussian(1) * 0 + 1)
        replay.ctm_times(torch.tensor([n - 1]), torch.tensor([(n - 1) // 16]), k=k)
        nets = method.nets(exact_ctm(), teacher())
        estimate, target, t = method.at_the_data(nets, gaussian(1) * 0, None, 0)
        errors.append((estimate - target).abs().max().item())
        assert t == 80
        monkeypatch.undo()
    assert all(abs(found - expected) < 0.1 for found in order(errors))


@pytest.mark.parametrize("make", [exact_cm, *CTM_STUDENTS.values()])
@pytest.mark.parametrize("t", [0.003, 0.3, 2.0, 60.0])
def test_df_dt_is_zero_along_the_ode_at_the_exact_solution(make, t):
    student = make()
    x, t = gaussian(8), torch.full((8,), t, dtype=torch.float64)
    dx = (x - teacher().denoise(x, t)) / t[:, None]
    f, df = slope(student, x, t, dx, None)
    assert df.abs().max() <= 1e-8
    torch.testing.assert_close(f, student(x, t), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("distance", "stop_gradient"), [(mean_l2, False), (mean_l2, True), (mean_l1, False)])
def test_continuous_cd_vanishes_at_the_exact_solution(distance, stop_gradient):
    torch.manual_seed(0)
    method = ContinuousCD(distance=distance, stop_gradient=stop_gradient)
    student = exact_cm()
    nets = method.nets(student, teacher())
    loss, stats = method.loss(nets, gaussian(256), None, 0, 1)
    assert loss.abs() <= 1e-8 and stats["distance"].max() <= 1e-8
    student.net.theta.data.fill_(0.6)
    assert method.loss(nets, gaussian(256), None, 0, 1)[0].abs() > 1e-5


def waves(x, y):
    """A distance whose Hessian at y = x is not constant: 2 cos(x)^2 w, w = 1, 2, ... over the elements."""
    w = torch.arange(1.0, 1 + x[0].numel(), dtype=x.dtype)
    return (w * (x.sin() - y.sin()).flatten(1).square()).sum(1)


class Wide(torch.nn.Module):
    """A smooth network of three weights that reads x and t."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.7, -0.4, 0.9], dtype=torch.float64))

    def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
        return self.w[0] * torch.sin(x + c_noise[:, None]) + self.w[1] * x * c_noise[:, None] + self.w[2] * x.roll(1, 1)


def gradient(method, nets, x0):
    nets.student.zero_grad()
    method.loss(nets, x0, None, 1, 1)[0].backward()
    return nets.student.net.w.grad.clone()


@pytest.mark.parametrize("distance", [mean_l2, waves])
@pytest.mark.parametrize("distilled", [True, False], ids=["CD", "CT"])
@pytest.mark.parametrize("part", [0.125, 0.5, 0.875])
def test_pseudo_loss_has_the_gradient_of_the_discrete_loss_as_r_goes_to_t(monkeypatch, distilled, distance, part):
    """Over (t - r), at one t and ever finer grids; for l2 our Hessian is 1 and that of the mean over d pixels 2 / d."""
    replay, x0, d = Replay(monkeypatch), gaussian(6, (4,)), 4
    replay.noise(gaussian(6, (4,), seed=1) / C)
    student = ConsistencyModel(Wide(), jump=exact_cm().jump)
    nets = Nets(student, student, teacher=teacher())
    replay.uniform(torch.full((6,), part, dtype=torch.float64))
    continuous = (ContinuousCD if distilled else ContinuousCT)(distance=distance, stop_gradient=True)
    expected = gradient(continuous, nets, x0) * (2 / d if distance is mean_l2 else 1)
    errors = []
    for n in (401, 801, 1601):
        weight = {"distance": distance, "weight": lambda t, r: 1 / (t - r)}
        method = CD(n=n, solver=flow, **weight) if distilled else CT(s0=2, s1=n - 1, **weight)
        i = round(part * (n - 1))
        replay.index(torch.full((6,), i - 1))
        errors.append(((gradient(method, nets, x0) - expected).norm() / expected.norm()).item())
    assert errors[-1] < 0.02 and all(abs(found - 1) < 0.1 for found in order(errors))


@pytest.mark.parametrize("method", [ContinuousCT, ContinuousCD])
def test_a_pseudo_loss_without_a_gradient_is_refused(method):
    with pytest.raises(UserError, match="mean_l1 has no gradient under stop_gradient=true"):
        method(distance=mean_l1, stop_gradient=True)


def test_without_stop_gradient_the_loss_is_the_size_of_the_slope(monkeypatch):
    replay, x0 = Replay(monkeypatch), gaussian(6, (4,))
    replay.noise(gaussian(6, (4,), seed=1) / C)
    replay.uniform(torch.full((6,), 0.6, dtype=torch.float64))
    student = ConsistencyModel(Wide(), jump=exact_cm().jump)
    t = KarrasUniform().quantile(torch.full((6,), 0.6, dtype=torch.float64))
    xt = diffuse(x0, gaussian(6, (4,), seed=1) / C, t)
    h = 1e-5 * t
    xu, xr = (xt * shrink(t, t + sign * h)[:, None] for sign in (1, -1))
    df = (student(xu, t + h) - student(xr, t - h)) / (2 * h)[:, None]
    f = student(xt, t)
    H = 2 * torch.arange(1.0, 5.0) * f.cos() ** 2
    for distance, expected in ((mean_l2, df.norm(dim=1)), (mean_l1, df.abs().mean(1)), (waves, (H * df**2).sum(1))):
        method = ContinuousCD(distance=distance, stop_gradient=False)
        loss, stats = method.loss(method.nets(student, teacher()), x0, None, 0, 1)
        torch.testing.assert_close(loss, expected.mean(), rtol=1e-6, atol=0)
        torch.testing.assert_close(stats["distance"], df.norm(dim=1), rtol=1e-6, atol=0)


SIGNS = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)


@pytest.mark.parametrize("part", [0.1, 0.4, 0.8])
def test_continuous_ct_is_stationary_at_the_exact_solution(monkeypatch, part):
    """Four samples with the exact second moments of (x0, eps): the expectation, exactly."""
    replay, method, found = Replay(monkeypatch), ContinuousCT(), {}
    replay.noise(SIGNS[:, 1:])
    replay.uniform(torch.full((4,), part, dtype=torch.float64))
    for theta in (C, 0.8 * C, 1.25 * C):
        student = exact_cm(theta)
        method.loss(method.nets(student), C * SIGNS[:, :1], None, 0, 1)[0].backward()
        found[theta] = student.net.theta.grad.item()
    exact, below, above = found.values()
    assert below < 0 < above  # descent raises a theta that is too small, and lowers one too large
    assert abs(exact) < 1e-10 * min(-below, above)


def test_ct_is_stationary_at_the_exact_solution_to_first_order_in_the_grid(monkeypatch):
    """Over all pairs of the grid, with the exact second moments; relative to the pull from a wrong theta."""
    errors = []
    for n in (161, 321, 641):
        replay, found, method = Replay(monkeypatch), [], CT(s0=2, s1=n - 1)
        replay.noise(SIGNS[:, 1:].repeat(n - 1, 1))
        replay.index(torch.arange(n - 1).repeat_interleave(4))
        for theta in (C, 0.8 * C, 1.25 * C):
            nets = method.nets(exact_cm(theta))
            method.loss(nets, C * SIGNS[:, :1].repeat(n - 1, 1), None, 1, 1)[0].backward()
            found.append(nets.student.net.theta.grad.item())
        exact, below, above = found
        assert below < 0 < above
        errors.append(abs(exact) / min(-below, above))
        monkeypatch.undo()
    assert errors[-1] < 0.06 and all(abs(found - 1) < 0.1 for found in order(errors))


TRAINED = {
    "CD": CD(solver=flow),
    "CD with an average": CD(mu=0.5, solver=flow),
    "CTM": CTM(mu=0.9, solver=flow),
    "continuous CT": ContinuousCT(),
    "continuous CD": ContinuousCD(stop_gradient=True),
    "continuous CD, whole gradient": ContinuousCD(),
}


@pytest.mark.parametrize("method", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("start", [0.3, 0.9])
def test_training_converges_to_the_exact_solution(method, start):
    torch.manual_seed(0)
    distilled = not isinstance(method, ContinuousCT)
    student = exact_ctm(start) if isinstance(method, CTM) else exact_cm(start)
    nets = method.nets(student, teacher()) if distilled else method.nets(student)
    optimizer, tail, steps = torch.optim.Adam(student.parameters(), lr=3e-2), [], 250
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / steps)
        loss, _ = method.loss(nets, gaussian(256, (1,), seed=step), None, step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if nets.average:
            p = nets.average.decay(step, steps)
            nets.average.model.net.theta.data.lerp_(student.net.theta.data, 1 - p)
        tail.append(student.net.theta.item())
    assert abs(sum(tail[-50:]) / 50 - C) < 0.03
