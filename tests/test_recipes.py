"""Recipes fit the images they are given, survive JSON, and keep the structure of their papers."""

import json

import pytest
import torch

from onejump.config import from_json, to_json
from onejump.data.image_set import ImageSet
from onejump.methods.base import boundary_count
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.ict import ICT
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.recipes import NAMES, build_recipe
from onejump.samplers import Heun
from onejump.times import LogStudentT
from onejump.types import UserError

SHAPES = {"digits": (1, 8, 8, 10), "colour": (3, 32, 32, 0), "large": (3, 64, 64, 0), "uneven": (1, 12, 12, 3)}


def images(channels, height, width, classes):
    pixels = torch.randint(0, 256, (6, channels, height, width), dtype=torch.uint8)
    if not classes:
        return ImageSet("photos", pixels)
    return ImageSet("photos", pixels, torch.arange(6) % classes, tuple(map(str, range(classes))))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_recipe_fits_its_images(name, shape):
    """The loss of every stage has a gradient for the last layer of a network made for these images."""
    data = images(*shape)
    recipe = build_recipe(name, data)
    assert recipe.name == name and recipe.network.label_dim == data.classes
    x0, cond = data.batch(0, 2, seed=0)
    torch.manual_seed(0)
    net = recipe.network.build()
    for stage in recipe.stages.values():
        nets = stage.method.nets(ConsistencyModel(net, stage.precond, stage.jump))
        loss, _ = stage.method.loss(nets, x0, cond, 1, 10**6)
        (gradient,) = torch.autograd.grad(loss, list(net.parameters())[-1])
        assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_recipe_survives_json(name, shape):
    recipe = build_recipe(name, images(*shape))
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((1, 9, 9, 0), "8 or 12"), ((3, 32, 24, 0), "24"), ((1, 4, 4, 0), "8"), ((3, 30, 30, 0), "28 or 32")],
)
def test_images_that_do_not_fit_are_refused_with_the_nearest_sizes(shape, sizes):
    for name in NAMES:
        with pytest.raises(UserError, match=rf"{shape[1]}x{shape[2]}.*--size {sizes}$"):
            build_recipe(name, images(*shape))


def test_the_lowest_level_is_8_or_less_but_never_odd():
    sides = {side: build_recipe("digits", images(3, side, side, 0)).network.resolutions for side in (8, 12, 32, 64)}
    assert sides == {8: (8, 4), 12: (12, 6), 32: (32, 16, 8), 64: (64, 32, 16, 8)}


def test_digits_is_the_chain_of_the_papers():
    """DSM -> ECT -> TCM with the truncated paper's t' = 1, rho = 1/4, w_b = 0.1 and log-Student-t(0, 0.2, 0.01)."""
    recipe = build_recipe("digits", images(1, 8, 8, 10))
    teacher, stage1, stage2 = recipe.stages.values()
    assert isinstance(teacher.method, DSM) and isinstance(teacher.sampler, Heun)
    assert isinstance(stage1.method, ECT) and isinstance(stage2.method, TCM)
    tcm = stage2.method
    assert (tcm.t_prime, tcm.rho, tcm.w_b, tcm.t_max) == (1.0, 0.25, 0.1, 80.0)
    assert tcm.times == LogStudentT(mu=0.0, sigma=0.2, df=0.01)
    assert boundary_count(stage2.batch, tcm.rho) * 4 == stage2.batch
    assert stage1.method.t_min == 0.002 and stage1.method.t_max == 80.0
    assert tcm.delta == stage1.method.delta  # one curriculum, which stage 2 goes on with
    assert not stage1.count_on and stage2.count_on
    assert recipe.first_step("stage2") == stage1.steps and recipe.first_step("stage1") == 0
    assert min(stage2.sampler.times(2)) >= tcm.t_prime
    assert teacher.precond.sigma_data == stage1.precond.sigma_data == stage2.precond.sigma_data == 0.5


def test_digits_ict_is_one_stage_of_ict_from_data_alone():
    (stage,) = build_recipe("digits-ict", images(1, 8, 8, 10)).stages.values()
    assert isinstance(stage.method, ICT) and stage.precond.sigma_min == 0.002
    assert (stage.method.P_mean, stage.method.P_std) == (-1.1, 2.0)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean digits-ict?"):
        build_recipe("digit-ict", images(1, 8, 8, 10))
