"""Distillation on the digits, or on images of your own: a diffusion teacher first, then the student."""

from dataclasses import replace

from onejump.analytic import AnalyticPrecond
from onejump.analytic_table import Estimator
from onejump.config import Evaluation, Recipe, Stage
from onejump.data.training_set import TrainingSet
from onejump.ema import PowerEMA
from onejump.methods.cd import CD
from onejump.methods.ctm import CTM
from onejump.methods.ctm_gan import CTMGAN
from onejump.networks.critic import SmallCriticConfig
from onejump.optim import Adam, CosineRate
from onejump.precond import CM, Euler
from onejump.recipes.digits import small_unet, teacher_stage
from onejump.samplers import Multistep, Trajectory

FROM_TEACHER = AnalyticPrecond(estimator=Estimator(times=60, samples=512))  # a minute; the paper's are 120 and 4096


def digits_cd(data: TrainingSet) -> Recipe:
    """Consistency distillation, CM's preconditioning."""
    stage = Stage(
        CD(n=18),
        steps=1000,
        batch=128,
        optimizer=Adam(),
        rate=CosineRate(1e-3),
        clip=1.0,
        ema=PowerEMA(),
        jump=CM(),
        sampler=Multistep(mid=(0.8,)),
    )
    return Recipe("digits-cd", small_unet(data), {"teacher": teacher_stage(), "cd": stage})


def digits_ctm(data: TrainingSet) -> Recipe:
    """CTM. A coarser grid than the published 18 times: its cost is the teacher's steps, on the mean (2 M + 1) / 3."""
    stage = Stage(
        CTM(n=10, max_steps=5),
        steps=800,
        batch=128,
        optimizer=Adam(),
        rate=CosineRate(1e-3),
        clip=1.0,
        ema=PowerEMA(),
        jump=Euler(),
        second_time="zero",
        sampler=Trajectory(),
    )
    stages = {"teacher": teacher_stage(), "ctm": stage}
    return Recipe("digits-ctm", small_unet(data), stages, evaluation=Evaluation(steps=(1, 2, 4)))


def digits_ctm_gan(data: TrainingSet) -> Recipe:
    """CTM, then on with a critic: the steps count both kinds, the student's and the critic's."""
    recipe = digits_ctm(data)
    before = recipe.stages["ctm"]
    assert isinstance(before.method, CTM)
    critic = SmallCriticConfig(img_channels=data.shape[0])
    stage = replace(before, method=CTMGAN(before.method), steps=400, rate=CosineRate(2e-4), critic=critic)
    return replace(recipe, name="digits-ctm-gan", stages=recipe.stages | {"gan": stage})


def analytic(recipe: Recipe, jump: AnalyticPrecond = FROM_TEACHER) -> Recipe:
    """The same recipe, its last stage's jump computed from the teacher."""
    name, stage = list(recipe.stages.items())[-1]
    stages = recipe.stages | {name: replace(stage, jump=jump)}
    return replace(recipe, name=f"{recipe.name}-analytic", stages=stages)


def digits_cd_analytic(data: TrainingSet) -> Recipe:
    """CD with Analytic-Precond, which at s = eps is nearly CM's."""
    return analytic(digits_cd(data))


def digits_ctm_analytic(data: TrainingSet) -> Recipe:
    """CTM with Analytic-Precond."""
    return analytic(digits_ctm(data))
