"""Losses of CT, CD and CTM as the published codes compute them, for their own draws."""

import pytest
import torch
from distillation_setup import Replay, Sine
from golden_data import f32, golden
from scipy import stats

from onejump import losses, solvers
from onejump.methods.base import Nets, diffuse
from onejump.methods.cd import CD
from onejump.methods.ct import CT
from onejump.methods.ctm import CTM
from onejump.methods.dsm import DSM
from onejump.model import ConsistencyModel
from onejump.precond import CM, Euler
from onejump.times import HalfLogNormal, LogNormal, karras_grid

WEIGHTS = {
    "uniform": losses.uniform,
    "karras": losses.inverse_c_out_squared,
    "snr": losses.snr,
    "snr+1": losses.snr_plus_one,
    "truncated-snr": losses.truncated_snr,
}


def close(found, expected, rtol=1e-5):
    """Relative to the largest number, as an image's pixels pass zero."""
    expected = f32(expected)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= rtol


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_consistency_models(name):
    data = golden("cm_losses")
    t = f32(data["in/sigmas"])
    torch.testing.assert_close(WEIGHTS[name](t, t), f32(data[f"weight/{name}"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight", ["uniform", "karras"])
@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize("kind", ["distill", "ct"])
def test_loss_of_consistency_models(monkeypatch, kind, distance, weight):
    data, replay = golden("cm_losses"), Replay(monkeypatch)
    replay.index(16 - torch.from_numpy(data["in/indices"]))  # theirs counts from the top, and from the upper time
    replay.noise(f32(data["in/noise"]))
    student, target, teacher = (ConsistencyModel(F, jump=CM()) for F in (Sine(2.0, 0.1), Sine(1.7), Sine(1.3)))
    measure = {"l1": losses.mean_l1, "l2": losses.mean_l2}[distance]
    if kind == "ct":
        method, step = CT(s0=2, s1=17, distance=measure, weight=WEIGHTS[weight]), 10
        assert method.levels(step, 10) == 18
    else:
        method, step = CD(n=18, distance=measure, weight=WEIGHTS[weight]), 0
    nets = Nets(student, target, teacher=teacher)
    loss, stats_of = method.loss(nets, f32(data["in/x_start"]), None, step, 10)
    expected = f32(data[f"cd_loss/{distance}_{weight}_{kind}"])
    each = WEIGHTS[weight](stats_of["t"], stats_of["t"]) * stats_of["distance"]
    torch.testing.assert_close(each, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-6, atol=0)


def ctm_models(b=0.1, c=0.2):
    """(student, target) of CTM's golden numbers."""
    return tuple(ConsistencyModel(Sine(a, b, c), jump=Euler(), second_time=True) for a in (2.0, 1.7))


CTM_TEACHER = ConsistencyModel(Sine(1.3, 0.1))


def at_index(data, name):
    """x_t and its index on the ascending grid of 18, from the published code's descending one."""
    i = 17 - torch.from_numpy(data[name])
    t = karras_grid(18).float()[i]
    return diffuse(f32(data["in/x0"]), f32(data["in/noise"]), t), i, t


def test_ctm_jump_and_denoiser():
    data, (student, _) = golden("ctm"), ctm_models()
    x, _, t = at_index(data, "in/indices")
    s = karras_grid(18).float()[17 - torch.from_numpy(data["in/s_indices"])]
    close(student(x, t, s), data["ctm/edm_euler/G"], 1e-6)
    close(student.denoise(x, t, s), data["ctm/edm_euler/denoised"], 1e-6)
    close(ConsistencyModel(Sine(2.0, 0.1), jump=CM())(x, t), data["cm_mode/denoised"], 1e-6)
    close(CTM_TEACHER.denoise(x, t), data["teacher_mode/denoised"], 1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_ctm_heun_steps_of_the_teacher(steps):
    data = golden("ctm")
    grid, (x, i, _) = karras_grid(18).float(), at_index(data, f"heun/{steps}step_indices")
    for m in range(steps):
        x = solvers.heun(solvers.denoiser(CTM_TEACHER, None), x, grid[i - m], grid[i - m - 1])
    close(x, data[f"heun/{steps}step"], 1e-6)


def test_ctm_estimate_and_target_at_the_data(monkeypatch):
    """The inner jump of the target has the student's weights, both outer jumps the average's, at s = eps none."""
    data, replay, (student, target) = golden("ctm"), Replay(monkeypatch), ctm_models()
    i, s = (17 - torch.from_numpy(data[f"ctm_estimate/{name}"]) for name in ("indices", "s_indices"))
    replay.ctm_times(i, s, k=2)
    replay.noise(f32(data["in/noise"]))
    nets = Nets(student, target, teacher=CTM_TEACHER)
    estimate, at_target, t = CTM().at_the_data(nets, f32(data["in/x0"]), None, 0)
    close(estimate, data["ctm_estimate"])
    close(at_target, data["ctm_target/model_sg"])
    assert torch.equal(t, karras_grid(18).float()[i])
    assert (s == 0).sum() == 3 and (i - 2 == s).sum() == 4  # rows without an outer, and without an inner target jump


def test_ctm_denoising_loss(draws):
    """The published one is the mean over the pixels of an image, ours the sum: their ratio cancels in CTM's weight."""
    data, (student, _) = golden("ctm"), ctm_models()
    draws(f32(data["dsm/noise"]), data["dsm/sigmas"], LogNormal(-1.2, 1.2))
    method = DSM()
    loss, found = method.loss(method.nets(student), f32(data["in/x0"]), None, 0, 1)
    torch.testing.assert_close(loss / 192, f32(data["dsm_loss"]).mean(), rtol=1e-6, atol=0)
    weighted = losses.inverse_c_out_squared(found["t"], found["t"]) * found["distance"] / 192
    torch.testing.assert_close(weighted, f32(data["dsm_loss"]), rtol=1e-5, atol=0)


def test_ctm_noise_levels_of_the_denoising_loss(monkeypatch):
    data, replay = golden("ctm"), Replay(monkeypatch)
    normal = torch.from_numpy(stats.norm.cdf(data["halflognormal/draw0_randn"].astype("float64")))
    replay.uniform(torch.cat([normal, torch.from_numpy(data["halflognormal/draw1_rand"]).double()]))
    t = HalfLogNormal()(16)
    torch.testing.assert_close(t.float(), f32(data["halflognormal/sigmas"]), rtol=2e-6, atol=0)


@pytest.mark.parametrize(("n", "most", "share"), [(18, 17, 0.496), (40, 20, 0.150)])
def test_share_of_ctm_jumps_to_the_end(n, most, share):
    """P(s = eps), enumerated for the law of the test below."""
    weight = most * (most + 1) / 2
    found = sum(k / weight * sum(1 / (i - k + 1) for i in range(k, n)) / (n - k) for k in range(1, most + 1))
    assert abs(found - share) < 5e-4


@pytest.mark.parametrize(("n", "most"), [(18, 17), (40, 20)])
def test_ctm_draws_its_three_times_as_published(n, most):
    """t is uniform over the grid from its k-th time on, r is k times below it, s uniform over the times up to r."""
    torch.manual_seed(0)
    asked, ends = [], []

    class Spy(Sine):
        def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
            asked.append((4 * torch.stack([c_noise, c_noise_s])).exp())
            return super().forward(x, c_noise, c_noise_s, cond, key)

    student = ConsistencyModel(Spy(2.0), jump=Euler(), second_time=True)
    nets = Nets(student, lambda x, *times, cond, key: x, teacher=ConsistencyModel(Sine(1.3)))
    method = CTM(n=n, max_steps=most, solver=lambda denoise, x, t, r: ends.append(r) or x)
    grid, errors = karras_grid(n).float(), []
    for step in range(300):
        asked.clear(), ends.clear()
        method.at_the_data(nets, torch.zeros(200, 1), None, step)
        k, (t, s) = len(ends), asked[0]
        i, j = (torch.searchsorted(grid, time * 0.999) for time in (t, s))
        assert k <= most and torch.equal(ends[-1], grid[i - k]) and (j <= i - k).all()
        at_end = (j == 0).float() - sum(1 / (m - k + 1) for m in range(k, n)) / (n - k)
        errors.append(torch.stack([i - (k + n - 1) / 2, j - (i - k) / 2, at_end]))
    errors = torch.cat(errors, dim=1)
    assert (errors.mean(1).abs() < 4 * errors.std(1) / errors.shape[1] ** 0.5).all()
