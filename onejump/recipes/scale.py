"""A recipe made small: `tiny`, two steps a stage on a CPU, or `small`, about an hour on one GPU."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from onejump.analytic import AnalyticPrecond
from onejump.analytic_table import Estimator
from onejump.config import Distilling, Evaluation, Network, Recipe, Stage
from onejump.cost import shape_of
from onejump.data.image_set import ImageSet
from onejump.ema import ConstantEMA
from onejump.losses import mean_l2
from onejump.lpips import LPIPS
from onejump.methods.ct import CT
from onejump.methods.ctm import CTM
from onejump.methods.dsm import DSM
from onejump.methods.ict import ICT
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.critic import ProjectedCriticConfig, SmallCriticConfig
from onejump.networks.edm2_unet import EDM2UNetConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.networks.text_unet import TextUNetConfig
from onejump.optim import ConstantRate, InverseSqrtRate
from onejump.recipes import SCALES
from onejump.recipes.effort import FLOP_A_SECOND, flop
from onejump.samplers import ODE
from onejump.times import Discretisation
from onejump.types import UserError

STEPS, BATCH, CHANNELS = 2, 4, 8  # of tiny
HOUR = 0.75 * 3600 * FLOP_A_SECOND / 2  # FLOP of small, at half the speed of a large run; a quarter is for evaluation
MOST = 128  # images in the largest batch of small


def scaled(recipe: Recipe, scale: str) -> Recipe:
    """The recipe at this scale, called NAME-SCALE. A pure function.

    tiny: two steps of each stage, batch 4, 8 channels and one block a level, float32, 8 images judged. Distances are
    mean_l2, the critic is a small one and statistics are of 4 images, so that no weight files are needed; where a
    teacher is asked for, a stage that trains one comes first.
    small: the same network for as many images as an hour allows, in half precision; of all stages the same share of the
    steps, in batches that are to one another as the published, of at most 128. What counts steps (curricula, t_ref,
    warm-up, the memory of the EMA) shrinks with them, the grids of CT and iCT end 8 times coarser; 2,000 images are
    judged.
    Raises UserError for another scale.
    """
    if scale not in SCALES:
        raise UserError(f"scale: {scale!r}; choose one of {', '.join(SCALES)}")
    made = tiny(recipe) if scale == "tiny" else small(recipe)
    return replace(made, name=f"{recipe.name}-{scale}")


def tiny(recipe: Recipe) -> Recipe:
    stages = {name: tiny_stage(stage) for name, stage in recipe.stages.items()}
    distils = isinstance(next(iter(stages.values())).method, Distilling)
    if distils and not isinstance(recipe.network, TextUNetConfig):  # whose teacher is a folder
        stages = {"teacher": Stage(DSM(), steps=STEPS, batch=BATCH, sampler=ODE(steps=2))} | stages
    every: dict[str, Any] = dict.fromkeys(("log_every", "save_every", "sample_every", "evaluate_every"), 0)
    judged = Evaluation(n=8, steps=recipe.evaluation.steps[:2], teacher_steps=2)
    return replace(recipe, network=shrunk(recipe.network), stages=stages, evaluation=judged, **every)


def tiny_stage(stage: Stage) -> Stage:
    method: Any = without_files(stage.method)
    jump = replace(stage.jump, estimator=FEW) if isinstance(stage.jump, AnalyticPrecond) else stage.jump
    critic = SmallCriticConfig() if isinstance(stage.critic, ProjectedCriticConfig) else stage.critic
    size: dict[str, Any] = {
        "steps": STEPS,
        "batch": BATCH,
        "micro_batch": 0,
        "precision": "fp32",
        "checkpointing": False,
    }
    return replace(stage, method=method, jump=jump, critic=critic, **size)


FEW = Estimator(times=2, samples=4)


def without_files(part: Any) -> Any:
    """The method, no distance of which reads weights, and CTM's with at most two steps of the teacher."""
    if isinstance(part, LPIPS):
        return mean_l2
    if isinstance(part, CTM):
        part = replace(part, max_steps=min(part.max_steps, 2))
    return of_parts(part, without_files)


def of_parts(part: Any, change: Any) -> Any:
    """The same dataclass of changed fields; anything else as it is."""
    if not is_dataclass(part) or isinstance(part, type):
        return part
    return replace(part, **{f.name: change(getattr(part, f.name)) for f in fields(part) if f.init})


