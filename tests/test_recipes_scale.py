"""Recipes made small: two steps of every stage on a CPU, and an hour on a GPU, with the structure of the full ones."""

import json
import math
from dataclasses import replace

import pytest
import torch

from onejump.analytic import AnalyticPrecond
from onejump.config import Distilling
from onejump.cost import shape_of
from onejump.fit import check_chain, network_of
from onejump.lpips import LPIPS
from onejump.memory import nets_for
from onejump.methods.dsm import DSM
from onejump.networks.text_unet import TextUNetConfig
from onejump.pipeline import run
from onejump.precond import Euler
from onejump.recipes import NAMES, PUBLISHED, build_recipe, names
from onejump.recipes.effort import FLOP_A_SECOND, gpu_hours
from onejump.recipes.scale import made_up, scaled, shortened, small_stage
from onejump.recipes.table import records
from onejump.run_record import open_run
from onejump.start import Given
from onejump.times import ct_levels, ict_levels
from onejump.types import UserError

ALL = names(PUBLISHED)
CPU = torch.device("cpu")


def tiny_stages():
    """One of those whose loss runs through the same code.

    Dropout and how the second time starts make no difference; nor does Analytic-Precond until it is estimated.
    """
    found = {}
    for name in ALL:
        recipe = scaled(build_recipe(name, None), "tiny")
        for stage_name, stage in recipe.stages.items():
            jump = Euler() if isinstance(stage.jump, AnalyticPrecond) else stage.jump
            reads_s = "off" if stage.second_time == "off" else "zero"
            network = replace(network_of(recipe, stage), dropout=0.0, second_time=reads_s)
            found.setdefault((network, stage.method, jump, stage.critic), (name, stage_name))
    return sorted(found.values())


@pytest.mark.parametrize(("name", "stage"), tiny_stages())
def test_every_stage_takes_two_tiny_steps(name, stage):
    """The loss is finite and its gradient moves the weights, twice, on images made up for the recipe."""
    recipe = scaled(build_recipe(name, None), "tiny")
    stage = recipe.stages[stage]
    torch.manual_seed(0)
    nets, data = nets_for(recipe, stage, CPU), made_up(recipe.network)
    weights = [p for p in nets.student.parameters() if p.requires_grad]
    weights += [] if nets.critic is None else [p for p in nets.critic.net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-6)
    assert stage.steps == 2
    for step in range(2):
        x0, cond = data.batch(step, stage.batch, seed=0)
        loss, _ = stage.method.loss(nets, x0, cond, step, 2)
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite() and sum(p.grad.abs().sum() for p in weights if p.grad is not None) > 0
        optimizer.step()
    assert all(p.isfinite().all() for p in weights)


def test_tiny_needs_no_files_and_no_gpu():
    for name in NAMES:
        recipe = scaled(build_recipe(name, None), "tiny")
        stages = list(recipe.stages.values())
        for stage in stages:
            assert (stage.steps, stage.batch, stage.precision) == (2, 4, "fp32")
            assert not isinstance(getattr(stage.core, "distance", None), LPIPS)
        own = isinstance(recipe.network, TextUNetConfig)  # whose teacher is a folder
        if isinstance(stages[-1].method, Distilling) and not own:
            assert any(isinstance(stage.method, DSM) for stage in stages)
        check_chain(recipe)
        assert recipe.evaluation.n < 10 and recipe.name == f"{name}-tiny"
        assert shape_of(recipe.network) == shape_of(build_recipe(name, None).network)


def test_a_tiny_recipe_runs_from_start_to_report(tmp_path):
    """With a teacher of its own, the table of its statistics, and 8 images judged."""
    name = "ctm-cifar10-cond-analytic"
    recipe = scaled(build_recipe(name, None), "tiny")
    data = made_up(recipe.network)
    open_run(recipe, data, tmp_path / "run", CPU, f"onejump run {name} --scale tiny")
    report = run(recipe, data, tmp_path / "run", CPU, Given())
    assert report.exists()
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert list(found["stages"]) == list(recipe.stages)
    for stage in recipe.stages:
        assert json.loads((tmp_path / "run" / stage / "stage.json").read_text())["images"] == 8


