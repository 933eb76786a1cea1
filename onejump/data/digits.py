"""The 1,797 handwritten digits, 8x8 pixels, that scikit-learn ships: real images that need no download."""

from functools import cache

import torch

from onejump.data.image_set import ImageSet


@cache
def digits() -> ImageSet:
    """All digits (Alpaydin & Kaynak 1998, the test part of the UCI set): uint8 [1797, 1, 8, 8], labelled 0..9.

    The original pixels count ink in 4x4 blocks, 0..16; v becomes the byte round(v * 255 / 16).
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)
    labels = torch.from_numpy(data.target).to(torch.int64)
    return ImageSet("digits", images[:, None], labels, tuple("0123456789"))


def digits_split() -> tuple[ImageSet, ImageSet]:
    """(training, held out): images 0, 5, 10, ... are held out, 360 of 1,797; the other 1,437 train a classifier.

    Neighbours in the set often come from one writer, so held-out digits are new images, not new handwriting.
    """
    held_out = torch.arange(digits().n) % 5 == 0
    return digits().select(~held_out, "digits-train"), digits().select(held_out, "digits-held-out")
