"""Recipes by name. Each is a function of the images that returns a `config.Recipe`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onejump.config import Recipe
    from onejump.data.image_set import ImageSet

NAMES = {
    "digits": "diffusion teacher -> consistency training (ECT) -> truncated training (TCM); digits or your own images",
    "digits-ict": "improved consistency training (iCT) from data alone, in one stage",
}


def build_recipe(name: str, data: "ImageSet") -> "Recipe":
    """The recipe of this name for these images. Raises UserError with the nearest name."""
    from onejump.config import did_you_mean
    from onejump.recipes.digits import digits, digits_ict
    from onejump.types import UserError

    functions = {"digits": digits, "digits-ict": digits_ict}
    if name not in functions:
        raise UserError(f"recipe: no {name!r}; there are {', '.join(functions)}{did_you_mean(name, functions)}")
    return functions[name](data)
