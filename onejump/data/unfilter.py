"""PNG's row filters undone for many images at once (W3C, Portable Network Graphics, section 9).

A filter takes from each byte what its left, upper and upper left neighbours foretell of it, so one image can only be
undone byte by byte. But the pixels of an anti-diagonal do not depend on each other, nor do images: a few operations
on whole arrays for each of the h + w - 1 diagonals are twice as fast as a loop over bytes in C.
"""

import numpy as np
from jaxtyping import UInt8
from numpy.lib.stride_tricks import as_strided

NONE, SUB, UP, AVERAGE, PAETH = range(5)  # the filter of a row
DIAGONAL, ALONE = 4300, 5000  # what costs as much as so many bytes: to begin a diagonal; to read an image by itself

Bytes = UInt8[np.ndarray, " k"]


def worthwhile(n: int, h: int, w: int, c: int) -> bool:
    """Whether so many images are undone faster together than one by one; in tall ones most of a diagonal is empty."""
    return n * (h * w * c + ALONE) >= DIAGONAL * (h + w) and h <= 4 * w


def unfiltered(lines: UInt8[np.ndarray, "n h line"], c: int) -> UInt8[np.ndarray, "n h w c"]:
    """The pixels of rows that follow the byte of their filter each, 0 to 4. In memory they lie as [n, c, h, w]."""
    n, h, w = len(lines), lines.shape[1], (lines.shape[2] - 1) // c
    k = c * n  # bytes of one place in all images
    skewed = np.empty((h + w + 1, h + 1, k), np.uint8)  # pixel (i, j) lies at [2 + i + j, 1 + i]
    skewed[:2], skewed[:, 0] = 0, 0  # above the first row
    skewed[range(1, h + 1), range(1, h + 1)] = 0  # left of each row
    line, row, _ = skewed.strides
    places = as_strided(skewed[2:, 1:], (h, w, c, n), (line + row, line, n, 1))
    places[...] = lines[:, :, 1:].reshape(n, h, w, c).transpose(1, 2, 3, 0)
    _undo(skewed.reshape(h + w + 1, -1), np.repeat(lines[:, :, 0].T[:, None], c, 1).reshape(-1), h, w, k)
    pixels = np.empty((n, c, h, w), np.uint8)
    pixels[...] = places.transpose(3, 2, 0, 1)
    return pixels.transpose(0, 2, 3, 1)


def _undo(skewed: UInt8[np.ndarray, "d r"], kinds: Bytes, h: int, w: int, k: int) -> None:
    """Adds to each byte what was taken from it, diagonal by diagonal. kinds: the filter of each row's bytes.

    Paeth's filter is also Sub if only the left neighbour is seen (the others taken for 0), Up if only the upper is,
    and None if none is.
    """
    sees_left, sees_up, sees_all = (_mask(kinds, rows) for rows in ((SUB, PAETH), (UP, PAETH), (PAETH,)))
    average = _mask(kinds, (AVERAGE,))
    averages = bool(average.any())
    for d in range(h + w - 1):
        a, b = max(0, d - w + 1) * k, (min(d, h - 1) + 1) * k
        left, up, corner = skewed[d + 1, a + k : b + k], skewed[d + 1, a:b], skewed[d, a:b]
        told = paeth(left & sees_left[a:b], up & sees_up[a:b], corner & sees_all[a:b])
        if averages:
            told += ((left & up) + ((left ^ up) >> 1)) & average[a:b]
        skewed[d + 2, a + k : b + k] += told


def _mask(kinds: Bytes, wanted: tuple[int, ...]) -> Bytes:
    """255 where the filter is a wanted one, else 0."""
    return -np.isin(kinds, wanted).view(np.uint8)


def paeth(left: Bytes, up: Bytes, corner: Bytes) -> Bytes:
    """The one of the three that is nearest to left + up - corner; in doubt the first.

    Move the corner between the two others: if it is at least twice as far from the lower of them as from the higher,
    that is the lower; the other way round it is the higher; and else the corner.
    """
    low, high = np.minimum(left, up), np.maximum(left, up)
    corner = np.minimum(np.maximum(corner, low), high)
    below, above = corner - low, high - corner
    to_low, to_high = above <= below >> 1, below <= above >> 1
    return corner - below * to_low.view(np.uint8) + above * to_high.view(np.uint8)
