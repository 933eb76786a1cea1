"""Random changes of images that gradients flow through (DiffAugment, Zhao et al. 2020), for critics."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Maps = Float[Tensor, "b _ _ _"]  # [batch, channels, height, width]
Draw = Float[Tensor, "b 1 1 1"]
Pixels = Int64[Tensor, " b"]


def diff_augment(x: Maps, translation: float = 0.125, cutout: float = 0.2) -> Maps:
    """DiffAugment (Zhao et al. 2020): every image of x in its own random colours, shifted, and with a square cut out.

    Brightness is shifted by U[-0.5, 0.5], saturation scaled by U[0, 2], contrast by U[0.5, 1.5]; the image moves by at
    most the share `translation` of its side, and the square has the share `cutout` of it. Differentiable in x. The
    draws come from torch's generator: those for real and for generated images differ.
    """
    n, _, height, width = x.shape
    brightness, saturation, contrast = torch.rand(3, n, 1, 1, 1, dtype=x.dtype, device=x.device)
    x = recolour(x, brightness - 0.5, 2 * saturation, contrast + 0.5)
    moves, cuts = _pixels(x, translation), _pixels(x, cutout)
    dy, dx = (torch.randint(-most, most + 1, (n,), device=x.device) for most in moves)
    y0, x0 = (  # the box's first row and column; its centre is anywhere in the image
        torch.randint(side + 1 - cut % 2, (n,), device=x.device) - cut // 2
        for side, cut in zip((height, width), cuts, strict=True)
    )
    return cut_out(translate(x, dy, dx), y0, x0, cuts)


def recolour(x: Maps, brightness: Draw, saturation: Draw, contrast: Draw) -> Maps:
    """Add brightness, then scale the distance from each pixel's grey, then that from the image's mean."""
    x = x + brightness
    grey = x.mean(1, keepdim=True)
    x = grey + saturation * (x - grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + contrast * (x - mean)


def translate(x: Maps, dy: Pixels, dx: Pixels) -> Maps:
    """Move the content of image i up by dy[i] and left by dx[i] pixels; what comes in is 0, mid-grey."""
    for dim, step in ((2, dy), (3, dx)):
        side = x.shape[dim]
        source = torch.arange(side, device=x.device) + step[:, None]
        shape = [len(x), 1, 1, 1]
        shape[dim] = side
        inside = ((source >= 0) & (source < side)).view(shape)
        x = x.gather(dim, (source % side).view(shape).expand_as(x)) * inside
    return x


def cut_out(x: Maps, y0: Pixels, x0: Pixels, sides: Sequence[int]) -> Maps:
    """Set a box of sides (height, width) to 0, mid-grey; y0 and x0 are its first row and column in each image."""
    y, x_ = (torch.arange(side, device=x.device) for side in x.shape[2:])
    rows = (y >= y0[:, None]) & (y < y0[:, None] + sides[0])
    columns = (x_ >= x0[:, None]) & (x_ < x0[:, None] + sides[1])
    return x * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _pixels(x: Maps, share: float) -> list[int]:
    """A share of the height and of the width, to the nearest pixel."""
    return [int(side * share + 0.5) for side in x.shape[2:]]
