"""The diffusion teachers: EDM (Karras et al. 2022) and EDM2 (Karras et al. 2024), from the images alone."""

from onejump.config import Recipe, Stage
from onejump.data.augment import AugmentPipe
from onejump.ema import ConstantEMA, PowerEMA, gamma_of
from onejump.methods.dsm import DSM
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.edm2_unet import EDM2UNetConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.optim import Adam, ConstantRate, InverseSqrtRate
from onejump.recipes.record import Published, for_images, published
from onejump.samplers import ODE
from onejump.times import LogNormal

RAMPUP = 10e6  # images, over which the rate rises from 0


def edm(name: str, network: SongUNetConfig | ADMUNetConfig, lr: float, batch: int, augment: float = 0.0) -> Recipe:
    """200 M images, on ImageNet 2,500 M. The half-life of the EMA is 0.5 M images, on ImageNet 50 M."""
    imagenet = isinstance(network, ADMUNetConfig)
    images, half_life = (2.5e9, 50e6) if imagenet else (200e6, 0.5e6)
    sampling = 18 if network.img_resolution == 32 else 40
    stage = Stage(
        DSM(LogNormal(P_mean=-1.2, P_std=1.2)),
        steps=round(images / batch),
        batch=batch,
        optimizer=Adam(),
        rate=ConstantRate(lr, rampup=round(RAMPUP / batch)),
        augment=AugmentPipe(p=augment) if augment else None,
        ema=ConstantEMA(0.5 ** (batch / half_life)),
        precision="fp16" if imagenet else "fp32",
        sampler=ODE(steps=sampling),
    )
    return published(name, network, {"teacher": stage}, teacher_steps=sampling)


def edm2(name: str, channels: int, lr: float, images: int, dropout: float, sigma_rel: float) -> Recipe:
    """The network of a size of EDM2, its number of images and the EMA with the best FID."""
    network = EDM2UNetConfig(model_channels=channels, dropout=dropout, dropout_resolution=0)
    stage = Stage(
        DSM(LogNormal(P_mean=-0.8, P_std=1.6)),
        steps=images // 2048,
        batch=2048,
        optimizer=Adam(betas=(0.9, 0.99)),
        rate=InverseSqrtRate(lr, t_ref=35_000, rampup=round(RAMPUP / 2048)),
        ema=PowerEMA(gamma_of(sigma_rel)),
        precision="fp16",
        sampler=ODE(steps=32),
    )
    return published(name, network, {"teacher": stage}, teacher_steps=32)


def cifar10(label_dim: int) -> SongUNetConfig:
    return SongUNetConfig(label_dim=label_dim, dropout=0.13, augment_dim=9)


UNCOND, COND = (
    edm(name, cifar10(classes), lr=1e-3, batch=512, augment=0.12)
    for name, classes in (("edm-cifar10-uncond", 0), ("edm-cifar10-cond", 10))
)
FFHQ = edm(
    "edm-ffhq64",
    SongUNetConfig(64, channel_mult=(1, 2, 2, 2), dropout=0.05, augment_dim=9),
    lr=2e-4,
    batch=256,
    augment=0.15,
)
IMAGENET = edm("edm-imagenet64", ADMUNetConfig(label_dim=1000, dropout=0.1), lr=1e-4, batch=4096)
EDM2_S = edm2("edm2-imagenet64-s", 192, lr=0.01, images=1024 * 2**20, dropout=0.0, sigma_rel=0.075)
EDM2_XL = edm2("edm2-imagenet64-xl", 384, lr=0.007, images=640 * 2**20, dropout=0.1, sigma_rel=0.04)

EDM_PAPER, EDM2_PAPER = "Karras et al. 2022 (EDM)", "Karras et al. 2024 (EDM2)"
EMA_NOTE = "Published, the EMA's memory also grows at the start, to 5 % of the steps done."
EDM2_NOTE = (
    "Published, the loss is also weighed by a learned uncertainty of each noise level, which ours has not; the width "
    "of the EMA was searched afterwards."
)
PRESETS = "the settings: released presets, by memory"
FROM_MEMORY = "the settings and the FID: released presets, by memory"

RECORDS = (
    Published(
        name="edm-cifar10-uncond",
        what="EDM teacher, DDPM++, CIFAR-10 without classes",
        source=EDM_PAPER,
        build=for_images(UNCOND),
        command="onejump run edm-cifar10-uncond --data cifar10.zip",
        paper={18: 1.97},
        parameters=55.7,
        gflop=42.4,
        note=EMA_NOTE,
        second_hand=PRESETS,
    ),
    Published(
        name="edm-cifar10-cond",
        what="EDM teacher, DDPM++, CIFAR-10",
        source=EDM_PAPER,
        build=for_images(COND),
        command="onejump run edm-cifar10-cond --data cifar10.zip",
        paper={18: 1.79},
        parameters=55.7,
        gflop=42.4,
        note=EMA_NOTE,
        second_hand=FROM_MEMORY,
    ),
    Published(
        name="edm-ffhq64",
        what="EDM teacher, DDPM++, FFHQ 64x64",
        source=EDM_PAPER,
        build=for_images(FFHQ),
        command="onejump run edm-ffhq64 --data ffhq64.zip",
        paper={40: 2.39},
        parameters=61.8,
        gflop=83.7,
        note=EMA_NOTE,
        second_hand=FROM_MEMORY,
    ),
    Published(
        name="edm-imagenet64",
        what="EDM teacher, ADM, ImageNet 64x64",
        source=EDM_PAPER,
        build=for_images(IMAGENET),
        command="onejump run edm-imagenet64 --data imagenet64.zip",
        paper={40: 2.44},
        parameters=295.9,
        gflop=219.3,
        note=EMA_NOTE,
        second_hand="the FID: later papers' tables",
    ),
    Published(
        name="edm2-imagenet64-s",
        what="EDM2 teacher, size S, ImageNet 64x64",
        source=EDM2_PAPER,
        build=for_images(EDM2_S),
        command="onejump run edm2-imagenet64-s --data imagenet64.zip",
        paper={32: 1.58},
        parameters=280.2,
        gflop=201.6,
        note=EDM2_NOTE,
        second_hand=PRESETS,
    ),
    Published(
        name="edm2-imagenet64-xl",
        what="EDM2 teacher, size XL, ImageNet 64x64",
        source=EDM2_PAPER,
        build=for_images(EDM2_XL),
        command="onejump run edm2-imagenet64-xl --data imagenet64.zip",
        paper={32: 1.33},
        parameters=1119.3,
        gflop=803.9,
        note=EDM2_NOTE,
        second_hand=PRESETS,
    ),
)
