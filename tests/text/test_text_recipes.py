"""The text-to-image recipes: what the paper states, and what is ours where it is silent, each in its place."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from onejump.methods.base import boundary_count
from onejump.overrides import apply_overrides
from onejump.recipes import build_recipe
from onejump.recipes.sequence import sequence
from onejump.recipes.table import records

STATED = """stage1.guidance=6 stage1.batch=512 stage1.steps=80000 stage2.guidance=6 stage2.batch=512 stage2.steps=200000
stage2.count_on=true stage2.method.of.rho=0.25 stage2.method.of.w_b=0.1"""
BOTH = """{0}.method.of.delta.delta.q=2 {0}.method.of.delta.delta.double_every=10000
{0}.method.of.delta.delta.ratio_limit=0.999 {0}.method.of.weight=inverse_delta {0}.method.of.c=0.06
{0}.method.solver=euler {0}.ema.beta=0.9999 {0}.clip=1 {0}.precision=bf16 {0}.checkpointing=true {0}.micro_batch=16"""
PINNED = {
    "tcm-sd15": f"{STATED} {BOTH.format('stage1')} {BOTH.format('stage2')} stage1.rate.lr=1e-5 stage2.rate.lr=5e-6 "
    "stage1.method.of.times.times.P_mean=-0.8 stage1.method.of.times.times.P_std=1.6 "
    "stage2.method.of.times.times.mu=0 stage2.method.of.times.times.sigma=0.2 stage2.method.of.times.times.df=0.01",
    "cd-sd15": "cd.guidance=6 cd.batch=512 cd.steps=80000 cd.method.n=51 cd.method.mu=0.95 cd.method.solver=euler "
    "cd.rate.lr=1e-5 cd.ema.beta=0.9999 cd.clip=1 cd.precision=bf16 cd.checkpointing=true cd.micro_batch=16",
}
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
LEVELS = np.sqrt((1 - ABAR) / ABAR)  # of Stable Diffusion


@pytest.mark.parametrize("name", PINNED)
def test_every_number_of_a_text_recipe_is_the_documented_one(name):
    recipe = build_recipe(name, None)
    assert apply_overrides(recipe, PINNED[name].split()) == recipe
    assert recipe.evaluation.n == 30_000 and recipe.evaluation.steps == (1, 2)


def test_the_boundary_is_the_noise_level_nearest_to_1():
    recipe = build_recipe("tcm-sd15", None)
    truncated, (t_prime,) = recipe.stages["stage2"].method.of, recipe.stages["stage2"].sampler.mid
    nearest = LEVELS[np.abs(np.log(LEVELS)).argmin()]
    assert truncated.t_prime == t_prime == pytest.approx(nearest, rel=1e-9) == pytest.approx(1.00037, abs=1e-5)
    assert truncated.t_max == pytest.approx(LEVELS[-1], rel=1e-9) and boundary_count(512, truncated.rho) == 128
    assert recipe.first_step("stage2") == 80_000


@pytest.mark.parametrize(
    ("stage", "halvings"),  # at 0, 25, 50 and 100 % of it
    [("stage1", (1, 3, 5, 8)), ("stage2", (9, None, None, None))],
)
def test_the_two_times_of_a_pair_come_as_near_as_documented(stage, halvings):
    """r: the level at or below t (1 - (1 + 8 sigmoid(-t)) / 2^k), below t; from 100,000 steps on the limit of 0.999."""
    recipe = build_recipe("tcm-sd15", None)
    found, first = recipe.stages[stage], recipe.first_step(stage)
    levels, t = np.concatenate([[0.0], LEVELS]), LEVELS[[0, 100, 300, 420, 600, 900, 999]]
    at = [first + found.steps * percent // 100 for percent in (0, 25, 50)] + [first + found.steps - 1]
    for step, k in zip(at, halvings, strict=True):
        share = 0.001 if k is None else 0.5**k
        near = np.maximum(t * (1 - share * (1 + 8 / (1 + np.exp(t)))), 0)
        place = np.minimum(np.searchsorted(levels, near, side="right") - 1, np.searchsorted(levels, t * (1 - 1e-9)) - 1)
        r = found.method.of.delta.r(torch.tensor(t), step)
        assert r.numpy() == pytest.approx(levels[place], rel=1e-9), (step, k)
        weight = found.method.of.weight(torch.tensor(t), r)
        assert weight.numpy() == pytest.approx(1 / (t - levels[place]), rel=1e-6)
        assert found.rate.rate(step, 0.0) == {"stage1": 1e-5, "stage2": 5e-6}[stage]


def test_stage_2_draws_log_student_t_between_the_boundary_and_the_highest_level():
    truncated = build_recipe("tcm-sd15", None).stages["stage2"].method.of
    torch.manual_seed(0)
    t = truncated.times(10_000, truncated.t_prime, truncated.t_max)
    nearest = LEVELS[np.abs(np.log(t.numpy()[:, None] / LEVELS)).argmin(1)]
    assert t.numpy() == pytest.approx(nearest, rel=1e-6)
    cdf = stats.t(0.01).cdf
    low, high = (cdf(math.log(edge) / 0.2) for edge in (truncated.t_prime, truncated.t_max))
    for edge in (1.1, 1.5, 3.0, 8.0):
        expected = (cdf(math.log(edge) / 0.2) - low) / (high - low)
        assert (t <= edge).double().mean().item() == pytest.approx(expected, abs=0.02), edge


@pytest.mark.parametrize("name", PINNED)
def test_the_commands_prepare_the_latents_and_judge_by_30_000_prompts(name):
    prepare, train, judge = sequence(records()[name], build_recipe(name, None))
    assert prepare.startswith("onejump data prepare") and "--vae stable-diffusion-v1-5" in prepare
    assert train.startswith(f"onejump run {name} --data coyo-latents --teacher stable-diffusion-v1-5")
    for option in ("--prompts", "--clip", "--n 30000", "--detector inception-2048", "--steps 1,2"):
        assert option in judge
