"""The commands that make a published result, one after the other: from the files as they are published to the FID."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from onejump.config import Recipe
from onejump.methods.dsm import DSM
from onejump.networks.text_unet import TextUNetConfig
from onejump.recipes.record import Published

MODELS = "models/"  # where the lines put what they import
IMAGES = {  # --data, and how it is made
    "cifar10.zip": "onejump data prepare cifar-10-python.tar.gz cifar10.zip",
    "ffhq64.zip": "onejump data prepare ffhq/images1024x1024 ffhq64.zip --size 64",
    "imagenet64.zip": "onejump data prepare ILSVRC/Data/CLS-LOC/train imagenet64.zip --size 64 --crop dhariwal",
    "coyo-latents": "onejump data prepare 'coyo/{00000..00999}.tar' coyo-latents --vae stable-diffusion-v1-5",
}
TEXT = "--prompts coco-30k.txt --data coco-images --size 512 --clip clip-vit-base-patch32"


@dataclass(frozen=True)
class Start:
    """A model to start from. file: as it is published. recipe: ours that trains such a one, "" if there is none."""

    file: str
    recipe: str = ""


STARTS = {  # by its name in models/. EDM's, EDM2's (the averages that their FIDs are of), OpenAI's
    "edm-cifar10-uncond": Start("edm-cifar10-32x32-uncond-vp.pkl", "edm-cifar10-uncond"),
    "edm-cifar10-cond": Start("edm-cifar10-32x32-cond-vp.pkl", "edm-cifar10-cond"),
    "edm-ffhq64": Start("edm-ffhq-64x64-uncond-vp.pkl", "edm-ffhq64"),
    "edm-imagenet64": Start("edm-imagenet-64x64-cond-adm.pkl", "edm-imagenet64"),
    "edm2-img64-s": Start("edm2-img64-s-1073741-0.075.pkl", "edm2-imagenet64-s"),
    "edm2-img64-m": Start("edm2-img64-m-2147483-0.060.pkl"),
    "edm2-img64-l": Start("edm2-img64-l-1073741-0.040.pkl"),
    "edm2-img64-xl": Start("edm2-img64-xl-0671088-0.040.pkl", "edm2-imagenet64-xl"),
    "edm_cifar10_ema": Start("edm_cifar10_ema"),
    "edm_imagenet64_ema": Start("edm_imagenet64_ema.pt"),
}


def sequence(record: Published, recipe: Recipe) -> list[str]:
    """Every line runs as it stands once those before it have; files are named as their publishers name them."""
    before = [f"onejump import {STARTS[name].file} {MODELS}{name}" for name in starts(record)]
    before += [IMAGES[data] for data in images(record)]
    return [*before, *record.command.splitlines(), *judged(record, recipe)]


def in_its_place(record: Published) -> list[str]:
    """How to do without a published model."""
    data = images(record)
    return [
        f"onejump run {recipe} --data {data[0]}, then {folder(recipe, data[0])} in place of {MODELS}{name}"
        for name in starts(record)
        if (recipe := STARTS[name].recipe)
    ]


def starts(record: Published) -> list[str]:
    """The models it starts from, by their names in STARTS."""
    words = shlex.split(record.command)
    return [name for name in STARTS if f"{MODELS}{name}" in words]


def images(record: Published) -> list[str]:
    """What its --data is, if anything."""
    words = shlex.split(record.command)
    return [data for data in IMAGES if data in words]


def folder(name: str, data: str) -> str:
    """Where its command puts the run."""
    return f"runs/{name}-{Path(data).stem}"


def judged(record: Published, recipe: Recipe) -> list[str]:
    """The paper's kind of figure, for recipes of the papers' images."""
    wanted, last = recipe.evaluation, list(recipe.stages.values())[-1]
    steps = (wanted.teacher_steps,) if isinstance(last.method, DSM) else wanted.steps
    how = f"--detector inception-2048 --steps {','.join(map(str, steps))} --n {wanted.n}"
    against = "--data {}" if not isinstance(recipe.network, TextUNetConfig) else TEXT
    return [f"onejump evaluate {folder(record.name, data)} {against.format(data)} {how}" for data in images(record)]
