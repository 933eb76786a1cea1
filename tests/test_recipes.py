"""Recipes fit the images they are given, survive JSON, and keep the structure of their papers."""

import json
from dataclasses import replace

import pytest
import torch

from onejump import solvers
from onejump.analytic import AnalyticPrecond
from onejump.config_json import from_json, to_json
from onejump.data.digits import digits
from onejump.data.image_set import ImageSet
from onejump.estimate import nets_for
from onejump.evaluate import Judge, detector_for
from onejump.fit import network_of
from onejump.generate import balanced_labels, generate
from onejump.lpips import LPIPS
from onejump.methods.base import boundary_count
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.ict import ICT
from onejump.methods.tcm import TCM
from onejump.overrides import apply_overrides
from onejump.pipeline import train_stage
from onejump.precond import CM, Euler, ToData
from onejump.recipes import NAMES, PUBLISHED, build_recipe, names
from onejump.run_folder import read_lines
from onejump.run_record import open_run
from onejump.samplers import ODE
from onejump.saved import load_model
from onejump.start import Given
from onejump.times import LogStudentT
from onejump.types import UserError

SMALL = [name for name in NAMES if name.startswith("digits")]  # for images of any kind
FIXED = names(PUBLISHED)  # for the images of a paper
SHAPES = {"digits": (1, 8, 8, 10), "colour": (3, 32, 32, 0), "large": (3, 64, 64, 0), "uneven": (1, 12, 12, 3)}


def images(channels, height, width, classes):
    pixels = torch.randint(0, 256, (6, channels, height, width), dtype=torch.uint8)
    if not classes:
        return ImageSet("photos", pixels)
    return ImageSet("photos", pixels, torch.arange(6) % classes, tuple(map(str, range(classes))))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_recipe_fits_its_images(name, shape):
    """The loss of every stage has a gradient for the last layer of a network made for these images."""
    data = images(*shape)
    recipe = build_recipe(name, data)
    assert recipe.name == name and recipe.network.label_dim == data.classes
    x0, cond = data.batch(0, 2, seed=0)
    torch.manual_seed(0)
    for stage in recipe.stages.values():
        nets = nets_for(recipe, stage, torch.device("cpu"))
        loss, _ = stage.method.loss(nets, x0, cond, 2, 10**6)
        (gradient,) = torch.autograd.grad(loss, list(nets.student.parameters())[-1])
        assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_recipe_survives_json(name, shape):
    recipe = build_recipe(name, images(*shape))
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((1, 9, 9, 0), "8 or 12"), ((3, 32, 24, 0), "24"), ((1, 4, 4, 0), "8"), ((3, 30, 30, 0), "28 or 32")],
)
def test_images_that_do_not_fit_are_refused_with_the_nearest_sizes(shape, sizes):
    for name in SMALL:
        with pytest.raises(UserError, match=rf"{shape[1]}x{shape[2]}.*--size {sizes}$"):
            build_recipe(name, images(*shape))


def test_the_lowest_level_is_8_or_less_but_never_odd():
    sides = {side: build_recipe("digits", images(3, side, side, 0)).network.resolutions for side in (8, 12, 32, 64)}
    assert sides == {8: (8, 4), 12: (12, 6), 32: (32, 16, 8), 64: (64, 32, 16, 8)}


def test_digits_is_the_chain_of_the_papers():
    """DSM -> ECT -> TCM with the truncated paper's t' = 1, rho = 1/4, w_b = 0.1 and log-Student-t(0, 0.2, 0.01)."""
    recipe = build_recipe("digits", images(1, 8, 8, 10))
    teacher, stage1, stage2 = recipe.stages.values()
    assert isinstance(teacher.method, DSM) and isinstance(teacher.sampler, ODE)
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
    assert isinstance(stage.method, ICT) and stage.jump == CM()
    assert (stage.method.P_mean, stage.method.P_std) == (-1.1, 2.0)


SHORT = [f"{stage}.{field}" for stage in ("teacher", "stage1", "stage2") for field in ("steps=2", "batch=16")]
SHORT += ["network=MLPConfig(shape=(1,8,8),label_dim=10,width=16,depth=1)", "evaluation.n=20", "evaluate_every=1"]


@pytest.fixture(scope="module")
def judge():
    return Judge(digits(), detector_for(digits()))


@pytest.fixture(scope="module")
def shifted(tmp_path_factory, judge):
    """Two runs of ECT and TCM that differ in stage 1's shift alone: 0 and 0.003."""
    folders, data = {}, digits()
    for shift in (0.0, 0.003):
        recipe = apply_overrides(build_recipe("digits", data), [*SHORT, f"stage1.shift={shift}"])
        recipe = replace(recipe, stages={name: recipe.stages[name] for name in ("stage1", "stage2")})
        folders[shift] = tmp_path_factory.mktemp("shift") / "run"
        open_run(recipe, data, folders[shift], torch.device("cpu"), "")
        for name in recipe.stages:
            train_stage(recipe, name, judge, folders[shift], torch.device("cpu"), Given())
    return folders


