"""A set of images in memory, and the order in which training sees it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from hashlib import sha256

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from onejump.types import Images, beside

SHARE_OF_DEVICE = 0.25  # of a GPU's free memory: a set that takes more stays beside it, and each step's images move


def from_uint8(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Bytes 0..255 to float32 in [-1, 1]: x = v / 127.5 - 1."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """[-1, 1] to bytes, rounded to the nearest and clamped: the inverse of `from_uint8`."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> tuple[Int64[Tensor, " n"], Bool[Tensor, " n"]]:
    """A permutation of n images and a fair coin for each place in it, drawn from (seed, epoch) alone.

    A step needs at most two epochs at once (unless a batch is larger than the set); a few more stay cached. Cost: 9
    bytes an image while cached, and about a second an epoch for ten million images.
    """
    digest = sha256(f"order of the images, seed {seed}, epoch {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.randperm(n, generator=generator), torch.rand(n, generator=generator) < 0.5


@dataclass(frozen=True)
class Step:
    """What one process sees at one step, of a set of n images.

    Images are counted over the whole run: number (step * batch + i) * world + rank belongs to epoch number // n. So
    the images of a step depend on batch * world only, and a batch may straddle two epochs.
    """

    n: int
    step: int
    batch: int
    seed: int
    rank: int = 0
    world: int = 1

    @property
    def places(self) -> tuple[Int64[Tensor, " b"], Int64[Tensor, " b"]]:
        """(epoch, place in its order) of each image."""
        numbers = (self.step * self.batch + torch.arange(self.batch)) * self.world + self.rank
        return numbers // self.n, numbers % self.n

    @property
    def order(self) -> tuple[Int64[Tensor, " b"], Bool[Tensor, " b"]]:
        """Which images the step sees, and which of them the coin would mirror."""
        epochs, places = self.places
        index, mirror = torch.empty_like(places), torch.empty(len(places), dtype=torch.bool)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            permutation, coins = epoch_order(self.n, self.seed, epoch)
            index[here], mirror[here] = permutation[places[here]], coins[places[here]]
        return index, mirror


def mirrored(x0: Float[Tensor, "b c h w"], mirror: Bool[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
    """x0 with the images that `mirror` names turned left to right."""
    return torch.where(beside(mirror, x0)[:, None, None, None], x0.flip(-1), x0)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images at rest: uint8 [n, c, h, w], with int64 labels [n] or None, and one name a class.

    `flip` mirrors each image left to right with probability one half, a fresh coin every epoch.
    """

    name: str
    images: Images
    labels: Int64[Tensor, " n"] | None = None
    class_names: tuple[str, ...] = ()
    flip: bool = False
    _on_device: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.labels is None:
            assert not self.class_names, "names of classes without labels"
        else:
            assert len(self.labels) == self.n, f"{len(self.labels)} labels for {self.n} images"
            assert 0 <= int(self.labels.min()) and int(self.labels.max()) < self.classes, "a label without a name"

    @property
    def n(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        _, c, h, w = self.images.shape
        return c, h, w

    @property
    def classes(self) -> int:
        """Number of classes, 0 if unlabelled."""
        return len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the shape, the pixels and the labels; the same on every machine."""
        digest = sha256(str(tuple(self.images.shape)).encode())
        digest.update(self.images.cpu().contiguous().numpy().data)
        if self.labels is not None:
            digest.update(self.labels.cpu().contiguous().numpy().astype("<i8").data)
        return digest.hexdigest()

    def select(self, index: Tensor, name: str) -> "ImageSet":
        """The images at `index` (int64 positions or a boolean mask) as a set of their own, classes unchanged."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, name=name, images=self.images[index], labels=labels)

    def unlabelled(self) -> "ImageSet":
        """The same images without their labels."""
        return replace(self, labels=None, class_names=())

    def pick(self, index: Int64[Tensor, " k"]) -> Images:
        """The images at these positions."""
        return self.images[index]

    def chunks(self, size: int) -> Iterator[tuple[Images, Int64[Tensor, " k"] | None]]:
        """All images and labels in the set's order, at most `size` at once."""
        for first in range(0, self.n, size):
            here = slice(first, first + size)
            yield self.images[here], None if self.labels is None else self.labels[here]

    def order(
        self, step: int, batch: int, seed: int, rank: int = 0, world: int = 1
    ) -> tuple[Int64[Tensor, " b"], Bool[Tensor, " b"]]:
        """Which images a step sees, and which of them the coin would mirror: see `Step`."""
        return Step(self.n, step, batch, seed, rank, world).order

    def batch(
        self, step: int, batch: int, seed: int, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
    ) -> tuple[Float[Tensor, "b c h w"], Int64[Tensor, " b"] | None]:
        """Images of one step as (x0 float32 in [-1, 1], labels or None); a pure function of its arguments.

        Every epoch is a fresh permutation by (seed, epoch) and shows each image once. The whole set moves to
        `device` at the first call and stays there, unless it would take more than a quarter of a GPU's free memory.
        """
        index, mirror = self.order(step, batch, seed, rank, world)
        images, labels = self._resident(device)
        x0 = from_uint8(images[beside(index, images)].to(device))
        if self.flip:
            x0 = mirrored(x0, mirror)
        return x0, None if labels is None else labels[beside(index, labels)]

    def _resident(self, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        key = str(device)
        if key not in self._on_device:
            labels = None if self.labels is None else self.labels.to(device)
            images = self.images.to(device) if fits(self.images.numel(), torch.device(device)) else self.images
            self._on_device[key] = images, labels
        return self._on_device[key]


def fits(size: int, device: torch.device) -> bool:
    """Whether so many bytes may stay on the device for good; the CPU is where they are."""
    return device.type != "cuda" or size <= SHARE_OF_DEVICE * torch.cuda.mem_get_info(device)[0]
