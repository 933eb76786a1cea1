"""The main job, small enough for a laptop: the whole chain of the papers on 8x8 digits, or on images of your own."""

from onejump.config import Evaluation, Recipe, Stage
from onejump.data.training_set import TrainingSet
from onejump.ema import PowerEMA
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.ict import ICT
from onejump.methods.tcm import TCM
from onejump.networks.song_unet import SongUNetConfig
from onejump.optim import Adam, CosineRate
from onejump.precond import CM
from onejump.samplers import ODE, Multistep
from onejump.times import Discretisation, LogStudentT
from onejump.types import UserError


def small_unet(data: TrainingSet) -> SongUNetConfig:
    """Two levels at 8x8; one more for each doubling of the side, attention at the lowest."""
    channels, height, width = data.shape
    if height != width or height % 4 or height < 8:
        below = max(min(height, width) // 4 * 4, 8)
        near = f"{below}" if below >= min(height, width) else f"{below} or {below + 4}"
        raise UserError(
            f"images are {height}x{width}: this network needs squares of 8, 12, 16, ...; give --size {near}"
        )
    levels = 2
    while height % 2**levels == 0 and height >> levels >= 8:
        levels += 1
    return SongUNetConfig(
        img_resolution=height,
        img_channels=channels,
        label_dim=data.classes,
        model_channels=32,
        channel_mult=(1, *[2] * (levels - 1)),
        num_blocks=1,
        attn_resolutions=(height >> (levels - 1),),
        dropout=0.1,
    )


def teacher_stage() -> Stage:
    """EDM's diffusion model, from which all chains start."""
    return Stage(
        DSM(),
        steps=1000,
        batch=128,
        optimizer=Adam(),
        rate=CosineRate(1e-3),
        clip=1.0,  # keeps the first steps small for images of any size: the losses are sums over pixels
        ema=PowerEMA(),
        sampler=ODE(),
    )


def digits(data: TrainingSet) -> Recipe:
    """Teacher (EDM) -> stage 1 (ECT) -> stage 2 (TCM). The curriculum has as few doublings as so short a run bears."""
    curriculum = Discretisation(q=2, double_every=150, ratio_limit=0.984375)
    stage1 = Stage(
        ECT(delta=curriculum, t_min=0.002, t_max=80.0),
        steps=1000,
        batch=128,
        optimizer=Adam(),
        rate=CosineRate(1e-3),
        clip=1.0,
        ema=PowerEMA(),
        sampler=Multistep(mid=(0.8,)),
    )
    stage2 = Stage(
        TCM(LogStudentT(mu=0.0, sigma=0.2, df=0.01), curriculum, t_prime=1.0, rho=0.25, w_b=0.1),
        steps=400,
        count_on=True,
        batch=128,
        optimizer=Adam(),
        rate=CosineRate(2e-3),
        clip=1.0,
        ema=PowerEMA(),
        sampler=Multistep(mid=(1.0,)),
    )
    return Recipe(
        name="digits",
        network=small_unet(data),
        stages={"teacher": teacher_stage(), "stage1": stage1, "stage2": stage2},
        evaluation=Evaluation(n=2000, steps=(1, 2), teacher_steps=18),
    )


def digits_ict(data: TrainingSet) -> Recipe:
    """iCT, its curriculum cut to four doublings: as many as so short a run bears."""
    stage = Stage(
        ICT(s0=10, s1=160),
        steps=2500,
        batch=128,
        rate=CosineRate(1e-3),
        clip=1.0,
        ema=PowerEMA(),
        jump=CM(),
        sampler=Multistep(mid=(0.821,)),
    )
    return Recipe(name="digits-ict", network=small_unet(data), stages={"ict": stage})
