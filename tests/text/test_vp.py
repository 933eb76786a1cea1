"""Stable Diffusion's noise levels, times that keep to them, and its network as a denoiser."""

import pytest
import torch
from tiny_stable_diffusion import LEVELS, diffusers

from onejump.config_json import from_json
from onejump.draws import rows
from onejump.precond import StableDiffusion
from onejump.times import AtLevels, Discretisation, LevelSteps, LogNormal, LogStudentT
from onejump.types import UserError
from onejump.vp import VPSchedule


@pytest.mark.parametrize("spacing", ["scaled_linear", "linear"])
def test_the_levels_are_those_of_diffusers_schedulers(spacing):
    levels = LEVELS | {"beta_schedule": spacing}
    theirs = diffusers.EulerDiscreteScheduler(**levels)
    theirs.set_timesteps(1000)
    ours = VPSchedule(spacing=spacing)
    torch.testing.assert_close(ours.sigmas.flip(0).float(), theirs.sigmas[:-1], rtol=2e-5, atol=0)
    assert theirs.timesteps[0] == 999 and ours.nearest(theirs.sigmas[:-1]).tolist() == list(range(999, -1, -1))


def test_stable_diffusions_ends_are_the_published_ones():
    assert VPSchedule().sigma_min == pytest.approx(0.0292, abs=5e-5)
    assert VPSchedule().sigma_max == pytest.approx(14.6146, abs=5e-5)


def test_nearest_is_nearest_by_ratio_also_outside_the_range():
    schedule = VPSchedule()
    t = torch.tensor([0.0, 0.01, 0.5, 1.0, 3.3, 14.6, 100.0], dtype=torch.float64)
    far = (schedule.sigmas[None].log() - t.clamp_min(1e-9).log()[:, None]).abs()
    assert torch.equal(schedule.nearest(t), far.argmin(1))


def test_a_grid_of_n_times_starts_at_the_data_and_ends_at_the_top():
    schedule = VPSchedule()
    grid, sigmas = schedule.spread(51), schedule.sigmas
    index = [sigmas.tolist().index(sigma) for sigma in grid[1:].tolist()]
    assert grid[0] == 0 and index == list(range(19, 1000, 20))
    assert torch.equal(schedule.spread(1001)[1:], sigmas)
    with pytest.raises(UserError, match="1 times; 2 to 1001"):
        schedule.spread(1)


@pytest.mark.parametrize(("prediction", "alpha_weight"), [("epsilon", None), ("v_prediction", True)])
def test_the_denoiser_of_an_exact_prediction_is_the_data(prediction, alpha_weight):
    """c_skip x + c_out F = x0 where F is eps, or v = alpha eps - sigma x0, in variance-preserving terms."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.0, 0.03, 0.5, 1.0, 5.0, 14.6], dtype=torch.float64)
    alpha, sigma = 1 / (1 + t**2).sqrt(), t / (1 + t**2).sqrt()
    F = alpha * eps - sigma * x0 if alpha_weight else eps
    c_skip, c_out, c_in, c_noise = StableDiffusion(prediction)(t)
    xt = x0 + t * eps
    torch.testing.assert_close(c_skip * xt + c_out * F, x0)
    torch.testing.assert_close(c_in * xt, alpha * x0 + sigma * eps)
    assert torch.equal(c_noise, VPSchedule().nearest(t).double())


@pytest.mark.parametrize("times", [LogNormal(-0.8, 1.6), LogStudentT()])
def test_times_are_levels_of_the_range_and_as_frequent_as_the_distribution_says(times):
    schedule, n = VPSchedule(), 20_000
    low, high = schedule.near(1.0), schedule.sigma_max
    with rows(0, 1, n):
        torch.manual_seed(0)
        t = AtLevels(times)(n, low, 80.0)
        torch.manual_seed(0)
        plain = times(n, low, high)
    sigmas = schedule.sigmas
    assert torch.isin(t, sigmas).all() and t.min() == low and t.max() == high
    assert ((t.log() - plain.log()).abs() <= sigmas.log().diff().max() / 2 + 1e-9).all()
    with pytest.raises(UserError, match=r"no noise level .* in \[50, 80\]"):
        AtLevels(times)(4, 50.0, 80.0)


@pytest.mark.parametrize("step", [0, 30_000, 10**6])
def test_r_is_the_level_at_or_below_delta_t_and_always_below_t(step):
    delta, schedule = Discretisation(q=2, double_every=10_000, ratio_limit=0.9999), VPSchedule()
    t = schedule.sigmas.float()
    r = LevelSteps(delta, schedule).r(t, step)
    levels = torch.cat([torch.zeros(1), t])
    assert torch.isin(r, levels).all() and (r < t).all()
    continuous = delta.r(t, step)
    for k in range(0, 1000, 37):
        allowed = levels[(levels <= continuous[k]) & (levels < t[k])]
        assert r[k] == allowed.max()
    if step == 10**6:  # finer than the schedule: every step goes to the next level
        assert torch.equal(r[500:], t[499:-1])


def test_schedules_that_are_none_are_refused():
    for values, told in (({"beta_start": 0.5, "beta_end": 0.1}, "beta_start: 0.5"), ({"n": 1}, "n: 1")):
        with pytest.raises(UserError, match=told):
            VPSchedule(**values)
    for content in ({"type": "VPSchedule", "spacing": "x"}, {"type": "StableDiffusion", "prediction": "sample"}):
        with pytest.raises(UserError, match="none of"):
            from_json(content)
