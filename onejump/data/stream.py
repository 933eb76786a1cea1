"""Images too many for memory: decoded as training asks for them, a few steps ahead, in the order of a set in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from onejump.data.arrays import name_of
from onejump.data.decode import Decoding, decode_all
from onejump.data.feeder import WORKERS, Feeder, Sample, tell
from onejump.data.image_set import Step, from_uint8, mirrored
from onejump.data.load import check_any, check_enough, decoded, other_size
from onejump.data.source import Bad, Source, leave_out, shown
from onejump.data.survey import Survey, kept
from onejump.types import Images, UserError, beside


@dataclass(frozen=True, eq=False)
class StreamedSet:
    """Images on a disk: the same face, order, tensors and fingerprint as an `ImageSet` of the same files.

    Before training every image is decoded once (`survey`); a file that is damaged since then has its place taken by
    the next good image of the epoch, if `feeder.skip_bad`, and else raises UserError.
    """

    name: str
    feeder: Feeder
    fingerprint: str
    labels: Int64[Tensor, " n"] | None = None
    class_names: tuple[str, ...] = ()
    flip: bool = False

    @property
    def n(self) -> int:
        return self.feeder.n

    @property
    def shape(self) -> tuple[int, int, int]:
        c, h, w = self.feeder.shape
        return c, h, w

    @property
    def classes(self) -> int:
        """Number of classes, 0 if unlabelled."""
        return len(self.class_names)

    def unlabelled(self) -> "StreamedSet":
        """The same images, from the same threads, without their labels."""
        return replace(self, labels=None, class_names=())

    def batch(
        self, step: int, batch: int, seed: int, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
    ) -> tuple[Float[Tensor, "b c h w"], Int64[Tensor, " b"] | None]:
        """What `ImageSet.batch` gives for these arguments; the steps that follow are decoded meanwhile."""
        wanted = Step(self.n, step, batch, seed, rank, world)
        images, index = self.feeder.take(wanted, device)
        x0 = from_uint8(images)
        if self.flip:
            x0 = mirrored(x0, wanted.order[1])
        return x0, None if self.labels is None else beside(self.labels[index], x0)

    def pick(self, index: Int64[Tensor, " k"]) -> Images:
        """The images at these positions."""
        return self.feeder.rows(index)

    def chunks(self, size: int) -> Iterator[tuple[Images, Int64[Tensor, " k"] | None]]:
        """All images and labels in the set's order, at most `size` at once."""
        for images, index in self.feeder.chunks(size):
            yield images, None if self.labels is None else self.labels[index]


def streamed(
    source: Source, how: Decoding, bad: Bad | None = None, workers: int = WORKERS, cache: Path | None = None
) -> StreamedSet:
    """The images of a source, streamed. What the survey finds is kept in `cache` (`survey.cache_folder`).

    With `bad`, what cannot be read is noted in it and left out. Else raises UserError, before any training, as the
    same images in memory would.
    """
    survey = kept(source.path, f"{how} {bad is not None}", partial(survey_of, source, how, bad is not None), cache)
    if bad is not None:
        bad.update(survey.bad)
    good = without(source, survey.bad)
    feeder = Feeder(
        name=str(source.path),
        n=len(good.names),
        shape=survey.shape,
        dtype=np.uint8,
        make=partial(_images, good, replace(how, grey=survey.shape[0] == 1), survey.shape),
        skip_bad=bad is not None,
        workers=workers,
    )
    labels = None if good.labels is None else torch.tensor(good.labels)
    return StreamedSet(name_of(source.path), feeder, survey.fingerprint, labels, source.class_names)


def without(source: Source, bad: Bad) -> Source:
    """The source less what is bad."""
    rows = [i for i, name in enumerate(source.names) if name not in bad]
    labels = None if source.labels is None else tuple(source.labels[i] for i in rows)
    return replace(source, names=[source.names[i] for i in rows], labels=labels)


def _images(source: Source, how: Decoding, shape: tuple[int, ...], numbers: list[int]) -> list[Sample]:
    """The images with these numbers, uint8 [c, h, w]."""
    names = [source.names[k] for k in numbers]
    return [
        image if isinstance(image, UserError) or image.shape == shape else changed(source, name)
        for name, image in zip(names, decode_all(source, names, how), strict=True)
    ]


def changed(source: Source, name: str) -> UserError:
    return UserError(f"{shown(name)} in {source.path} is no longer the image it was: bring it back, or remove it")


# ------------------------------------------------------------------------------------------------------------ survey


def survey_of(source: Source, how: Decoding, skip_bad: bool) -> Survey:
    """Decodes every image once: which cannot be, their shape, and the fingerprint of the same images in memory.

    That starts with the numbers of images and of channels, so an image that is bad, or in colour after grey ones,
    makes the pass start again without it, or in colour.
    """
    check_any(source)
    tell(f"{source.path}: {len(source.names):,} images are read once, to know that all can be")
    bad: Bad | None = {} if skip_bad else None
    while True:
        found = _survey(source, how, bad)
        if isinstance(found, Survey):
            return found
        how = found


def _survey(source: Source, how: Decoding, bad: Bad | None) -> Survey | Decoding:
    """How to decode them the next time, with what was learnt in `bad`, if the pass must start again."""
    good = without(source, bad or {})
    first, digest, left = None, sha256(), len(good.names)
    for place, pixels in decoded(good, how, bad):
        if first is None:
            first = good.names[place], pixels
            digest.update(str((len(good.names), *pixels.shape)).encode())
        if pixels.shape[1:] != first[1].shape[1:]:
            leave_out(bad, good.names[place], other_size(good, *first, place, pixels))
            continue
        if len(pixels) > len(first[1]):
            return replace(how, grey=False)
        digest.update(np.ascontiguousarray(pixels if len(pixels) == len(first[1]) else pixels.repeat(3, 0)).data)
        left -= 1
    check_enough(source, len(good.names) - left, bad)
    if left:
        return how
    assert first is not None
    if good.labels is not None:
        digest.update(np.array(good.labels, "<i8").tobytes())
    return Survey(first[1].shape, digest.hexdigest(), bad or {})
