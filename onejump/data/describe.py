"""What a set of images is: counts, sizes, classes, colours, fingerprint, and what is bad in it; never all in memory."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from onejump.data.decode import Decoding
from onejump.data.feeder import WORKERS
from onejump.data.latent_files import latent_files
from onejump.data.latents import LatentSet, open_latents, survey_of
from onejump.data.load import Pixels, as_source, check_any, decoded
from onejump.data.source import Bad, Source
from onejump.data.survey import kept
from onejump.types import Images

CELL = 64  # the side of an image on the sheet if sizes differ
LARGEST = 128  # and at most
TELL_EVERY = 50  # images

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Description:
    """mean and std of each channel, of pixels as numbers from 0 to 1. classes: (name, images)."""

    n: int
    grey: int  # how many of the images are
    sizes: list[tuple[str, int]]  # the commonest first
    classes: list[tuple[str, int]]
    captions: bool
    mean: list[float]
    std: list[float]
    fingerprint: str | None  # as of the set in memory; None if the images have several sizes
    bad: Bad
    sheet: Images | None


@dataclass
class Tally:
    """What one pass over the images counts, and the first part of a fingerprint that holds if none of them is bad."""

    kept: list[int] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    grey: int = 0
    levels: dict[int, np.ndarray] = field(default_factory=lambda: {c: np.zeros((c, 256), np.int64) for c in (1, 3)})
    shown: list[Pixels] = field(default_factory=list)

    def add(self, place: int, pixels: Pixels) -> None:
        self.kept.append(place)
        self.sizes[pixels.shape[1:]] += 1
        self.grey += len(pixels) == 1
        for counts, channel in zip(self.levels[len(pixels)], pixels, strict=True):
            counts += np.bincount(channel.ravel(), minlength=256)

    @property
    def channels(self) -> int:
        return 1 if self.grey == len(self.kept) else 3

    def moments(self) -> tuple[list[float], list[float]]:
        """Exact mean and standard deviation of each channel; grey images count in every one."""
        if not self.kept:
            return [], []
        levels = self.levels[1] if self.channels == 1 else self.levels[3] + self.levels[1]
        value = np.arange(256) / 255
        means = [float(counts @ value / counts.sum()) for counts in levels]
        squares = [float(counts @ (value - m) ** 2 / counts.sum()) for counts, m in zip(levels, means, strict=True)]
        return means, [math.sqrt(square) for square in squares]


def describe(
    path: str | Path, how: Decoding, sheet: int = 0, progress: Progress = lambda done, total: None
) -> Description:
    """Reads every image once (twice if some are bad, or grey among others), and up to `sheet` of them for a picture."""
    bad: Bad = {}
    source = as_source(path, bad)
    check_any(source)
    wanted = set(np.linspace(0, len(source.names) - 1, sheet).astype(int).tolist())
    tally, guess, digest = Tally(), None, sha256()
    for place, pixels in decoded(source, how, bad):
        guess = guess or (len(source.names), *pixels.shape)
        if not tally.kept:
            digest.update(str(guess).encode())
        digest.update(np.ascontiguousarray(pixels).data)
        tally.add(place, pixels)
        if place in wanted:
            tally.shown.append(pixels)
        if place % TELL_EVERY == 0 or place == len(source.names) - 1:
            progress(place + 1, len(source.names))
    fingerprint = None
    if len(tally.sizes) == 1:
        (size,) = tally.sizes
        true = len(tally.kept), tally.channels, *size
        if guess != true or tally.grey not in (0, true[0]):
            digest = sha256(str(true).encode())
            for pixels in again(source, how, tally):
                digest.update(np.ascontiguousarray(pixels).data)
        if source.labels is not None:
            digest.update(np.array([source.labels[place] for place in tally.kept], "<i8").data)
        fingerprint = digest.hexdigest()
    return described(source, tally, fingerprint, bad)


def again(source: Source, how: Decoding, tally: Tally) -> Iterator[Pixels]:
    """The good images once more, all with the channels of the set."""
    names = [source.names[place] for place in tally.kept]
    good = Source(source.path, names, source.read)
    for _, pixels in decoded(good, Decoding(tally.channels == 1, how.size, how.crop), None):
        yield pixels


def describe_latents(path: Path) -> tuple[LatentSet, Bad]:
    """The set that training would see, and what is bad in it. Latents are read once, or not at all if they were."""
    found, files = open_latents(path, skip_bad=True), latent_files(path)
    return found, kept(path, "latents True", lambda: survey_of(files, True, WORKERS)).bad


def described(source: Source, tally: Tally, fingerprint: str | None, bad: Bad) -> Description:
    counts = Counter(source.labels[place] for place in tally.kept) if source.labels is not None else Counter()
    classes = [(name, counts[k]) for k, name in enumerate(source.class_names)]
    sizes = [(f"{w}x{h}", count) for (h, w), count in tally.sizes.most_common()]
    mean, std = tally.moments()
    captions = source.caption is not None
    return Description(
        len(tally.kept), tally.grey, sizes, classes, captions, mean, std, fingerprint, bad, sheet_of(tally)
    )


def sheet_of(tally: Tally) -> Images | None:
    """The images to be shown, as RGB of one size: their own, or the central square."""
    if not tally.shown:
        return None
    side = max(tally.shown[0].shape)
    same = len(tally.sizes) == 1 and side <= LARGEST
    how = Decoding(size=None if same else min(side, CELL if len(tally.sizes) > 1 else LARGEST))
    cells = [how.fit(pixels.transpose(1, 2, 0)).transpose(2, 0, 1) for pixels in tally.shown]
    return torch.from_numpy(np.stack([np.broadcast_to(cell, (3, *cell.shape[1:])) for cell in cells]))
