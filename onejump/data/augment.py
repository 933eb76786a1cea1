"""EDM's augmentation: transforms of images, and the numbers that tell the network which were applied.

Karras et al. 2022 (section 5, appendix F.2), after the pipeline of Karras et al. 2020 for GANs. The network is told
what was done to each image; sampled with all labels 0 it makes images as they are, so the transforms do not leak.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, conv_transpose2d, grid_sample, pad

from onejump.types import UserError, beside

# The low-pass filter of the wavelet sym6: its shifts by two are orthogonal, so that an image that is upsampled and then
# downsampled is what it was.
SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
MARGIN = len(SYM6) // 4  # pixels on each side of an image that the filter reaches
TAPS = len(SYM6) // 2 - 1  # of padding with which the filters up and down keep the places of the pixels

TRANSLATE_INT_MAX = 0.125  # of the image's side
SCALE_STD = 0.2  # of log2 of the factor
ANISO_STD = 0.2  # of log2 of the factor along one axis, whose inverse is the other's
ANISO_ROTATED = 0.5  # share of those whose axes are turned
TRANSLATE_FRAC_STD = 0.125  # of the image's side
WIDTHS = dict(xflip=1, yflip=1, rotate_int=2, translate_int=2, scale=1, rotate_frac=2, aniso=2, translate_frac=2)

Picture = Float[Tensor, "b c h w"]
Maps = Float[Tensor, "b 3 3"]  # of coordinates (x, y, 1), float64


@runtime_checkable
class Draws(Protocol):
    """Where every random number of the pipe comes from, on the CPU, in the order of EDM's code."""

    def integers(self, below: int, n: int) -> Int64[Tensor, " n"]: ...

    def uniform(self, *shape: int) -> Float[Tensor, "..."]: ...

    def normal(self, *shape: int) -> Float[Tensor, "..."]: ...


@dataclass(frozen=True)
class Seeded:
    """Draws from a generator of torch, the same for every device. The last dimension counts the images.

    Process `rank` of `world` draws for the images of all, and takes its own: every world-th.
    """

    generator: torch.Generator
    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, seed: int, rank: int = 0, world: int = 1) -> "Seeded":
        return cls(torch.Generator().manual_seed(seed), rank, world)

    def integers(self, below: int, n: int) -> Int64[Tensor, " n"]:
        return self._mine(torch.randint(below, (n * self.world,), generator=self.generator))

    def uniform(self, *shape: int) -> Float[Tensor, "..."]:
        return self._mine(torch.rand(*shape[:-1], shape[-1] * self.world, generator=self.generator))

    def normal(self, *shape: int) -> Float[Tensor, "..."]:
        return self._mine(torch.randn(*shape[:-1], shape[-1] * self.world, generator=self.generator))

    def _mine(self, drawn: Tensor) -> Tensor:
        return drawn[..., self.rank :: self.world]


