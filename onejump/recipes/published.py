"""Distillation as Zheng et al. 2025 (Analytic-Precond) train it: their table 3, a recipe a column.

Each distils EDM's teacher of these images, given with --teacher. What the table leaves open follows CTM's released
defaults: RAdam without warm-up or clipping, LPIPS, denoising loss, no critic.
"""

from dataclasses import dataclass, field

from onejump.analytic import AnalyticPrecond
from onejump.config import Recipe, Stage
from onejump.ema import ConstantEMA
from onejump.lpips import LPIPS
from onejump.methods.cd import CD
from onejump.methods.ctm import CTM
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.optim import ConstantRate, RAdam
from onejump.precond import CM, Euler
from onejump.recipes.distillation import analytic
from onejump.recipes.record import Published, for_images, published
from onejump.samplers import Multistep, Trajectory


@dataclass(frozen=True)
class Column:
    """What differs between the columns of table 3; the student's network is its teacher's (EDM), its dropout CTM's."""

    images: str  # in words
    network: SongUNetConfig | ADMUNetConfig
    n: int  # times on the grid
    max_steps: int  # of the teacher's solver
    steps: int  # iterations
    batch: int
    mid: float  # CM's second time of sampling
    cost: str
    parameters: float  # of the teacher, in millions
    gflop: float
    with_s: float  # parameters of a student that reads the second time
    jumps: tuple[int, ...] = (1, 2, 4, 8)  # with which CTM is judged
    fid: dict[str, dict[int, float]] = field(default_factory=dict)  # by recipe
    note: str = ""


COLUMNS = {
    "cifar10-uncond": Column(
        images="CIFAR-10 without classes",
        network=SongUNetConfig(dropout=0.13),
        n=18,
        max_steps=17,
        steps=200_000,
        batch=256,
        mid=0.585,
        cost="5 days on 4 A800",
        parameters=55.7,
        gflop=42.4,
        with_s=60.4,
        note="CTM's FIDs with several jumps, numbers not named: 3.83 and 3.58; with Analytic-Precond 3.77 and 3.54.",
    ),
    "cifar10-cond": Column(
        images="CIFAR-10",
        network=SongUNetConfig(label_dim=10, dropout=0.13),
        n=18,
        max_steps=17,
        steps=150_000,
        batch=512,
        mid=0.585,
        cost="4 days on 8 A800",
        parameters=55.7,
        gflop=42.4,
        with_s=60.4,
        jumps=(1, 2, 5, 10),
        fid={"ctm-cifar10-cond": {5: 2.59, 10: 2.56}, "ctm-cifar10-cond-analytic": {5: 2.62, 10: 2.65}},
    ),
    "ffhq64": Column(
        images="FFHQ 64x64",
        network=SongUNetConfig(64, channel_mult=(1, 2, 2, 2), dropout=0.05),
        n=18,
        max_steps=17,
        steps=150_000,
        batch=256,
        mid=0.585,
        cost="5 days on 8 A800",
        parameters=61.8,
        gflop=83.7,
        with_s=67.3,
        note="Analytic-Precond is reported as better with every number of jumps; the values are not at hand.",
    ),
    "imagenet64": Column(
        images="ImageNet 64x64",
        network=ADMUNetConfig(label_dim=1000, dropout=0.0),
        n=40,
        max_steps=20,
        steps=60_000,
        batch=2048,
        mid=1.382,
        cost="8 days on 32 A800",
        parameters=295.9,
        gflop=219.3,
        with_s=324.1,
        note="FIDs with 2 and 3 jumps lie within 5.73 and 6.16; with 8 they are 5.43 and 5.44, it is unclear whose.",
    ),
}


def cd(name: str) -> Recipe:
    """Consistency distillation from one Heun step of the teacher."""
    column = COLUMNS[name]
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
    return published(f"cd-{name}", column.network, {"cd": stage})


def ctm(name: str) -> Recipe:
    """Consistency trajectory models without a critic."""
    column = COLUMNS[name]
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
    return published(f"ctm-{name}", column.network, {"ctm": stage}, evaluation=column.jumps)


FASTER = "The paper's claim: CTM's multi-step quality in a half to a third of the training (2x to 3x)."


def record(recipe: Recipe, images: str) -> Published:
    """The row of this recipe."""
    column, kind = COLUMNS[images], "CTM" if recipe.name.startswith("ctm") else "CD"
    network = "ADM" if isinstance(column.network, ADMUNetConfig) else "DDPM++"
    plus = " + Analytic-Precond" if recipe.name.endswith("-analytic") else ""
    data = images.removesuffix("-uncond").removesuffix("-cond")
    note = column.note if kind == "CTM" else "No FIDs of CD are at hand; the paper reports no difference for it."
    return Published(
        name=recipe.name,
        what=f"{kind}{plus}, {network}, {column.images}",
        source="Zheng et al. 2025 (Analytic-Precond), table 3",
        build=for_images(recipe),
        command=f"onejump run {recipe.name} --data {data}.zip --teacher models/edm-{images}",
        paper=column.fid.get(recipe.name, {}),
        parameters=column.with_s if kind == "CTM" else column.parameters,
        gflop=column.gflop,
        cost=column.cost,
        note=f"{FASTER} {note}".strip() if kind == "CTM" and plus else note,
        second_hand=SECOND_HAND[kind],
    )


SECOND_HAND = {
    "CD": "dropout, LPIPS: CM's defaults; the second time of sampling: CM's notebook",
    "CTM": "the FIDs: reviews of the paper; dropout, LPIPS, no critic: CTM's, whose embedding of s starts at random",
}
RECORDS = tuple(
    record(recipe, images)
    for make in (cd, ctm)
    for images in COLUMNS
    for recipe in (make(images), analytic(make(images), AnalyticPrecond()))
)
