"""Consistency models of 2023 (Song et al.): distillation and training, as their released commands run them.

CIFAR-10's are those of the JAX code (NCSN++, its LPIPS), ImageNet-64's of the PyTorch code (OpenAI's ADM).
"""

from onejump.config import Recipe, Stage
from onejump.ema import ConstantEMA
from onejump.lpips import LPIPS
from onejump.methods.cd import CD
from onejump.methods.ct import CT
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.optim import ConstantRate, RAdam
from onejump.precond import CM
from onejump.recipes.record import Published, for_images, published
from onejump.samplers import Multistep

CIFAR10 = SongUNetConfig(variant="ncsnpp", dropout=0.0)
IMAGENET = ADMUNetConfig(label_dim=1000, dropout=0.0, min_group=1, noise_scale=1000.0)
JAX_LPIPS = LPIPS(pooling="max", keep_from=None)


def cm(name: str, method: CD | CT, lr: float, steps: int, mid: float) -> Recipe:
    """RAdam without warm-up. On ImageNet: batch 2048, fp16, the half-life of the EMA 50 M images of a batch of 4096."""
    cifar10 = name.endswith("cifar10")
    stage = Stage(
        method,
        steps=steps,
        batch=512 if cifar10 else 2048,
        optimizer=RAdam(),
        rate=ConstantRate(lr),
        ema=ConstantEMA(0.9999 if cifar10 else 0.5 ** (4096 / 50e6)),
        precision="fp32" if cifar10 else "fp16",
        jump=CM(),
        sampler=Multistep(mid=(mid,)),
    )
    return published(name, CIFAR10 if cifar10 else IMAGENET, {"cd" if isinstance(method, CD) else "ct": stage})


CD_CIFAR10 = cm("cm-cd-cifar10", CD(n=18, distance=JAX_LPIPS), lr=4e-4, steps=800_000, mid=0.585)
CT_CIFAR10 = cm("cm-ct-cifar10", CT(s0=2, s1=150, mu0=0.9, distance=JAX_LPIPS), lr=4e-4, steps=800_000, mid=0.585)
CD_IMAGENET = cm("cm-cd-imagenet64", CD(n=40, mu=0.95, distance=LPIPS()), lr=8e-6, steps=600_000, mid=1.382)
CT_IMAGENET = cm("cm-ct-imagenet64", CT(s0=2, s1=200, mu0=0.95, distance=LPIPS()), 1e-4, steps=800_000, mid=1.913)

PAPER, TABLES = "Song et al. 2023 (CM)", "the FIDs: later papers' tables"
RECORDS = (
    Published(
        name="cm-cd-cifar10",
        what="CD, NCSN++, LPIPS, CIFAR-10 without classes",
        source=PAPER,
        build=for_images(CD_CIFAR10),
        command="onejump run cm-cd-cifar10 --data cifar10.zip --teacher models/edm_cifar10_ema",
        paper={1: 3.55, 2: 2.93},
        parameters=56.4,
        gflop=42.5,
        note="The target is the student itself (mu = 0). With distance mean_l1 the published rate is 2e-4.",
        second_hand=TABLES,
    ),
    Published(
        name="cm-ct-cifar10",
        what="CT, NCSN++, LPIPS, CIFAR-10 without classes",
        source=PAPER,
        build=for_images(CT_CIFAR10),
        command="onejump run cm-ct-cifar10 --data cifar10.zip",
        paper={1: 8.70, 2: 5.83},
        parameters=56.4,
        gflop=42.5,
        note="The second time of sampling is not stated; CD's is taken (onejump evaluate --search-times 2 finds one).",
        second_hand=TABLES,
    ),
    Published(
        name="cm-cd-imagenet64",
        what="CD, ADM, LPIPS, ImageNet 64x64",
        source=PAPER,
        build=for_images(CD_IMAGENET),
        command="onejump run cm-cd-imagenet64 --data imagenet64.zip --teacher models/edm_imagenet64_ema",
        paper={1: 6.20, 2: 4.70, 3: 4.32},
        parameters=295.9,
        gflop=219.3,
        note="The third time of the three-step figure is not stated.",
        second_hand=TABLES,
    ),
    Published(
        name="cm-ct-imagenet64",
        what="CT, ADM, LPIPS, ImageNet 64x64",
        source=PAPER,
        build=for_images(CT_IMAGENET),
        command="onejump run cm-ct-imagenet64 --data imagenet64.zip",
        paper={1: 13.0, 2: 11.1},
        parameters=295.9,
        gflop=219.3,
        note="The released command starts from EDM's weights: onejump import edm_imagenet64_ema.pt "
        "models/edm_imagenet64_ema, then train --stage ct --init models/edm_imagenet64_ema.",
        second_hand=TABLES,
    ),
)