@dataclass(frozen=True)
class AugmentPipe:
    """Each transform is applied with probability p times its field; 0 leaves it and its labels out.

    The defaults are those of EDM's published runs: p = 0.12 on CIFAR-10 and 0.15 on FFHQ and AFHQv2, nine labels, and
    mirroring always by a fair coin (1e8). The four of pixels come first, then scaling, rotation, stretching and shift.
    """

    p: float = 0.12
    xflip: float = 1e8
    yflip: float = 1.0
    rotate_int: float = 0.0  # by quarter turns
    translate_int: float = 0.0  # by whole pixels
    scale: float = 1.0
    rotate_frac: float = 1.0  # by any angle
    aniso: float = 1.0
    translate_frac: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise UserError(f"p: {self.p:g}; a probability from 0 to 1 is needed")
        for name in WIDTHS:
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise UserError(f"{name}: {value:g}; a factor of p, 0 or more, is needed")
        if not self.width:
            raise UserError("xflip: every transform is 0; give one of them a factor, or leave augment=none")

    @property
    def width(self) -> int:
        """Numbers in the label of one image: the network's augment_dim."""
        return sum(width for name, width in WIDTHS.items() if getattr(self, name) > 0)

    def __call__(self, images: Picture, draws: Draws) -> tuple[Picture, Float[Tensor, "b d"]]:
        """(the transformed images, their labels float32 [b, width]), on the images' device.

        What is drawn, and so the labels, is worked out on the CPU; the device is never waited for.
        """
        if self.rotate_int > 0 and images.shape[2] != images.shape[3]:
            raise UserError(f"rotate_int: images of {images.shape[2]}x{images.shape[3]}; quarter turns need squares")
        images, blitted = self._blit(images, draws)
        maps, labels = self._geometry(len(images), images.shape[3], images.shape[2], draws)
        moved = (maps != torch.eye(3, dtype=maps.dtype)).flatten(1).any(1).nonzero()[:, 0]
        if len(moved):
            rows = beside(moved, images)
            images = images.index_copy(0, rows, resample(images[rows], maps[moved]))
        found = torch.cat([label.reshape(len(images), -1).float() for label in (*blitted, *labels)], 1)
        return images, beside(found, images)

    def _blit(self, images: Picture, draws: Draws) -> tuple[Picture, list[Tensor]]:
        """Moves whole pixels."""
        n, _, h, w = images.shape
        labels: list[Tensor] = []
        if self.xflip > 0:
            turn = draws.integers(2, n) * self._coins(self.xflip, draws, n)
            images = chosen(turn == 1, images.flip(3), images)
            labels += [turn]
        if self.yflip > 0:
            turn = draws.integers(2, n) * self._coins(self.yflip, draws, n)
            images = chosen(turn == 1, images.flip(2), images)
            labels += [turn]
        if self.rotate_int > 0:
            turn = draws.integers(4, n) * self._coins(self.rotate_int, draws, n)
            across, down = (turn == 1) | (turn == 2), (turn == 2) | (turn == 3)
            images = chosen(across, images.flip(3), images)
            images = chosen(down, images.flip(2), images)
            images = chosen(turn % 2 == 1, images.transpose(2, 3), images)
            labels += [across, down]
        if self.translate_int > 0:
            reach = torch.tensor([w, h]) * TRANSLATE_INT_MAX
            shift = (draws.uniform(2, n) * 2 - 1) * self._coins(self.translate_int, draws, 1, n)
            right, up = pixels = (shift * reach[:, None]).round().long()
            images = shifted(images, right, up)
            labels += list(pixels / reach[:, None])
        return images, labels

    def _coins(self, factor: float, draws: Draws, *shape: int) -> Bool[Tensor, "..."]:
        return draws.uniform(*shape) < factor * self.p

    def _geometry(self, n: int, w: int, h: int, draws: Draws) -> tuple[Maps, list[Tensor]]:
        """For each image, the map from places in the result to places in the image, both from the centre, in pixels."""
        maps, labels = torch.eye(3, dtype=torch.float64).repeat(n, 1, 1), list[Tensor]()
        zero = torch.zeros(n)
        if self.scale > 0:
            z = draws.normal(n) * self._coins(self.scale, draws, n)
            factor = (z * SCALE_STD).exp2()
            maps = maps @ linear(1 / factor, zero, zero, 1 / factor)
            labels += [z]
        if self.rotate_frac > 0:
            angle = (draws.uniform(n) * 2 - 1) * math.pi * self._coins(self.rotate_frac, draws, n)
            maps = maps @ rotation(angle)
            labels += [angle.cos() - 1, angle.sin()]
        if self.aniso > 0:
            z, angle = draws.normal(n), (draws.uniform(n) * 2 - 1) * math.pi
            z = z * self._coins(self.aniso, draws, n)
            angle = angle * (draws.uniform(n) < ANISO_ROTATED)
            factor = (z * ANISO_STD).exp2()
            stretch = rotation(-angle) @ linear(1 / factor, zero, zero, factor) @ rotation(angle)
            maps = maps @ torch.where((z == 0)[:, None, None], torch.eye(3, dtype=torch.float64), stretch)
            labels += [z * angle.cos(), z * angle.sin()]
        if self.translate_frac > 0:
            right, down = z = draws.normal(2, n) * self._coins(self.translate_frac, draws, 1, n)
            side = TRANSLATE_FRAC_STD
            maps = maps @ translation(-right.double() * side * w, -down.double() * side * h)
            labels += list(z)
        return maps, labels


def chosen(which: Bool[Tensor, " b"], yes: Picture, no: Picture) -> Picture:
    return torch.where(beside(which, yes)[:, None, None, None], yes, no)


def shifted(images: Picture, right: Int64[Tensor, " b"], up: Int64[Tensor, " b"]) -> Picture:
    """Each image moved by whole pixels; what comes in from outside is its mirror image."""
    x = beside(reflected(torch.arange(images.shape[3]) - right[:, None], images.shape[3]), images)
    y = beside(reflected(torch.arange(images.shape[2]) + up[:, None], images.shape[2]), images)
    b, c = (torch.arange(k, device=images.device) for k in images.shape[:2])
    return images[b[:, None, None, None], c[:, None, None], y[:, None, :, None], x[:, None, None, :]]


