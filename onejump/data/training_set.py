"""What training, evaluation and reports ask of a set of images or latents, wherever it lies."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class TrainingSet(Protocol):
    """n samples of one shape, with a class each or none: `ImageSet` in memory, `StreamedSet` from files, `LatentSet`.

    The order of training is a pure function of (seed, epoch, rank), so any step can be asked for at any time.
    """

    @property
    def name(self) -> str: ...

    @property
    def n(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one sample as training sees it."""

    @property
    def labels(self) -> Tensor | None:
        """int64 [n], or None."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def classes(self) -> int:
        """Number of classes, 0 if unlabelled."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the shape, the content and the labels."""

    def batch(
        self, step: int, batch: int, seed: int, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor | None]:
        """(x0 float32 [b, c, h, w], labels int64 [b] or None) of one step; a pure function of its arguments."""

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """All samples, as they lie, and labels, in the set's order, at most `size` at once."""

    def pick(self, index: Tensor) -> Tensor:
        """The samples at these positions, as they lie."""

    def unlabelled(self) -> "TrainingSet":
        """The same samples without their labels."""
