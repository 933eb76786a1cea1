"""What changes in the course of published recipes, at 0, 25, 50 and 100 % of them: the tables of the papers' codes."""

import pytest
import torch
from scipy import stats

from onejump.draws import uniform
from onejump.ema import sigma_rel
from onejump.recipes import build_recipe
from onejump.times import ct_decay, ict_levels, karras_grid, lognormal_pmf

# Delta_t / t at these times, by the ratio 1 - 2^-k of the curriculum
TIMES = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 80.0)
HALVINGS = {
    1: (1, 1, 1, 1, 0.9768, 0.5268, 0.5),
    2: (1, 1, 1, 0.7879, 0.4884, 0.2634, 0.25),
    3: (0.6225, 0.6000, 0.5025, 0.3939, 0.2442, 0.1317, 0.125),
    4: (0.3113, 0.3000, 0.2513, 0.1970, 0.1221, 0.0658, 0.0625),
    5: (0.1556, 0.1500, 0.1256, 0.0985, 0.0610, 0.0329, 0.0313),
    6: (0.0778, 0.0750, 0.0628, 0.0492, 0.0305, 0.0165, 0.0156),
    8: (0.0195, 0.0188, 0.0157, 0.0123, 0.0076, 0.0041, 0.0039),
    10: (0.00498, 0.00480, 0.00402, 0.00315, 0.00195, 0.00105, 0.001),  # TCM's limit on CIFAR-10
}
CURRICULA = {  # recipe, stage, k at 0, 25, 50, 100 %
    ("ect-cifar10-100k", "ect"): (1, 2, 3, 4),
    ("ect-cifar10-200k", "ect"): (1, 3, 5, 8),
    ("ect-cifar10-hour", "ect"): (8, 8, 8, 8),
    ("ect-imagenet64-s", "ect"): (2, 4, 6, 8),
    ("tcm-cifar10", "stage1"): (1, 3, 6, 10),
    ("tcm-cifar10", "stage2"): (10, 10, 10, 10),
    ("tcm-imagenet64-s", "stage1"): (2, 4, 8, 8),
    ("tcm-imagenet64-s", "stage2"): (8, 8, 8, 8),
    ("tcm-imagenet64-xl", "stage2"): (8, 8, 8, 8),
}