def test_images_are_made_up_of_the_digits_in_the_shape_and_classes_of_the_network():
    for name, shape, classes in (
        ("tcm-cifar10", (3, 32, 32), 0),
        ("ctm-cifar10-cond", (3, 32, 32), 10),
        ("ect-imagenet64-s", (3, 64, 64), 1000),
    ):
        data = made_up(build_recipe(name, None).network)
        assert (data.shape, data.classes) == (shape, classes)
        assert build_recipe(name, data) == build_recipe(name, None)
        if classes:
            assert data.labels.unique().tolist() == list(range(classes))


SMALL = ["tcm-cifar10", "edm-ffhq64", "ict-cifar10", "cm-ct-cifar10", "ctm-cifar10-cond-analytic"]


@pytest.mark.parametrize("name", SMALL)
def test_small_is_an_hour_with_the_shares_of_the_stages(name, monkeypatch):
    monkeypatch.setattr("onejump.recipes.scale.gflop_of", lambda network: records()[name].gflop)
    full = build_recipe(name, None)
    recipe = scaled(full, "small")
    assert gpu_hours(recipe, records()[name].gflop) == pytest.approx(0.375, rel=0.01)  # at half that speed, 45 minutes
    assert recipe.network == full.network and FLOP_A_SECOND == 2e14
    images = [[s.steps * s.batch for s in r.stages.values()] for r in (full, recipe)]
    shares = [b / a for a, b in zip(*images, strict=True)]
    assert shares == pytest.approx([shares[0]] * len(shares), rel=0.01)
    assert all(s.batch <= 128 and s.precision == "fp16" for s in recipe.stages.values())
    check_chain(recipe)


ON_THE_WAY = [(name, stage) for name in ALL for stage in build_recipe(name, None).stages]


@pytest.mark.parametrize(("name", "stage"), ON_THE_WAY)
def test_small_is_where_the_published_is_at_each_share_of_a_stage(name, stage, monkeypatch):
    """The curriculum's part, the rate, and what the EMA forgets in a share of the stage, at 0, 25, 50 and 100 %.

    Also in stages that count on, whatever their batch.
    """
    monkeypatch.setattr("onejump.recipes.scale.gflop_of", lambda network: records()[name].gflop)
    full = build_recipe(name, None)
    little, found = scaled(full, "small"), []
    for recipe in (full, little):
        part, first = recipe.stages[stage], recipe.first_step(stage)
        last, delta = first + part.steps, getattr(part.method, "delta", None)
        steps = [first + part.steps * percent // 100 for percent in (0, 25, 50)] + [last - 1]
        forgets = [part.steps * math.log(part.ema.decay(step + 1)) for step in steps[0 if first else 1 :]]
        rates = [part.rate.rate(step, 0.0) for step in steps]
        found.append(([delta.ratio(step) for step in steps] if delta else [], rates, forgets))
    assert found[0][0] == found[1][0]
    assert found[1][1] == pytest.approx(found[0][1], rel=0.01, abs=1e-9)
    assert found[1][2] == pytest.approx(found[0][2], rel=0.02)
    batches = [recipe.stages[stage].batch / max(s.batch for s in recipe.stages.values()) for recipe in (full, little)]
    assert batches[0] == batches[1]


def test_an_average_remembers_the_same_share_of_a_short_run():
    """0.9999 over 100,000 steps is 0.999 over 10,000; half of the grid's doublings go, and a warm-up with them."""
    stage = build_recipe("ect-cifar10-100k", None).stages["ect"]
    assert small_stage(stage, 1.0, 0.1).ema.beta == pytest.approx(0.9999**10)
    ict = shortened(build_recipe("ict-cifar10", None).stages["ict"].method, 0.1)
    assert ict_levels(999, 1000, ict.s0, ict.s1) == 161
    ct = shortened(build_recipe("cm-ct-cifar10", None).stages["ct"].method, 0.1)
    assert ct_levels(1000, 1000, ct.s0, ct.s1) == 150 // 8 + 1
    teacher = build_recipe("edm-cifar10-cond", None).stages["teacher"]
    assert small_stage(teacher, 0.25, 0.1).rate.rampup == 1953


def test_another_scale_is_refused():
    with pytest.raises(UserError, match="scale: 'huge'; choose one of tiny, small"):
        scaled(build_recipe("tcm-cifar10", None), "huge")