def shrunk(network: Network) -> Network:
    """The same levels and images, few channels."""
    if isinstance(network, SongUNetConfig | ADMUNetConfig):
        return replace(network, model_channels=CHANNELS, num_blocks=1)
    if isinstance(network, EDM2UNetConfig):
        return replace(network, model_channels=CHANNELS, num_blocks=1, channels_per_head=CHANNELS)
    return network


def small(recipe: Recipe) -> Recipe:
    gflop = gflop_of(recipe.network)
    total = sum(flop(stage, gflop) * stage.steps * stage.batch for stage in recipe.stages.values())
    share = min(HOUR / total, 1.0)  # of the images
    smaller = min(MOST / max(stage.batch for stage in recipe.stages.values()), 1.0)
    quicker = in_whole_parts(share / smaller, recipe)
    stages = {name: small_stage(stage, smaller, quicker) for name, stage in recipe.stages.items()}
    longest = max(stage.steps for stage in stages.values())
    every: dict[str, Any] = {
        "log_every": 50,
        "save_every": 500,
        "sample_every": -(-longest // 8),
        "evaluate_every": -(-longest // 4),
    }
    return replace(recipe, stages=stages, evaluation=replace(recipe.evaluation, n=2000), **every)


def in_whole_parts(quicker: float, recipe: Recipe) -> float:
    """The nearest share of the steps of which each part of a curriculum has a whole number, so that none begins late.

    That is of use while a part is a few steps long.
    """
    parts = [delta.double_every for stage in recipe.stages.values() for delta in curricula(stage.core)]
    return max(round(quicker * parts[0]), 1) / parts[0] if parts else quicker


def curricula(part: Any) -> list[Discretisation]:
    if isinstance(part, Discretisation):
        return [part]
    inner = [getattr(part, f.name) for f in fields(part)] if is_dataclass(part) and not isinstance(part, type) else []
    return [found for value in inner for found in curricula(value)]


def small_stage(stage: Stage, smaller: float, quicker: float) -> Stage:
    """Both the same for all stages, so that those which count on are where they would be in the full run.

    smaller: the share of a batch; quicker: of the steps.
    """

    def change(part: Any) -> Any:
        return shortened(part, quicker)

    jump = stage.jump
    if isinstance(jump, AnalyticPrecond):
        jump = replace(jump, estimator=replace(jump.estimator, times=60, samples=512))
    parts: dict[str, Any] = {name: change(getattr(stage, name)) for name in ("method", "rate", "ema")}
    precision = "fp16" if stage.precision in ("fp32", "tf32") else stage.precision
    batch, steps = max(round(stage.batch * smaller), 1), max(round(stage.steps * quicker), 1)
    passes: dict[str, Any] = {"steps": steps, "batch": batch, "micro_batch": min(stage.micro_batch, batch)}
    return replace(stage, jump=jump, precision=precision, **passes, **parts)


def shortened(part: Any, share: float) -> Any:
    """What counts steps, for a run of this share of them."""
    if isinstance(part, Discretisation):
        return replace(part, double_every=max(round(part.double_every * share), 1))
    if isinstance(part, ConstantRate):
        return replace(part, rampup=round(part.rampup * share))
    if isinstance(part, InverseSqrtRate):
        return replace(part, t_ref=part.t_ref * share, rampup=round(part.rampup * share))
    if isinstance(part, ConstantEMA):
        return ConstantEMA(part.beta ** (1 / share))
    if isinstance(part, ICT | CT):
        part = replace(part, s1=max(part.s1 // 8, part.s0))
    return of_parts(part, lambda inner: shortened(inner, share))


def gflop_of(network: Network) -> float:
    """10^9 operations of a pass, counted without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from onejump.cost import flops_of

    with FakeTensorMode():
        return flops_of(network.build(), network) / 1e9


def made_up(network: Network) -> ImageSet:
    """Images where none are given: the digits, enlarged to this network's shape, in as many classes as it knows.

    Class k of ten is the digit k; of another number of classes it is every such image in turn.
    """
    from onejump.data.digits import digits

    channels, side, _ = shape_of(network)
    real = digits()
    near = torch.arange(side) * real.shape[-1] // side
    images = real.images[:, :, near][..., near].expand(-1, channels, -1, -1).contiguous()
    if network.label_dim == 0:
        return ImageSet("made-up", images)
    labels = real.labels if network.label_dim == 10 else torch.arange(real.n) % network.label_dim
    return ImageSet("made-up", images, labels, tuple(map(str, range(network.label_dim))))
