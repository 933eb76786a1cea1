"""Recipes by name. Each is a function of the images that returns a `config.Recipe`; `table.records` tells of each."""

import itertools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onejump.config import Recipe
    from onejump.data.training_set import TrainingSet

ANALYTIC = "-analytic"  # the same with Analytic-Precond
IMAGES = "{cifar10-uncond,cifar10-cond,ffhq64,imagenet64}"
FOR_ANY_IMAGES = {
    "digits": "diffusion teacher -> consistency training (ECT) -> truncated training (TCM); digits or your own images",
    "digits-ict": "improved consistency training (iCT) from data alone, in one stage",
    f"digits-cd[{ANALYTIC}]": "diffusion teacher -> consistency distillation (CD) [with Analytic-Precond]",
    f"digits-ctm[{ANALYTIC}]": "diffusion teacher -> consistency trajectory model (CTM) [with Analytic-Precond]",
    "digits-ctm-gan": "the same, then on with CTM's adversarial loss",
}
PUBLISHED = {
    f"edm-{IMAGES}": "EDM's diffusion models",
    "edm2-imagenet64-{s,xl}": "EDM2's diffusion models",
    "cm-{cd,ct}-{cifar10,imagenet64}": "consistency models of 2023: distillation, training",
    "ict[-deep]-{cifar10,imagenet64}": "improved consistency training",
    "ect-cifar10-{100k,200k,400k,hour}": "easy consistency training, from EDM's model (--init)",
    "ect-imagenet64-{s,m,l,xl,s-100m,xl-100m}": "the same from EDM2's models",
    "tcm-{cifar10,imagenet64-s,imagenet64-xl}": "truncated consistency models, both stages (--init)",
    f"cd-{IMAGES}[{ANALYTIC}]": "CD as Zheng et al. 2025 run it, from EDM's model (--teacher)",
    f"ctm-{IMAGES}[{ANALYTIC}]": "CTM as Zheng et al. 2025 run it, from EDM's model (--teacher)",
    "ctm-gan-{cifar10-uncond,cifar10-cond,imagenet64}": "CTM with its critic, as its authors run it (--teacher)",
}
TEXT = {
    "tcm-sd15": "TCM on Stable Diffusion 1.5's latents, from its folder (--teacher); captioned latents",
    "cd-sd15": "consistency distillation on them",
}
LISTED = FOR_ANY_IMAGES | PUBLISHED | TEXT
SCALES = ("tiny", "small")  # two steps a stage on a CPU; about an hour on one GPU


def names(listed: dict[str, str]) -> list[str]:
    """Every name that is meant: {a,b} is one of these, [x] with or without it."""
    found = []
    for pattern in listed:
        parts = re.split(r"([{\[].*?[}\]])", pattern)
        choices = [_choices(part) for part in parts]
        found += ["".join(chosen) for chosen in itertools.product(*choices)]
    return found


def _choices(part: str) -> list[str]:
    if part.startswith("["):
        return ["", part[1:-1]]
    return part[1:-1].split(",") if part.startswith("{") else [part]


NAMES = names(LISTED)


def build_recipe(name: str, data: "TrainingSet | None") -> "Recipe":
    """The recipe of this name for these images; the published ones can do without. Raises UserError for other names."""
    from onejump.config_json import did_you_mean
    from onejump.recipes.table import records
    from onejump.types import UserError

    if name not in NAMES:
        raise UserError(f"recipe: no {name!r}; `onejump recipes` lists all{did_you_mean(name, NAMES)}")
    return records()[name].build(data)
