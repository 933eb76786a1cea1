"""iCT and iCT-deep (Song & Dhariwal 2024): from images alone; no teacher, no LPIPS, no EMA in the target."""

from dataclasses import replace

from onejump.config import Recipe, Stage
from onejump.ema import ConstantEMA
from onejump.methods.ict import ICT
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.optim import ConstantRate, RAdam
from onejump.precond import CM
from onejump.recipes.record import Published, for_images, published
from onejump.samplers import Multistep

CIFAR10 = SongUNetConfig(variant="ncsnpp", fourier_scale=0.02, dropout=0.3)
IMAGENET = ADMUNetConfig(label_dim=1000, scale_shift=False, dropout=0.2, dropout_resolution=16)


def ict(name: str, network: SongUNetConfig | ADMUNetConfig) -> Recipe:
    """deep: twice the blocks a level, all else the same."""
    imagenet = isinstance(network, ADMUNetConfig)
    if "deep" in name:
        network = replace(network, num_blocks=2 * network.num_blocks)
    stage = Stage(
        ICT(s0=10, s1=1280, P_mean=-1.1, P_std=2.0, huber=0.00054),
        steps=800_000 if imagenet else 400_000,
        batch=4096 if imagenet else 1024,
        optimizer=RAdam(),
        rate=ConstantRate(1e-4),
        ema=ConstantEMA(0.99997 if imagenet else 0.99993),
        precision="fp16" if imagenet else "fp32",
        jump=CM(),
        sampler=Multistep(mid=(1.526 if imagenet else 0.821,)),
    )
    return published(name, network, {"ict": stage})


PAPER, COMMON = (
    "Song & Dhariwal 2024 (iCT)",
    "rate, batch, steps, EMA, dropout, network, second time of sampling: later papers",
)
DEEP = "TCM's table prints {:g} M, twice the base; doubling the blocks makes {:g} M."
NO_ADAGN = "TCM's table prints 296 M, with adaptive group norm (network.scale_shift=true), which iCT removes: 282.2 M."

RECORDS = (
    Published(
        name="ict-cifar10",
        what="iCT, NCSN++, CIFAR-10 without classes",
        source=PAPER,
        build=for_images(ict("ict-cifar10", CIFAR10)),
        command="onejump run ict-cifar10 --data cifar10.zip",
        paper={1: 2.83, 2: 2.46},
        parameters=56.4,
        gflop=42.5,
        second_hand=COMMON,
    ),
    Published(
        name="ict-deep-cifar10",
        what="iCT-deep, NCSN++, CIFAR-10 without classes",
        source=PAPER,
        build=for_images(ict("ict-deep-cifar10", CIFAR10)),
        command="onejump run ict-deep-cifar10 --data cifar10.zip",
        paper={1: 2.51, 2: 2.24},
        parameters=112,
        gflop=76.4,
        note=DEEP.format(112, 97.6),
        second_hand=COMMON,
    ),
    Published(
        name="ict-imagenet64",
        what="iCT, ADM, ImageNet 64x64",
        source=PAPER,
        build=for_images(ict("ict-imagenet64", IMAGENET)),
        command="onejump run ict-imagenet64 --data imagenet64.zip",
        paper={1: 4.02, 2: 3.20},
        parameters=296,
        gflop=219.3,
        note=NO_ADAGN,
        second_hand=COMMON,
    ),
    Published(
        name="ict-deep-imagenet64",
        what="iCT-deep, ADM, ImageNet 64x64",
        source=PAPER,
        build=for_images(ict("ict-deep-imagenet64", IMAGENET)),
        command="onejump run ict-deep-imagenet64 --data imagenet64.zip",
        paper={1: 3.25, 2: 2.77},
        parameters=592,
        gflop=362.8,
        note=DEEP.format(592, 472.8),
        second_hand=COMMON,
    ),
)