def reflected(place: Int64[Tensor, "..."], side: int) -> Int64[Tensor, "..."]:
    """A place on the line as one in 0 .. side - 1, by mirrors at both ends."""
    return side - 1 - (side - 1 - place % (2 * side - 2)).abs()


# ---------------------------------------------------------------------------------------------------------- the maps


def rows_of(*entries: Tensor) -> Maps:
    """The matrix whose first two rows hold these numbers."""
    zero, one = torch.zeros_like(entries[0]), torch.ones_like(entries[0])
    return torch.stack([*entries, zero, zero, one], -1).view(-1, 3, 3)


def linear(xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor) -> Maps:
    zero = torch.zeros_like(xx)
    return rows_of(*(entry.double() for entry in (xx, xy, zero, yx, yy, zero)))


def rotation(angle: Tensor) -> Maps:
    angle = angle.double()
    return linear(angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def translation(x: Tensor, y: Tensor) -> Maps:
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return rows_of(one, zero, x, zero, one, y)


def diagonal(x: float, y: float) -> Float[Tensor, "3 3"]:
    return torch.diag(torch.tensor([x, y, 1.0], dtype=torch.float64))


def offset(x: float, y: float) -> Float[Tensor, "3 3"]:
    return torch.tensor([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------- resampling


def resample(images: Picture, maps: Maps) -> Picture:
    """Each image seen through its map: mirrored at the borders, upsampled twice, read between the pixels, downsampled.

    Beyond one mirror image on each side there is nothing, which is 0.
    """
    n, c, h, w = images.shape
    left, top, right, bottom = margins(maps, w, h)
    images = pad(images, (left, right, top, bottom), mode="reflect")
    wide, high, out_w, out_h = 2 * images.shape[3], 2 * images.shape[2], 2 * (w + 2 * MARGIN), 2 * (h + 2 * MARGIN)
    maps = offset((left - right) / 2, (top - bottom) / 2) @ maps
    maps = offset(-0.5, -0.5) @ diagonal(2, 2) @ maps @ diagonal(0.5, 0.5) @ offset(0.5, 0.5)
    maps = diagonal(2 / wide, 2 / high) @ maps @ diagonal(out_w / 2, out_h / 2)
    grid = affine_grid(beside(maps[:, :2].to(images.dtype), images), [n, c, out_h, out_w], align_corners=False)
    images = grid_sample(upsampled(images), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return downsampled(images)


def margins(maps: Maps, w: int, h: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom): how far the maps, and the filters around them, reach beyond the image, in pixels."""
    x, y = (w - 1) / 2, (h - 1) / 2
    corners = torch.tensor([[-x, x, x, -x], [-y, -y, y, y], [1, 1, 1, 1]], dtype=torch.float64)
    seen = (maps @ corners)[:, :2]
    reach = torch.cat([-seen.amin((0, 2)), seen.amax((0, 2))]) + 2 * MARGIN - torch.tensor([x, y, x, y])
    left, top, right, bottom = reach.clamp(min=0).minimum(torch.tensor([w - 1, h - 1] * 2)).ceil().int().tolist()
    return left, top, right, bottom


def filters(images: Picture) -> Iterator[tuple[Tensor, tuple[int, int], tuple[int, int]]]:
    """(taps, stride, padding) of the filter along x and along y, for images as [b * c, 1, h, w]."""
    taps = beside(torch.tensor(SYM6, dtype=images.dtype), images)
    yield taps.view(1, 1, 1, -1), (1, 2), (0, TAPS)
    yield taps.view(1, 1, -1, 1), (2, 1), (TAPS, 0)


def upsampled(images: Picture) -> Float[Tensor, "b c 2*h 2*w"]:
    n, c = images.shape[:2]
    images = images.flatten(0, 1)[:, None]
    for taps, stride, padding in filters(images):
        images = conv_transpose2d(images, taps, stride=stride, padding=padding)
    return images.view(n, c, *images.shape[2:])


def downsampled(images: Picture) -> Float[Tensor, "b c h//2-6 w//2-6"]:
    """Half the size, less the margin."""
    n, c = images.shape[:2]
    images = images.flatten(0, 1)[:, None]
    for taps, stride, padding in filters(images):
        images = conv2d(images, taps, stride=stride, padding=padding)
    return images.view(n, c, *images.shape[2:])[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
