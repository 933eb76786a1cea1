"""Text-to-image: consistency models of Stable Diffusion's latents, distilled from its guided network."""

from dataclasses import replace

from onejump.config import Evaluation, Recipe, Stage
from onejump.data.training_set import TrainingSet
from onejump.ema import ConstantEMA
from onejump.losses import inverse_delta
from onejump.methods.cd import CD
from onejump.methods.distilled import Distilled
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.networks.text_unet import TextUNetConfig
from onejump.optim import Adam, ConstantRate
from onejump.precond import StableDiffusion
from onejump.samplers import Multistep
from onejump.solvers import euler
from onejump.times import AtLevels, Discretisation, LevelSteps, LogNormal, LogStudentT
from onejump.vp import VPSchedule

LEVELS = VPSchedule()
STEPS = (1, 2)
HUBER = 0.06  # the paper's on ImageNet-64, of nearly as many numbers a sample as these latents


def tcm_sd15(data: TrainingSet | None = None) -> Recipe:
    """TCM on Stable Diffusion 1.5 (Lee et al. 2025, table 5), from its folder: --teacher FOLDER.

    The paper's: distillation with guidance 6 from Stable Diffusion 1.5, batch 512, 80,000 steps of stage 1 and 200,000
    of stage 2; t' = 1, w_b = 0.1, rho = 0.25, psi_t log-Student-t. It leaves all else open. Ours: t lognormal as ECT's
    on ImageNet-64, Delta_t halved every 10,000 steps, down to the schedule's own spacing; rate, EMA, c.
    """
    stage1 = _stage1()
    truncated = TCM(
        times=AtLevels(LogStudentT(mu=0.0, sigma=0.2, df=0.01)),
        delta=LevelSteps(Discretisation(q=2, double_every=10_000, ratio_limit=0.999)),
        weight=inverse_delta,
        c=HUBER,
        t_prime=LEVELS.near(1.0),
        t_max=LEVELS.sigma_max,
        rho=0.25,
        w_b=0.1,
    )
    stage2 = replace(stage1, method=Distilled(truncated), steps=200_000, count_on=True, rate=ConstantRate(5e-6))
    return _recipe("tcm-sd15", {"stage1": stage1, "stage2": stage2})


def _stage1() -> Stage:
    return Stage(
        Distilled(
            ECT(
                times=AtLevels(LogNormal(P_mean=-0.8, P_std=1.6)),
                delta=LevelSteps(Discretisation(q=2, double_every=10_000, ratio_limit=0.999)),
                weight=inverse_delta,
                c=HUBER,
            )
        ),
        steps=80_000,
        batch=512,
        micro_batch=16,
        optimizer=Adam(),
        rate=ConstantRate(1e-5),
        clip=1.0,
        ema=ConstantEMA(0.9999),
        precision="bf16",
        checkpointing=True,
        precond=StableDiffusion(),
        sampler=Multistep(LEVELS.sigma_max, (LEVELS.near(1.0),)),
        guidance=6.0,
    )


def cd_sd15(data: TrainingSet | None = None) -> Recipe:
    """Consistency distillation of Stable Diffusion 1.5, guidance 6, batch 512: one Euler (DDIM) step of 50 at a time.

    The target is an average of the student, as in CM's published distillation of larger images.
    """
    stage = replace(
        _stage1(),
        method=CD(n=51, mu=0.95, solver=euler, levels=LEVELS),
        steps=80_000,
    )
    return _recipe("cd-sd15", {"cd": stage})


def _recipe(name: str, stages: dict[str, Stage]) -> Recipe:
    every = {"log_every": 100, "save_every": 2000, "sample_every": 2000, "evaluate_every": 10_000}
    evaluation = Evaluation(n=30_000, steps=STEPS, teacher_steps=50)
    return Recipe(name, TextUNetConfig(), stages, evaluation=evaluation, **every)


def at_levels(recipe: Recipe, network: TextUNetConfig, precond: StableDiffusion) -> Recipe:
    """The recipe for another Stable Diffusion: its network, its prediction, its noise levels in place of the recipe's.

    t' and the sampler's times become the nearest of these. For version 1.5 nothing changes.
    """
    if isinstance(recipe.network, TextUNetConfig):
        network = replace(network, lora_rank=recipe.network.lora_rank)
    stages = {name: _at_levels(stage, precond) for name, stage in recipe.stages.items()}
    return replace(recipe, network=network, stages=stages)


def _at_levels(stage: Stage, precond: StableDiffusion) -> Stage:
    levels, method, sampler = precond.schedule, stage.method, stage.sampler
    if isinstance(method, CD):
        method = replace(method, levels=levels)
    if isinstance(method, Distilled):
        of = method.of
        if isinstance(of.times, AtLevels):
            of = replace(of, times=replace(of.times, schedule=levels))
        if isinstance(of.delta, LevelSteps):
            of = replace(of, delta=replace(of.delta, schedule=levels))
        if isinstance(of, TCM):
            of = replace(of, t_prime=levels.near(of.t_prime), t_max=levels.sigma_max)
        method = replace(method, of=of)
    if isinstance(sampler, Multistep):
        sampler = Multistep(levels.sigma_max, tuple(levels.near(t) for t in sampler.mid))
    return replace(stage, method=method, precond=precond, sampler=sampler)