def test_a_shift_is_of_the_averaged_model_in_sampling_and_of_nothing_that_is_trained(shifted):
    """c_skip = sd^2 / ((t - m)^2 + sd^2), c_out = (t - m) sd / sqrt(t^2 + sd^2) with m = 0.003, as ECT evaluates."""
    plain, moved = (load_model(shifted[shift] / "stage1").model for shift in (0.0, 0.003))
    x, t, cond, sd, m = torch.randn(4, 1, 8, 8), torch.tensor([0.003, 0.1, 0.821, 80.0]), torch.arange(4), 0.5, 0.003
    for name in ("stage1", "stage2"):  # the next stage starts from the same weights, and does not inherit it
        weights = [(shifted[shift] / name / "model" / "model.safetensors").read_bytes() for shift in (0.0, 0.003)]
        assert weights[0] == weights[1]
    assert load_model(shifted[0.003] / "stage2").model.jump == plain.jump == ToData() and moved.jump == CM(m, sd)
    F = plain.denoise(x, t, cond=cond) - plain.precond(t).c_skip.view(-1, 1, 1, 1) * x
    F = F / plain.precond(t).c_out.view(-1, 1, 1, 1)
    c_skip, c_out = sd**2 / ((t - m) ** 2 + sd**2), (t - m) * sd / (t**2 + sd**2).sqrt()
    expected = c_skip.view(-1, 1, 1, 1) * x + c_out.view(-1, 1, 1, 1) * F
    torch.testing.assert_close(moved(x, t, cond=cond), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved(x, t, cond=cond)[0], x[0])


def test_evaluations_on_the_way_are_of_the_shifted_model(shifted, judge):
    last, saved = read_lines(shifted[0.003] / "stage1" / "evaluations.jsonl")[-1], load_model(shifted[0.003] / "stage1")
    for steps in (1, 2):
        made = generate(saved.model, saved.sampler, steps, range(20), saved.shape, balanced_labels(20, 10), 1234)
        assert judge.frechet(made) == pytest.approx(last["frechet"][str(steps)], rel=1e-5)
    assert last["frechet"] != read_lines(shifted[0.0] / "stage1" / "evaluations.jsonl")[-1]["frechet"]


def test_ECT_on_cifar10_is_shifted_and_nothing_else():
    found = {name for name in FIXED for stage in build_recipe(name, None).stages.values() if stage.shift == 0.003}
    assert found == {f"ect-cifar10-{length}" for length in ("100k", "200k", "400k", "hour")}
    with pytest.raises(UserError, match="shift: 0.003 is for ECT with jump=ToData and precond=EDM, not for TCM"):
        apply_overrides(build_recipe("tcm-cifar10", None), ["stage2.shift=0.003"])


# Zheng et al. 2025, table 3: N, most ODE steps, iterations, batch; parameters with and without the second time
TABLE_3 = {
    "cifar10-uncond": (18, 17, 200_000, 256, 60_395_267, 55_732_739),
    "cifar10-cond": (18, 17, 150_000, 512, None, 55_734_147),
    "ffhq64": (18, 17, 150_000, 256, None, None),
    "imagenet64": (40, 20, 60_000, 2048, None, 295_899_267),
}
COLUMNS = [f"{kind}-{images}{end}" for kind in ("cd", "ctm") for images in TABLE_3 for end in ("", "-analytic")]


def fitting(name):
    side, classes = (32 if "cifar10" in name else 64), {"cifar10-cond": 10, "imagenet64": 1000}
    wanted = next((n for key, n in classes.items() if key in name), 0)
    pixels = torch.zeros(1000, 3, side, side, dtype=torch.uint8)
    return ImageSet("photos", pixels, torch.arange(1000) % wanted if wanted else None, tuple(map(str, range(wanted))))


@pytest.mark.parametrize("name", COLUMNS)
def test_published_recipes_have_the_numbers_of_the_papers_table_3(name):
    recipe = build_recipe(name, fitting(name))
    (stage,) = recipe.stages.values()
    kind, images, *analytic = name.split("-", 1)[0], next(key for key in TABLE_3 if key in name), "-analytic" in name
    n, most, steps, batch, with_second, without = TABLE_3[images]
    assert recipe.name == name and from_json(json.loads(json.dumps(to_json(recipe)))) == recipe
    assert (stage.method.n, stage.steps, stage.batch, stage.method.mu) == (n, steps, batch, 0.999)
    assert (stage.rate.lr, stage.ema.beta, stage.precision) == (4e-4, 0.999, "fp16")
    assert isinstance(stage.method.distance, LPIPS) and stage.method.solver is solvers.heun
    if kind == "ctm":
        assert stage.method.max_steps == most and stage.second_time == "zero"
    if analytic[0]:
        estimator = stage.jump.estimator
        assert stage.jump == AnalyticPrecond() and (estimator.times, estimator.samples) == (120, 4096)
    else:
        assert stage.jump == (Euler() if kind == "ctm" else CM())
    with torch.device("meta"):
        parameters = sum(p.numel() for p in network_of(recipe, stage).build().parameters())
    expected = with_second if kind == "ctm" else without
    assert expected is None or parameters == expected


def test_published_recipes_refuse_other_images():
    for name in FIXED:
        with pytest.raises(UserError, match="images are 1x8x8: this recipe is for 3x.*; give other --data"):
            build_recipe(name, images(1, 8, 8, 10))
    with pytest.raises(UserError, match="images have 0 classes: this recipe is for 10"):
        build_recipe("ctm-cifar10-cond", images(3, 32, 32, 0))


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean digits-ict?"):
        build_recipe("digit-ict", images(1, 8, 8, 10))
