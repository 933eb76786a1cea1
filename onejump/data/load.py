"""Sets of images into memory, every bad file told or left out."""

import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from onejump.data.arrays import fitted, name_of
from onejump.data.decode import Crop, Decoding, decode_all
from onejump.data.image_set import ImageSet
from onejump.data.png import write_png
from onejump.data.source import SUFFIXES, Bad, Source, leave_out, shown
from onejump.data.sources import open_source
from onejump.types import UserError

CHUNK, CHUNK_BYTES = 256, 2**22  # images, and bytes of pixels, that a thread decodes at once
AHEAD = 3  # chunks a thread that are decoded before they are asked for
MAX_THREADS = 16

Pixels = UInt8[np.ndarray, "c h w"]


def load_images(path: str | Path, size: int | None = None, crop: Crop = "center", skip_bad: bool = False) -> ImageSet:
    """Reads any form of a set (docs/data.md) into memory; large plain arrays stay in their file, mapped.

    Folder or zip: images directly inside are unlabelled; one sub-folder a class labels them (classes in sorted
    order); a `dataset.json` holding {"labels": [[file, class], ...] or null} decides where it exists. A single folder
    around everything is looked through. Other files and hidden ones are ignored. Order: sorted by name.

    All grey: one channel, else RGB. Transparency is laid on white, 16 bits become 8, EXIF orientation is applied.
    With `size` each image is made a square (see `Decoding`); without, all must share one size. Raises UserError for
    anything missing, damaged, unsafe or ambiguous; with `skip_bad` bad images are left out, and a warning lists them.
    """
    bad: Bad | None = {} if skip_bad else None
    images = load_set(path, Decoding(None, size, crop), bad)
    if bad:
        warnings.warn(f"{path}: {told(bad)}", stacklevel=2)
    return images


def as_source(path: str | Path, bad: Bad | None = None) -> Source:
    """`open_source` with arrays seen as encoded images too, each PNG made when it is asked for."""
    opened = open_source(path, bad)
    if isinstance(opened, Source):
        return opened
    pixels = opened.images.permute(0, 2, 3, 1).numpy()
    labels = None if opened.labels is None else tuple(opened.labels.tolist())
    names = [f"image {k:08d}" for k in range(opened.n)]
    return Source(Path(path), names, lambda name: write_png(pixels[int(name[6:])]), labels, opened.class_names)


def told(bad: Bad, most: int = 5) -> str:
    """How many images are left out and why, in one line."""
    rest = f"; and {len(bad) - most:,} more" if len(bad) > most else ""
    return f"{len(bad):,} left out: {'; '.join(list(bad.values())[:most])}{rest}"


def load_set(path: str | Path, how: Decoding, bad: Bad | None = None) -> ImageSet:
    """`load_images` that notes what it leaves out in `bad` (None: nothing may be)."""
    source = open_source(path, bad)
    return fitted(source, how) if isinstance(source, ImageSet) else gathered(source, how, bad)


def decoded(source: Source, how: Decoding, bad: Bad | None, threads: int | None = None) -> Iterator[tuple[int, Pixels]]:
    """(place in the set's order, pixels) of every image that can be read, in that order, decoded ahead by threads."""
    threads = threads or min(os.cpu_count() or 1, MAX_THREADS)
    n, chunk = len(source.names), chunk_of(source, how, threads)
    waiting: deque[Future[list[Pixels | UserError]]] = deque()
    starts = iter(range(0, n, chunk))
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.filterwarnings("ignore", module="PIL")  # what matters of it is an error here
        for first in range(0, n, chunk):
            while len(waiting) < AHEAD * threads and (start := next(starts, None)) is not None:
                waiting.append(pool.submit(decode_all, source, source.names[start : start + chunk], how))
            for place, pixels in enumerate(waiting.popleft().result(), first):
                if isinstance(pixels, UserError):
                    leave_out(bad, source.names[place], pixels)
                else:
                    yield place, pixels


def chunk_of(source: Source, how: Decoding, threads: int) -> int:
    """How many images a thread decodes at once: many small ones are faster together, large ones would fill memory."""
    first = decode_all(source, source.names[:1], how)
    pixels = next((image.size for image in first if not isinstance(image, UserError)), CHUNK_BYTES // 16)
    return max(1, min(CHUNK, CHUNK_BYTES // pixels, -(-len(source.names) // threads)))


def gathered(source: Source, how: Decoding, bad: Bad | None = None) -> ImageSet:
    """The images in one array. The first that can be read says how large they are; with `bad`, others are left out."""
    check_any(source)
    images = np.empty((0, 1, 1, 1), np.uint8)
    kept: list[int] = []
    for place, pixels in decoded(source, how, bad):
        if not kept:
            first = source.names[place]
            images = room(source, pixels)
        if pixels.shape[1:] != images.shape[2:]:
            leave_out(bad, source.names[place], other_size(source, first, images, place, pixels))
            continue
        if len(pixels) > images.shape[1]:  # the first colour after grey images
            images = images.repeat(3, axis=1)
        images[len(kept)] = pixels
        kept.append(place)
    check_enough(source, len(kept), bad)
    labels = None if source.labels is None else torch.tensor([source.labels[place] for place in kept])
    return ImageSet(name_of(source.path), torch.from_numpy(images[: len(kept)]), labels, source.class_names)


def room(source: Source, first: Pixels) -> np.ndarray:
    """An array for all images, each like the first."""
    try:
        return np.empty((len(source.names), *first.shape), np.uint8)
    except MemoryError as error:
        n = len(source.names)
        need = f"{n} images of {extent(first)} pixels need {n * first.size / 1e9:.1f} GB"
        raise UserError(f"{source.path}: {need} of memory; pass --size to make them smaller") from error


def extent(pixels: np.ndarray) -> str:
    return f"{pixels.shape[-1]}x{pixels.shape[-2]}"


def other_size(source: Source, first: str, images: np.ndarray, place: int, pixels: Pixels) -> UserError:
    return UserError(
        f"{source.path}: {shown(first)} has {extent(images)} pixels and {shown(source.names[place])} "
        f"{extent(pixels)}; pass --size (e.g. --size 64) to crop and resize all to one size"
    )


def check_any(source: Source) -> None:
    if not source.names:
        kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
        raise UserError(f"{source.path}: no images found (looked for {kinds}); at least 2 are needed")


def check_enough(source: Source, good: int, bad: Bad | None) -> None:
    """At least two; and where bad ones are left out, not most of them: then something else is wrong."""
    if bad and good < len(bad):
        raise UserError(f"{source.path}: more images are bad than good, {told(bad, 1)}")
    if good < 2:
        raise UserError(f"{source.path}: only one image ({shown(source.names[0])}); at least 2 are needed")
