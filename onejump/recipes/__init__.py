"""Recipes by name. Each is a function of the images that returns a `config.Recipe`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onejump.config import Recipe
    from onejump.data.training_set import TrainingSet

ANALYTIC = "-analytic"  # the same with Analytic-Precond
FOR_ANY_IMAGES = {
    "digits": "diffusion teacher -> consistency training (ECT) -> truncated training (TCM); digits or your own images",
    "digits-ict": "improved consistency training (iCT) from data alone, in one stage",
    f"digits-cd[{ANALYTIC}]": "diffusion teacher -> consistency distillation (CD) [with Analytic-Precond]",
    f"digits-ctm[{ANALYTIC}]": "diffusion teacher -> consistency trajectory model (CTM) [with Analytic-Precond]",
    "digits-ctm-gan": "the same, then on with CTM's adversarial loss",
}
PUBLISHED = {
    f"{kind}-{images}[{ANALYTIC}]": f"{kind.upper()} on {what} as published, from EDM's model (--teacher)"
    for images, what in (
        ("cifar10-uncond", "CIFAR-10 without classes"),
        ("cifar10-cond", "CIFAR-10"),
        ("ffhq64", "FFHQ 64x64"),
        ("imagenet64", "ImageNet 64x64"),
    )
    for kind in ("cd", "ctm")
}
LISTED = FOR_ANY_IMAGES | PUBLISHED


def names(listed: dict[str, str]) -> list[str]:
    """Each name, and where it has one its variant with Analytic-Precond."""
    return [base + end for name in listed for base, *ends in [name.rstrip("]").split("[")] for end in ("", *ends)]


NAMES = names(LISTED)


def build_recipe(name: str, data: "TrainingSet | None") -> "Recipe":
    """The recipe of this name for these images; the published ones can do without. Raises UserError for other names."""
    from onejump.config_json import did_you_mean
    from onejump.recipes import distillation, published
    from onejump.recipes.digits import digits, digits_ict
    from onejump.types import UserError

    if name in names(PUBLISHED):
        return published.recipes()[name](data)
    functions = {
        "digits": digits,
        "digits-ict": digits_ict,
        "digits-cd": distillation.digits_cd,
        "digits-cd-analytic": distillation.digits_cd_analytic,
        "digits-ctm": distillation.digits_ctm,
        "digits-ctm-analytic": distillation.digits_ctm_analytic,
        "digits-ctm-gan": distillation.digits_ctm_gan,
    }
    if name not in functions:
        raise UserError(f"recipe: no {name!r}; there are {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
    assert data is not None
    return functions[name](data)