def course(name, stage):
    """(the stage, its counter at 0, 25, 50 and 100 %: the last step, and the end of the chain)."""
    recipe = build_recipe(name, None)
    found, first = recipe.stages[stage], recipe.first_step(stage)
    steps = [first + found.steps * percent // 100 for percent in (0, 25, 50)]
    return found, [*steps, first + found.steps - 1], first + found.steps


@pytest.mark.parametrize(("name", "stage"), CURRICULA)
def test_the_two_times_of_a_pair_come_as_near_as_published(name, stage):
    found, steps, _ = course(name, stage)
    t = torch.tensor(TIMES, dtype=torch.float64)
    for step, k in zip(steps, CURRICULA[name, stage], strict=True):
        delta = (t - found.method.delta.r(t, step)) / t
        torch.testing.assert_close(delta, torch.tensor(HALVINGS[k], dtype=torch.float64), atol=6e-5, rtol=2e-3)


def test_the_targets_of_boundary_samples_are_where_published():
    """At t' = 1 and the end of the curriculum: r = 0.9968485 on CIFAR-10, 0.9877090 on ImageNet."""
    one = torch.ones(1, dtype=torch.float64)
    for name, r in (("tcm-cifar10", 0.9968485), ("tcm-imagenet64-s", 0.9877090), ("tcm-imagenet64-xl", 0.9877090)):
        found, steps, _ = course(name, "stage2")
        assert found.method.delta.r(found.method.t_prime * one, steps[-1]).item() == pytest.approx(r, abs=2e-6)


LEVELS = {  # N at 0, 25, 50, 100 %
    "ict-cifar10": (11, 41, 161, 1281),
    "ict-deep-cifar10": (11, 41, 161, 1281),
    "ict-imagenet64": (11, 41, 161, 1281),
    "cm-ct-cifar10": (2, 76, 107, 151),
    "cm-ct-imagenet64": (2, 101, 143, 201),
}


@pytest.mark.parametrize("name", LEVELS)
def test_grids_grow_as_published(name):
    stage = "ict" if name.startswith("ict") else "ct"
    found, steps, end = course(name, stage)
    method = found.method
    levels = [ict_levels(k, end, method.s0, method.s1) if stage == "ict" else method.levels(k, end) for k in steps]
    assert tuple(levels) == LEVELS[name]


def test_the_target_of_CT_remembers_longer_and_longer():
    method = course("cm-ct-imagenet64", "ct")[0].method
    decays = [ct_decay(n, method.s0, method.mu0) for n in LEVELS["cm-ct-imagenet64"]]
    assert decays == pytest.approx([0.9025, 0.998975, 0.999278, 0.999487], abs=1e-6)


def test_distillation_has_the_published_grids():
    nodes = {18: (80, 57.58598, 40.78557, 28.37458), 40: (80,)}
    for name, n in (("cm-cd-cifar10", 18), ("ctm-cifar10-cond", 18), ("cm-cd-imagenet64", 40), ("ctm-imagenet64", 40)):
        method = next(iter(build_recipe(name, None).stages.values())).method
        assert method.n == n
        grid = karras_grid(method.n).flip(0)
        assert grid[: len(nodes[n])].tolist() == pytest.approx(nodes[n], rel=1e-6)
        (mid,) = build_recipe("cm-cd-imagenet64", None).stages["cd"].sampler.mid
        assert n == 18 or mid == pytest.approx(grid[22].item(), abs=5e-4)


RATES = {  # at 0, 25, 50, 100 %
    ("tcm-imagenet64-s", "stage1"): (1e-3, 2.3094e-4, 1.6330e-4, 1.1547e-4),
    ("tcm-imagenet64-s", "stage2"): (1.1547e-4, 1.0541e-4, 9.7590e-5, 8.6066e-5),
    ("tcm-imagenet64-xl", "stage2"): (2.8284e-5, 2.6968e-5, 2.5820e-5, 2.3905e-5),
    ("tcm-cifar10", "stage1"): (1e-4,) * 4,
    ("tcm-cifar10", "stage2"): (5e-5,) * 4,
    ("ect-imagenet64-m", "ect"): (9e-4, 2.5456e-4, 1.8000e-4, 1.2728e-4),
    ("ict-imagenet64", "ict"): (1e-4,) * 4,
    ("ctm-ffhq64", "ctm"): (4e-4,) * 4,
    ("cm-cd-imagenet64", "cd"): (8e-6,) * 4,
    ("edm-cifar10-cond", "teacher"): (0.0, 1e-3, 1e-3, 1e-3),
    ("edm2-imagenet64-s", "teacher"): (0.0, 5.1676e-3, 3.6541e-3, 2.5838e-3),
}


@pytest.mark.parametrize(("name", "stage"), RATES)
def test_rates_fall_as_published(name, stage):
    found, steps, end = course(name, stage)
    rates = [found.rate.rate(step, 0.0) for step in [*steps[:3], end]]
    assert rates == pytest.approx(RATES[name, stage], rel=1e-4)


DECAYS = {  # of the EMA, at the first step after 25 and 50 %, and at the last
    ("tcm-cifar10", "stage1"): (0.9999,) * 3,
    ("tcm-imagenet64-s", "stage1"): (1 - 7.94 / 37501, 1 - 7.94 / 75001, 1 - 7.94 / 150000),
    ("tcm-imagenet64-s", "stage2"): (1 - 7.94 / 180001, 1 - 7.94 / 210001, 1 - 7.94 / 270000),
    ("ect-imagenet64-s", "ect"): (1 - 17.97 / 25001, 1 - 17.97 / 50001, 1 - 17.97 / 100000),
    ("ect-cifar10-hour", "ect"): (0.9993,) * 3,
    ("ict-cifar10", "ict"): (0.99993,) * 3,
    ("ict-imagenet64", "ict"): (0.99997,) * 3,
    ("cm-ct-imagenet64", "ct"): (0.9999432189950708,) * 3,
    ("edm-imagenet64", "teacher"): (0.9999432189950708,) * 3,
    ("edm-cifar10-uncond", "teacher"): (0.99929047,) * 3,
    ("ctm-imagenet64", "ctm"): (0.999,) * 3,
}


@pytest.mark.parametrize(("name", "stage"), DECAYS)
def test_averages_remember_as_long_as_published(name, stage):
    found, steps, end = course(name, stage)
    decays = [found.ema.decay(n) for n in (steps[1] + 1, steps[2] + 1, end)]
    assert decays == pytest.approx(DECAYS[name, stage], abs=3e-7)


def test_the_EMA_of_the_command_line_is_half_as_wide():
    assert sigma_rel(16.97) == pytest.approx(0.05, abs=1e-4) and sigma_rel(6.94) == pytest.approx(0.10, abs=2e-4)
    assert sigma_rel(course("edm2-imagenet64-s", "teacher")[0].ema.gamma) == pytest.approx(0.075, abs=1e-6)


def test_stage_2_draws_its_times_near_the_boundary():
    """Quantiles of TCM's log-Student-t on [1, 80]: those of a sample that the published code drew."""
    for name in ("tcm-cifar10", "tcm-imagenet64-s"):
        method = course(name, "stage2")[0].method
        u = torch.tensor([0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99], dtype=torch.float64)
        t = method.times.quantile(u, method.t_prime, method.t_max)
        assert t.tolist() == pytest.approx([1.0012, 1.0061, 1.0127, 1.043, 1.222, 2.535, 10.45, 24.6, 61.3], rel=6e-3)


@pytest.mark.parametrize(
    ("name", "stage", "P_mean", "P_std", "cut"),
    [("tcm-cifar10", "stage1", -1.1, 2.0, 0.0083), ("tcm-imagenet64-s", "stage1", -0.8, 1.6, 0.00096)],
)
def test_stage_1_draws_a_lognormal_without_its_tails(name, stage, P_mean, P_std, cut):
    method = course(name, stage)[0].method
    low, high = ((torch.tensor(t).log().item() - P_mean) / P_std for t in (0.002, 80.0))
    assert stats.norm.cdf(low) + stats.norm.sf(high) == pytest.approx(cut, rel=0.02)
    u = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    expected = P_mean + P_std * stats.truncnorm(low, high).ppf(u.numpy())
    assert method.times.quantile(u, method.t_min, method.t_max).log().tolist() == pytest.approx(expected, rel=1e-5)


def test_ECT_draws_the_whole_lognormal():
    torch.manual_seed(0)
    for name, P_mean, P_std in (("ect-cifar10-400k", -1.1, 2.0), ("ect-imagenet64-l", -0.8, 1.6)):
        method = course(name, "ect")[0].method
        t = method.times.quantile(uniform(20_000), method.t_min, method.t_max).log()
        assert t.mean().item() == pytest.approx(P_mean, abs=0.06) and t.std().item() == pytest.approx(P_std, abs=0.05)


def test_iCT_draws_neighbours_by_their_lognormal_mass():
    method = course("ict-deep-cifar10", "ict")[0].method
    first, last = (lognormal_pmf(karras_grid(n), method.P_mean, method.P_std) for n in (11, 1281))
    assert first[[0, 1, 2, -1]].tolist() == pytest.approx([0.06263, 0.18174, 0.24550, 0.00398], abs=1e-5)
    assert last[[0, -1]].tolist() == pytest.approx([1.4982e-4, 2.0109e-5], rel=1e-3)
