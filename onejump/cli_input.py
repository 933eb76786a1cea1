"""What commands are given, read and checked: images, a device, names, lists of numbers."""

import argparse
from typing import TYPE_CHECKING

from onejump.recipes import NAMES

if TYPE_CHECKING:
    import torch

    from onejump.data.image_set import ImageSet


def images_of(args: argparse.Namespace) -> "ImageSet":
    from onejump.types import UserError

    if args.data in (None, "digits"):
        if args.size not in (None, 8):
            raise UserError(f"--size {args.size}: the digits are 8x8; give --data FOLDER for other images")
        from onejump.data.digits import digits

        return digits()
    from onejump.data.folder import load_images

    return load_images(args.data, args.size)


def device_of(name: str | None) -> "torch.device":
    import torch

    from onejump.types import UserError

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from error
    return device


def check_name(recipe: str) -> None:
    """Before any image is read: a wrong name should not cost a minute."""
    from onejump.config import did_you_mean
    from onejump.types import UserError

    if recipe not in NAMES:
        raise UserError(f"recipe: no {recipe!r}; there are {', '.join(NAMES)}{did_you_mean(recipe, NAMES)}")


def numbers_of(option: str, text: str, kind: type) -> list:
    """ "80,1" as [80.0, 1.0]."""
    from onejump.types import UserError

    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text}: numbers with commas between them are needed, such as 80,1") from error
