import math
import random

import numpy as np
import pytest
import torch
from golden_data import f64, golden
from scipy import stats

from onejump.times import (
    Discretisation,
    HalfLogNormal,
    KarrasUniform,
    LogNormal,
    LogStudentT,
    _student_t_table,
    ct_decay,
    ct_levels,
    ict_levels,
    karras_grid,
    lognormal_index,
    lognormal_pmf,
    random_steps,
)
from onejump.types import UserError


@pytest.mark.parametrize("n", [2, 10, 18, 40])
def test_karras_grid_equals_the_published_codes(n):
    expected = golden("samplers")[f"karras_grid/{n}"][::-1].copy()
    torch.testing.assert_close(karras_grid(n), f64(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [400_000, 800_000])
def test_ict_curriculum_doubles_as_published(steps):
    data = golden("ict")
    at = data[f"LYMDLUT/iCT_curriculum/K{steps}_steps"]
    expected = data[f"iCT_N(k)/K{steps}"]
    assert [ict_levels(int(k), steps, 10, 1280) for k in at] == expected.tolist()


def test_ict_curriculum_levels_at_each_eighth():
    levels = [ict_levels(k, 400_000, 10, 1280) for k in range(0, 400_000, 50_000)]
    assert levels == [11, 21, 41, 81, 161, 321, 641, 1281]


CT_RUNS = [  # name of the published run, s0, s1, mu0; steps at which it is on file
    ("curriculum/adaptive_progressive_cifar", 2, 150, 0.9, "curriculum/steps"),
    ("curriculum/adaptive_progressive_imagenet", 2, 200, 0.95, "curriculum/steps"),
    ("curriculum/adaptive_full_every1000", 2, 150, 0.9, None),
    ("jax/ct_adaptive", 2, 150, 0.9, "jax/ct_adaptive/steps"),
    ("jax/ct_adaptive/every1000", 2, 150, 0.9, None),
]


@pytest.mark.parametrize(("name", "s0", "s1", "mu0", "at"), CT_RUNS, ids=[run[0] for run in CT_RUNS])
def test_ct_curriculum_and_decay_equal_the_published_codes(name, s0, s1, mu0, at):
    data, join = golden("cm_losses"), "_" if name == "jax/ct_adaptive/every1000" else "/"
    steps = range(0, 800_001, 1000) if at is None else data[at].tolist()
    levels = [ct_levels(k, 800_000, s0, s1) for k in steps]
    assert levels == data[f"{name}{join}scales"].tolist()
    decays = [ct_decay(n, s0, mu0) for n in levels]
    np.testing.assert_allclose(decays, data[f"{name}{join}ema"], rtol=1e-7 if "jax" in name else 1e-12)


def test_ct_curriculum_goes_from_s0_to_s1_whatever_they_are():
    for s0, s1, steps in [(2, 150, 800_000), (10, 10, 7), (1, 5, 100), (3, 640, 1000)]:
        levels = [ct_levels(k, steps, s0, s1) for k in range(0, steps + 1, max(steps // 1000, 1))]
        assert levels[0] == max(s0 - 1, 1) + 1 and levels[-1] == s1 + 1 and levels == sorted(levels)


@pytest.mark.parametrize("most", [1, 17, 39])
def test_random_steps_have_probabilities_proportional_to_themselves(most):
    n = 40_000
    share = np.bincount([random_steps(step, most) for step in range(n)], minlength=most + 1) / n
    p = np.arange(most + 1) / (most * (most + 1) / 2)
    assert (np.abs(share - p) <= 4.5 * np.sqrt(p * (1 - p) / n)).all()
    mean, variance = (p * np.arange(most + 1)).sum(), (p * np.arange(most + 1) ** 2).sum()
    assert mean == pytest.approx((2 * most + 1) / 3)
    assert abs(share @ np.arange(most + 1) - mean) < 4.5 * math.sqrt((variance - mean**2) / n) + 1e-12


def test_random_steps_follow_from_the_step_alone():
    first = [random_steps(step, 17) for step in range(50)]
    random.seed(3), torch.manual_seed(3)
    state = random.getstate()
    assert [random_steps(step, 17) for step in range(50)] == first and random.getstate() == state
    assert len({tuple(first[i : i + 3]) for i in range(48)}) > 40  # and neighbours share nothing


def test_karras_uniform_is_the_grid_in_continuous_time():
    law = KarrasUniform()
    u = torch.linspace(0, 1, 41, dtype=torch.float64)
    torch.testing.assert_close(law.quantile(u), karras_grid(41), rtol=1e-12, atol=0)
    torch.manual_seed(0)
    t = law(40_000)
    u = (t ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    assert t.dtype == torch.float64 and stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    assert 0.002 <= t.min() and t.max() <= 80


@pytest.mark.parametrize("n", [1, 7, 20_000])
def test_half_lognormal_is_half_lognormal_and_half_the_top_of_the_grid(n):
    torch.manual_seed(0)
    law = HalfLogNormal()
    t = law(n)
    low, high = t[: n // 2], t[n // 2 :]
    assert len(t) == n and (high >= law.karras.quantile(torch.tensor(0.3))).all() and (high <= 80).all()
    if n > 1000:
        assert stats.kstest(low.log().numpy(), "norm", (-1.2, 1.2)).pvalue > 1e-3
        u = (high ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
        assert stats.kstest(u.numpy(), "uniform", (0.3, 0.7)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KarrasUniform(sigma_min=0.0), "sigma_min: 0; more than 0"),
        (lambda: KarrasUniform(sigma_max=0.001), "sigma_max: 0.001; more than 0.002"),
        (lambda: HalfLogNormal(top=0.0), "top: 0; .*more than 0"),
        (lambda: HalfLogNormal(top=1.5), "top: 1.5; .*1 or less"),
    ],
)
def test_time_laws_without_mass_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("n", [11, 21, 81, 1281])
def test_lognormal_mass_on_the_grid(n):
    expected = f64(golden("ict")[f"lognormal_pmf/N{n}"])  # from a float32 grid
    torch.testing.assert_close(
        lognormal_pmf(karras_grid(n), -1.1, 2.0), expected, rtol=2e-3 if n > 80 else 1e-4, atol=0
    )


def test_lognormal_mass_of_the_finest_grid():
    p = lognormal_pmf(karras_grid(1281), -1.1, 2.0)
    assert abs(p[0] - 1.4982e-4) < 5e-9
    assert abs(p[-1] - 2.0109e-5) < 5e-10


def test_lognormal_index_follows_its_mass():
    torch.manual_seed(0)
    grid = karras_grid(11)
    n = 200_000
    share = lognormal_index(grid, n, -1.1, 2.0).bincount(minlength=10) / n
    p = lognormal_pmf(grid, -1.1, 2.0)
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_truncated_lognormal_quantiles():
    data = golden("tcm")
    u = f64(data["t_sampler/u_grid"])
    t = LogNormal(-1.1, 2.0).quantile(u, 0.002, 80.0)
    torch.testing.assert_close(t.log(), f64(data["t_sampler/truncnorm_quantiles"]), rtol=1e-9, atol=1e-9)


def test_untruncated_lognormal_moments():
    torch.manual_seed(0)
    log_t = LogNormal(-1.1, 2.0)(400_000).log()
    assert abs(log_t.mean() + 1.1) < 5 * 2 / 400_000**0.5
    assert abs(log_t.std() - 2.0) < 5 * 2 / 800_000**0.5


def test_truncated_log_student_t_quantiles():
    data = golden("tcm")
    u = f64(data["t_sampler/u_grid"])
    t = LogStudentT(0.0, 0.2, 0.01).quantile(u, 1.0, 80.0)
    torch.testing.assert_close(t.log(), f64(data["t_sampler/truncated_t_quantiles(df.01)"]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("mu", "sigma", "df"), [(0.0, 0.2, 0.01), (0.0, 0.2, 2.0), (-0.3, 2.0, 1e4)])
def test_log_student_t_table_is_the_exact_inverse_between_its_nodes(mu, sigma, df):
    u = torch.rand(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = LogStudentT(mu, sigma, df).quantile(u, 1.0, 80.0)
    student = stats.t(df)
    a, b = student.cdf((math.log(1.0) - mu) / sigma), student.cdf((math.log(80.0) - mu) / sigma)
    exact = np.exp(mu + sigma * student.ppf(a + (b - a) * u.numpy()))
    np.testing.assert_allclose(t.numpy(), exact, rtol=1e-6)


LIGHT_TAILS = [(0.0, 0.2, 1e4), (0.0, 0.5, 30.0)]  # 1 - F(ln 80 / sigma) is 0, or 1e-10, beside F = 1


@pytest.mark.parametrize(("mu", "sigma", "df"), [*LIGHT_TAILS, (0.0, 0.2, 0.01), (0.0, 0.2, 2.0), (6.0, 0.2, 1e4)])
def test_log_student_t_quantiles_rise(mu, sigma, df):
    u = torch.cat([torch.linspace(0, 1, 100_001), 1 - torch.logspace(-9, -3, 2001).flip(0)]).double().sort()[0]
    t = LogStudentT(mu, sigma, df).quantile(u, 1.0, 80.0)
    assert (t.diff() >= -1e-12 * t[1:]).all() and t[0] == 1.0 and t[-1] == pytest.approx(80.0, rel=1e-12)


@pytest.mark.parametrize(("mu", "sigma", "df"), LIGHT_TAILS)
def test_log_student_t_with_a_light_tail_is_the_exact_inverse_up_to_its_last_cell(mu, sigma, df):
    last = 1 - 1 / 8192
    u = torch.cat([torch.linspace(0, last, 20_001), torch.linspace(last - 1e-3, last, 2001)]).double()
    u = u.clamp_max(last)
    student, high = stats.t(df), (math.log(80.0) - mu) / sigma
    a, b = student.sf(-mu / sigma), student.sf(high)
    exact = np.exp(mu + sigma * student.isf(a + (b - a) * u.numpy()))
    t = LogStudentT(mu, sigma, df)
    np.testing.assert_allclose(t.quantile(u, 1.0, 80.0).numpy(), exact, rtol=1e-3)
    inside = t.quantile(torch.linspace(last, 1, 1001).double().clamp(last, 1), 1.0, 80.0)
    assert ((inside >= exact[20_000] * (1 - 1e-9)) & (inside <= 80.0)).all()


@pytest.mark.parametrize("mu", [-2.0, 6.0])
def test_log_student_t_whose_centre_is_outside_keeps_its_digits(mu):
    """Both ends lie 8 or more sigma to one side of the centre, where F itself is 0 or 1 to 15 digits."""
    sigma, df = 0.2, 1e4
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    student, side = stats.t(df), 1 if mu < 0 else -1  # the upper tail, or the lower one turned round
    near, far = sorted(side * (math.log(t) - mu) / sigma for t in (1.0, 80.0))
    share = u.numpy() if mu < 0 else 1 - u.numpy()
    exact = mu + side * sigma * student.isf(student.sf(near) + share * (student.sf(far) - student.sf(near)))
    np.testing.assert_allclose(LogStudentT(mu, sigma, df).quantile(u, 1.0, 80.0).log(), exact, rtol=0, atol=1e-6)


def test_log_student_t_without_mass_is_refused():
    with pytest.raises(UserError, match="times: no mass .* use a nearer mu or a larger sigma"):
        LogStudentT(-20.0, 0.2, 1e4)(4, 1.0, 80.0)


def test_the_table_of_the_student_t_is_made_once_a_device():
    first, second = (_student_t_table(0.01, 0.0, 21.9) for _ in range(2))
    assert first is second


@pytest.mark.parametrize("q", [2, 4, 256])
@pytest.mark.parametrize("stage", [0, 1, 2, 3, 5, 8, 10])
def test_r_of_ect(q, stage):
    data = golden("ect")
    law = Discretisation(q=q, double_every=1000)
    for step in (stage * 1000, stage * 1000 + 999):
        assert law.ratio(step) == float(data[f"ratio/q{q}_stage{stage}"])
        r = law.r(torch.from_numpy(data["t_grid"]), step)
        torch.testing.assert_close(r, torch.from_numpy(data[f"r/q{q}_stage{stage}"]), rtol=1e-6, atol=1e-7)


def test_r_of_ect_with_other_sigmoids():
    data = golden("ect")
    r = Discretisation(q=2, double_every=1, k=4, b=2).r(torch.from_numpy(data["t_grid"]), 3)
    torch.testing.assert_close(r, torch.from_numpy(data["r/q2_stage3_k4_b2"]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("q", "limit"), [(2, 0.999), (2, 0.9961), (4, 0.999), (4, 0.9961)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3, 5, 8, 10, 12])
def test_delta_of_tcm(q, limit, stage):
    data = golden("tcm")
    law = Discretisation(q=q, double_every=1, ratio_limit=limit, r_min=1e-6)
    assert law.ratio(stage) == float(data[f"ratio/q{q}_lim{limit}_stage{stage}"])
    t = f64(data["t_grid"])
    error = t - law.r(t, stage) - f64(data[f"delta/q{q}_lim{limit}_stage{stage}"])
    assert (error.abs() <= 1.3e-7 * t).all()  # the published difference t - r was taken in float32


@pytest.mark.parametrize("r_min", [0.0, 1e-6, 1.0])
def test_r_stays_below_t_where_delta_is_less_than_its_last_digit(r_min):
    t = torch.cat([torch.tensor([1e-6, 0.002, 1.0, 80.0]), torch.logspace(-3, 2, 1000)])
    law = Discretisation(q=2, double_every=1, r_min=r_min)
    assert law.ratio(39) == 1 - 2.0**-40
    for step in (22, 23, 24, 39, 10_000):
        r = law.r(t, step)
        assert (r < t).all() and (r >= 0).all() and (1 / (t - r)).isfinite().all()
    assert (r == torch.nextafter(t, torch.zeros_like(t))).all()


@pytest.mark.parametrize(
    ("step", "shares"),
    [
        (2, [0.6225, 0.6000, 0.5025, 0.3939, 0.2442, 0.1317, 0.125]),
        (5, [0.0778, 0.0750, 0.0628, 0.0492, 0.0305, 0.0165, 0.0156]),
        (9, [0.00498, 0.00480, 0.00402, 0.00315, 0.00195, 0.00105, 0.001]),
    ],
)
def test_delta_over_t_of_the_specification(step, shares):
    t = torch.tensor([0.01, 0.1, 0.5, 1, 2, 5, 80], dtype=torch.float64)
    share = 1 - Discretisation(q=2, double_every=1, ratio_limit=0.999).r(t, step) / t
    torch.testing.assert_close(share, torch.tensor(shares, dtype=torch.float64), rtol=5e-3, atol=0)


def test_the_exponent_is_the_papers_ceil_counted_from_one():
    law = Discretisation(q=2, double_every=25_000)
    for i in (1, 24_999, 25_000, 25_001, 50_000, 50_001):
        assert law.ratio(i - 1) == 1 - 1 / 2 ** math.ceil(i / 25_000)
