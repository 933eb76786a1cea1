"""CTM with its critic (Kim et al. 2024): first without, then on with it; both kinds of steps count."""

from dataclasses import replace

from onejump.config import Network, Recipe, Stage
from onejump.ema import ConstantEMA
from onejump.lpips import LPIPS
from onejump.methods.ctm import CTM
from onejump.methods.ctm_gan import CTMGAN
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.critic import ProjectedCriticConfig, TimmFeatures
from onejump.networks.song_unet import SongUNetConfig
from onejump.optim import ConstantRate, RAdam
from onejump.precond import Euler
from onejump.recipes.record import Published, for_images, published
from onejump.samplers import Trajectory

CRITIC = ProjectedCriticConfig(
    (
        TimmFeatures("deit_base_distilled_patch16_224", "deit_base_distilled_patch16_224.safetensors", (2, 5, 8, 11)),
        TimmFeatures("tf_efficientnet_lite0", "tf_efficientnet_lite0.safetensors", (1, 2, 3, 4)),
    )
)


def ctm_gan(name: str, network: Network, method: CTM, batch: int, before: int, after: int, lr: float) -> Recipe:
    """`before` steps without the critic, `after` with it, at the rate lr."""
    ctm = Stage(
        method,
        steps=before,
        batch=batch,
        optimizer=RAdam(),
        rate=ConstantRate(4e-4),
        ema=ConstantEMA(0.999),
        precision="fp16",
        jump=Euler(),
        second_time="random",
        sampler=Trajectory(),
    )
    gan = replace(ctm, method=CTMGAN(method, critic_lr=2e-3), steps=after, rate=ConstantRate(lr), critic=CRITIC)
    return published(name, network, {"ctm": ctm, "gan": gan})


def cifar10(name: str, label_dim: int) -> Recipe:
    method = CTM(n=18, max_steps=17, mu=0.999, distance=LPIPS())
    network = SongUNetConfig(label_dim=label_dim, dropout=0.13)
    return ctm_gan(name, network, method, batch=256, before=50_000, after=50_000, lr=4e-4)


def imagenet(name: str) -> Recipe:
    method = CTM(n=40, max_steps=20, mu=0.999, distance=LPIPS())
    network = ADMUNetConfig(label_dim=1000, dropout=0.0, min_group=1, noise_scale=1000.0, label_at_s=False)
    return ctm_gan(name, network, method, batch=2048, before=10_000, after=20_000, lr=8e-6)


COMMAND = "onejump run {0} --data {1}.zip --teacher models/{2}"
RELEASED = " The released command without classes has batch 528 and a target average of 0.9999."
PAPER, NOTES = "Kim et al. 2024 (CTM)", "the FIDs, steps and batch: reading notes of the paper"
WEIGHTS = "The critic's weights: gan.critic (docs/methods.md). "
WITHOUT = "Without the critic, published: 5.19 in 1 step, 3.00 in 18."
RECORDS = (
    Published(
        name="ctm-gan-cifar10-uncond",
        what="CTM with its critic, DDPM++, CIFAR-10 without classes",
        source=PAPER,
        build=for_images(cifar10("ctm-gan-cifar10-uncond", 0)),
        command=COMMAND.format("ctm-gan-cifar10-uncond", "cifar10", "edm-cifar10-uncond"),
        paper={1: 1.98, 2: 1.87},
        parameters=60.4,
        gflop=42.4,
        note=WEIGHTS + WITHOUT + RELEASED,
        second_hand=NOTES,
    ),
    Published(
        name="ctm-gan-cifar10-cond",
        what="CTM with its critic, DDPM++, CIFAR-10",
        source=PAPER,
        build=for_images(cifar10("ctm-gan-cifar10-cond", 10)),
        command=COMMAND.format("ctm-gan-cifar10-cond", "cifar10", "edm-cifar10-cond"),
        paper={1: 1.73, 2: 1.63},
        parameters=60.4,
        gflop=42.4,
        cost="4 V100",
        note=WEIGHTS,
        second_hand=NOTES,
    ),
    Published(
        name="ctm-gan-imagenet64",
        what="CTM with its critic, ADM, ImageNet 64x64",
        source=PAPER,
        build=for_images(imagenet("ctm-gan-imagenet64")),
        command=COMMAND.format("ctm-gan-imagenet64", "imagenet64", "edm_imagenet64_ema"),
        paper={1: 1.92, 2: 1.73},
        parameters=324.1,
        gflop=219.4,
        note=WEIGHTS + "The released commands have batches of 1440 without the critic and 2112 to 4224 with it.",
        second_hand=NOTES,
    ),
)
