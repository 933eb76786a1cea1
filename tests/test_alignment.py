"""Gaps against closed forms: Gaussian data, where exact jumps are known, and a mixture, where the flow is."""

import math

import pytest
import torch
from gaussian_mixture import exact_teacher, random_mixture, single

from onejump.alignment import NEAR, alignment, coefficients, flow, jumps_of, kinds, mean_by_kind
from onejump.analytic import estimate
from onejump.analytic_jump import Analytic, Gaussian
from onejump.analytic_table import Estimator
from onejump.model import ConsistencyModel
from onejump.precond import CM, Euler, ToData
from onejump.solvers import denoiser
from onejump.times import karras_grid

MEAN, STD, T = 0.3, 0.5, 80.0
GRID = karras_grid(8)
DATA = single(MEAN, STD)
BOTH = {"backward": Gaussian(), "forward": Gaussian(form="forward"), "Euler": Euler()}


def start(data, n=40):
    """x_T of n trajectories."""
    eps = torch.randn(n, len(data.variance), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return data.sample(n) + T * eps


def largest(values):
    return values[~values.isnan()].max().item()


@pytest.fixture(scope="module")
def found():
    return alignment(exact_teacher(DATA), BOTH, start(DATA), None, GRID, substeps=64)


def test_the_exact_jump_of_gaussian_data_leaves_no_gap(found):
    """Backward to the denoiser at the end, forward to the one at the start, and only so."""
    assert largest(found.gaps["backward"].to_end) < 6e-5 and largest(found.gaps["forward"].to_start) < 6e-5
    assert largest(found.gaps["forward"].untrained) < 6e-5
    assert largest(found.gaps["backward"].to_start) > 0.1 and largest(found.gaps["forward"].to_end) > 0.1


def test_eulers_gap_on_gaussian_data_is_the_closed_form(found):
    """With y = x_t - m and r = sqrt((c^2 + s^2) / (c^2 + t^2)): D* = m + (r - s/t) / (1 - s/t) y."""
    t, s = GRID[:, None], GRID[None, :]
    var_t, var_s = STD**2 + t**2, STD**2 + s**2
    r = (var_s / var_t).sqrt()
    best = (r - s / t) / (1 - s / t)
    y = (start(DATA) - MEAN).square().mean().sqrt() * (var_t / (STD**2 + T**2)).sqrt()
    down = kinds(GRID)["all"]
    for ours, exact in (
        (found.gaps["Euler"].to_end, (best - STD**2 / var_s * r).abs() * y),
        (found.gaps["Euler"].to_start, (best - STD**2 / var_t).abs() * y),
        (found.gaps["Euler"].untrained, (1 - s / t) * (best - STD**2 / var_t).abs() * y),
    ):
        assert torch.allclose(ours[down], exact[down], rtol=0, atol=6e-5)
        assert ours[~down].isnan().all()


def test_a_table_of_the_gaussians_statistics_tends_to_its_closed_form():
    t = torch.logspace(math.log10(T), math.log10(0.002), 481, dtype=torch.float64)
    l_t = STD**2 / (STD**2 + t**2)
    table = Analytic(tuple(l_t.tolist()), tuple((-2 * l_t).tolist()))
    gap = alignment(exact_teacher(DATA), {"table": table}, start(DATA), None, GRID, substeps=64).gaps["table"]
    assert largest(gap.to_end) < 5e-4


def test_a_student_that_is_its_teacher_makes_the_untrained_errors(found):
    teacher = exact_teacher(DATA)
    for name, jump in BOTH.items():
        student = ConsistencyModel(teacher.net, jump=jump, second_time=True)
        error = alignment(teacher, {}, start(DATA), None, GRID, substeps=64, student=student).student
        assert torch.allclose(error, found.gaps[name].untrained, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_only_jumps_that_a_student_makes_are_asked_of_it():
    net = exact_teacher(DATA).net
    down, to_eps = kinds(GRID)["all"], kinds(GRID)["to eps"]
    assert jumps_of(ConsistencyModel(net, jump=Euler(), second_time=True), GRID).equal(down)
    assert jumps_of(ConsistencyModel(net, jump=CM()), GRID).equal(to_eps)
    truncated = jumps_of(ConsistencyModel(net, jump=ToData(), t_min=1.0), GRID)
    assert truncated.equal(to_eps & (GRID >= 1)[:, None])
    student = ConsistencyModel(net, jump=CM())
    error = alignment(exact_teacher(DATA), {}, start(DATA), None, GRID, 4, student).student
    assert error.isnan().equal(~to_eps)


def test_the_flow_is_the_exact_one_and_its_error_is_told():
    data = random_mixture(d=6, k=4, mean=0.2, power=1.0)
    teacher, xT = exact_teacher(data), start(data)
    exact = data.flow(xT, GRID.flip(0), substeps=64)
    ours = list(flow(denoiser(teacher, None), xT, GRID, 32))
    off = max((u - v).square().mean().sqrt().item() for u, v in zip(ours, exact, strict=True))
    told = alignment(teacher, {}, xT, None, GRID, 32).flow_error
    assert off < 1e-3 and 0.7 < told / off < 1.4


def test_batches_change_nothing_and_progress_counts_every_pass():
    data = random_mixture(d=6, k=4, mean=0.2, power=1.0)
    teacher, xT = exact_teacher(data), start(data)
    student, calls, told = ConsistencyModel(teacher.net, jump=Euler(), second_time=True), [0], []

    def count(module, args, output):
        calls[0] += 1

    teacher.net.register_forward_hook(count)
    arguments = (teacher, BOTH, xT, None, GRID, 4, student)
    whole = alignment(*arguments)
    calls[0] = 0
    parts = alignment(*arguments, batch=15, progress=lambda done, total: told.append((done, total)))
    for name in BOTH:
        for kind in ("to_end", "to_start", "untrained"):
            one, other = (getattr(found.gaps[name], kind) for found in (whole, parts))
            assert torch.allclose(one, other, rtol=1e-9, equal_nan=True)
    assert torch.allclose(whole.student, parts.student, rtol=1e-9, equal_nan=True)
    assert told == [(k + 1, calls[0]) for k in range(calls[0])]


def test_labels_reach_teacher_and_student():
    """Class 1 lies elsewhere: its trajectories under its own label are those of a teacher of that class alone."""

    class TwoClasses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = torch.nn.ModuleList([exact_teacher(single(mean, STD)).net for mean in (MEAN, -0.6)])

        def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
            both = torch.stack([net(x, c_noise) for net in self.nets])
            return both[cond, torch.arange(len(x))]

    both, alone, xT = ConsistencyModel(TwoClasses()), exact_teacher(single(-0.6, STD)), start(DATA)
    ones = torch.ones(len(xT), dtype=torch.int64)
    students = [ConsistencyModel(model.net, jump=Euler(), second_time=True) for model in (both, alone)]
    labelled = alignment(both, {"Euler": Euler()}, xT, ones, GRID, 4, students[0], batch=16)
    plain = alignment(alone, {"Euler": Euler()}, xT, None, GRID, 4, students[1], batch=16)
    assert torch.allclose(labelled.gaps["Euler"].to_end, plain.gaps["Euler"].to_end, equal_nan=True)
    assert torch.allclose(labelled.student, plain.student, equal_nan=True)


def test_every_jump_is_of_one_kind():
    grid = karras_grid(18)
    masks = kinds(grid)
    assert {kind: int(mask.sum()) for kind, mask in masks.items()} == {"all": 153, "near": 43, "mid": 93, "to eps": 17}
    assert (masks["near"].int() + masks["mid"].int() + masks["to eps"].int()).equal(masks["all"].int())
    ratio = grid[:, None] / grid
    assert ratio[masks["near"]].max() <= NEAR < ratio[masks["mid"]].min()
    a, _ = coefficients(Euler(), grid)
    means = mean_by_kind(a, grid)
    assert means["near"] == pytest.approx((1 / ratio)[masks["near"]].mean().item())
    assert means["all"] == pytest.approx((1 / ratio)[masks["all"]].mean().item())
    assert math.isnan(mean_by_kind(torch.full_like(a, torch.nan), grid)["mid"])


def test_a_teachers_own_statistics_bring_its_optimal_student_nearer():
    """On a mixture like images, with means away from 0: smaller gaps for jumps of every kind, as the paper claims."""
    data = random_mixture(d=64, k=20, mean=0.2, power=1.5)
    teacher, grid = exact_teacher(data), karras_grid(18)
    table = estimate(teacher, data.sample(512, seed=3), None, Estimator(40, 512))
    jumps = {"Euler": Euler(), "backward": table.jump(), "forward": table.jump("forward")}
    gaps = alignment(teacher, jumps, start(data), None, grid, 16).gaps
    for name, end, most in (("backward", "to_end", 0.8), ("forward", "to_start", 0.6)):
        ours, euler = (mean_by_kind(getattr(gaps[n], end), grid) for n in (name, "Euler"))
        assert ours["all"] < most * euler["all"]
        assert all(ours[kind] < 0.9 * euler[kind] for kind in euler)
    assert mean_by_kind(gaps["backward"].to_end, grid)["to eps"] < 1e-4
