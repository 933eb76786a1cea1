"""Distillation as Zheng et al. 2025 (Analytic-Precond) train it: their table 3, a recipe a column.

Each distils EDM's teacher of these images, given with --teacher. Published FIDs are in docs/methods.md. What the table
leaves open follows CTM's released defaults: RAdam without warm-up or clipping, LPIPS, denoising loss, no critic.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from onejump.analytic import AnalyticPrecond
from onejump.config import Evaluation, Recipe, Stage
from onejump.data.training_set import TrainingSet
from onejump.ema import ConstantEMA
from onejump.lpips import LPIPS
from onejump.methods.cd import CD
from onejump.methods.ctm import CTM
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.optim import ConstantRate, RAdam
from onejump.precond import CM, Euler
from onejump.recipes.distillation import analytic
from onejump.samplers import Multistep, Trajectory
from onejump.types import UserError


@dataclass(frozen=True)
class Column:
    """What differs between the columns of table 3; the student's network is its teacher's (EDM), its dropout CTM's."""

    network: SongUNetConfig | ADMUNetConfig
    n: int  # times on the grid
    max_steps: int  # of the teacher's solver
    steps: int  # iterations
    batch: int
    mid: float  # CM's second time of sampling


COLUMNS = {
    "cifar10-uncond": Column(SongUNetConfig(dropout=0.13), 18, 17, 200_000, 256, 0.585),
    "cifar10-cond": Column(SongUNetConfig(label_dim=10, dropout=0.13), 18, 17, 150_000, 512, 0.585),
    "ffhq64": Column(SongUNetConfig(64, channel_mult=(1, 2, 2, 2), dropout=0.05), 18, 17, 150_000, 256, 0.585),
    "imagenet64": Column(ADMUNetConfig(label_dim=1000, dropout=0.0), 40, 20, 60_000, 2048, 1.382),
}


def cd(name: str, data: TrainingSet | None) -> Recipe:
    """Consistency distillation from one Heun step of the teacher."""
    column = column_of(name, data)
    stage = Stage(
        CD(n=column.n, mu=0.999, distance=LPIPS()),
        steps=column.steps,
        batch=column.batch,
        optimizer=RAdam(),
        rate=ConstantRate(4e-4),
        ema=ConstantEMA(0.999),
        precision="fp16",
        jump=CM(),
        sampler=Multistep(mid=(column.mid,)),
    )
    return recipe_of(f"cd-{name}", column, {"cd": stage}, (1, 2))


def ctm(name: str, data: TrainingSet | None) -> Recipe:
    """Consistency trajectory models without a critic."""
    column = column_of(name, data)
    stage = Stage(
        CTM(n=column.n, max_steps=column.max_steps, mu=0.999, distance=LPIPS()),
        steps=column.steps,
        batch=column.batch,
        optimizer=RAdam(),
        rate=ConstantRate(4e-4),
        ema=ConstantEMA(0.999),
        precision="fp16",
        jump=Euler(),
        second_time="zero",
        sampler=Trajectory(),
    )
    return recipe_of(f"ctm-{name}", column, {"ctm": stage}, (1, 2, 4, 8))


def recipe_of(name: str, column: Column, stages: dict[str, Stage], steps: tuple[int, ...]) -> Recipe:
    every = {"log_every": 100, "save_every": 1000, "sample_every": 5000, "evaluate_every": 20_000}
    return Recipe(name, column.network, stages, evaluation=Evaluation(n=50_000, steps=steps), **every)


def column_of(name: str, data: TrainingSet | None) -> Column:
    """Raises UserError for images that these networks are not for."""
    network = COLUMNS[name].network
    if data is None:
        return COLUMNS[name]
    shape, side = data.shape, network.img_resolution
    if shape != (network.img_channels, side, side):
        found = "x".join(map(str, shape))
        raise UserError(
            f"images are {found}: this recipe is for {network.img_channels}x{side}x{side}; give --size {side}"
        )
    if network.label_dim not in (0, data.classes):
        raise UserError(
            f"images have {data.classes} classes: this recipe is for {network.label_dim}; give other --data"
        )
    return COLUMNS[name]


def recipes() -> dict[str, Callable[[TrainingSet | None], Recipe]]:
    """By name, each with and without Analytic-Precond."""
    found: dict[str, Callable[[TrainingSet | None], Recipe]] = {}
    for name in COLUMNS:
        for kind, make in (("cd", cd), ("ctm", ctm)):
            found[f"{kind}-{name}"] = partial(make, name)
            found[f"{kind}-{name}-analytic"] = partial(with_table, make, name)
    return found


def with_table(make: Callable[[str, TrainingSet | None], Recipe], name: str, data: TrainingSet | None) -> Recipe:
    """With Analytic-Precond as published: 120 times, 4096 images."""
    return analytic(make(name, data), AnalyticPrecond())
