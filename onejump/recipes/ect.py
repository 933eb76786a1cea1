"""ECT (Geng et al. 2024): consistency training that starts from a diffusion model, given with --init."""

from onejump.config import Recipe, Stage
from onejump.ema import ConstantEMA, PowerEMA
from onejump.losses import inverse_c_out_squared, inverse_delta
from onejump.methods.ect import ECT
from onejump.networks.edm2_unet import EDM2UNetConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.optim import Adam, ConstantRate, InverseSqrtRate, RAdam
from onejump.recipes.record import Published, for_images, published
from onejump.samplers import Multistep
from onejump.times import Discretisation, LogNormal


def cifar10(name: str, steps: int, q: float = 2.0, beta: float = 0.9999) -> Recipe:
    """q = 256 and 8,000 steps is the run of one hour: the curriculum stays in its first part, r = t - Delta_t.

    As in the released evaluation c_skip and c_out are shifted by 0.003 in sampling, and only there.
    """
    stage = Stage(
        ECT(LogNormal(P_mean=-1.1, P_std=2.0), Discretisation(q=q, double_every=25_000), inverse_delta, c=0.0),
        steps=steps,
        batch=128,
        optimizer=RAdam(),
        rate=ConstantRate(1e-4),
        ema=ConstantEMA(beta),
        sampler=Multistep(mid=(0.821,)),
        shift=0.003,
    )
    return published(name, SongUNetConfig(dropout=0.2), {"ect": stage})


def imagenet(name: str, channels: int, lr: float, dropout: float, batch: int = 128) -> Recipe:
    """EDM2's network of a size, its rate and dropout."""
    network = EDM2UNetConfig(model_channels=channels, dropout=dropout, dropout_resolution=16)
    times, delta = LogNormal(P_mean=-0.8, P_std=1.6), Discretisation(q=4, double_every=25_000)
    stage = Stage(
        ECT(times, delta, inverse_c_out_squared, c=0.06),
        steps=100_000,
        batch=batch,
        optimizer=Adam(betas=(0.9, 0.99)),
        rate=InverseSqrtRate(lr, t_ref=2000),
        ema=PowerEMA(gamma=16.97),
        precision="tf32",
        sampler=Multistep(mid=(1.526,)),
    )
    return published(name, network, {"ect": stage})


PAPER, PRESETS = "Geng et al. 2024 (ECT)", "the settings: the released commands"
START = "onejump train {0} --data {1}.zip --init models/{2}\nonejump run {0} --data {1}.zip"  # evaluated, reported
WIDTHS = "Published with power EMAs of relative widths 0.01, 0.05, 0.1; which one was judged is not stated: 0.05 here."


def on_cifar10(name: str, what: str, recipe: Recipe, paper: dict[int, float], cost: str = "1 to 8 GPUs") -> Published:
    return Published(
        name=name,
        what=f"ECT, DDPM++, CIFAR-10 without classes, {what}",
        source=PAPER,
        build=for_images(recipe),
        command=START.format(name, "cifar10", "edm-cifar10-uncond"),
        paper=paper,
        parameters=55.7,
        gflop=42.4,
        cost=cost,
        second_hand=PRESETS,
    )


def on_imagenet(name: str, size: str, recipe: Recipe, parameters: float, gflop: float, fids: tuple) -> Published:
    one, two = fids
    images = "102.4 M images" if "100m" in name else "12.8 M images"
    by_memory = size in ("M", "L", "XL") and "100m" not in name
    return Published(
        name=name,
        what=f"ECT, EDM2-{size}, ImageNet 64x64, {images}",
        source=PAPER,
        build=for_images(recipe),
        command=START.format(name, "imagenet64", f"edm2-img64-{size.lower()}"),
        paper={1: one, 2: two},
        parameters=parameters,
        gflop=gflop,
        cost="4 to 8 GPUs",
        note=WIDTHS,
        second_hand=PRESETS + (", the FIDs: by memory" if by_memory else ""),
    )


RECORDS = (
    on_cifar10("ect-cifar10-100k", "100k steps", cifar10("ect-cifar10-100k", 100_000), {1: 4.54, 2: 2.20}),
    on_cifar10("ect-cifar10-200k", "200k steps", cifar10("ect-cifar10-200k", 200_000), {1: 3.86, 2: 2.15}),
    on_cifar10("ect-cifar10-400k", "400k steps", cifar10("ect-cifar10-400k", 400_000), {1: 3.60, 2: 2.11}),
    on_cifar10(
        "ect-cifar10-hour",
        "an hour on an A100",
        cifar10("ect-cifar10-hour", 8000, q=256, beta=0.9993),
        {2: 2.73},
        "1 hour on 1 A100",
    ),
    on_imagenet("ect-imagenet64-s", "S", imagenet("ect-imagenet64-s", 192, 1e-3, 0.4), 280.2, 201.6, (5.51, 3.18)),
    on_imagenet("ect-imagenet64-m", "M", imagenet("ect-imagenet64-m", 256, 9e-4, 0.5), 497.8, 357.9, (3.67, 2.35)),
    on_imagenet("ect-imagenet64-l", "L", imagenet("ect-imagenet64-l", 320, 8e-4, 0.5), 777.5, 558.6, (3.55, 2.14)),
    on_imagenet("ect-imagenet64-xl", "XL", imagenet("ect-imagenet64-xl", 384, 7e-4, 0.5), 1119.3, 803.9, (3.35, 1.96)),
    on_imagenet(
        "ect-imagenet64-s-100m",
        "S",
        imagenet("ect-imagenet64-s-100m", 192, 1e-3, 0.4, batch=1024),
        280.2,
        201.6,
        (4.05, 2.79),
    ),
    on_imagenet(
        "ect-imagenet64-xl-100m",
        "XL",
        imagenet("ect-imagenet64-xl-100m", 384, 7e-4, 0.5, batch=1024),
        1119.3,
        803.9,
        (2.49, 1.67),
    ),
)
