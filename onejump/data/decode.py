"""One encoded image to pixels: what colours, transparency, depth and orientation become, and the two crops."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from onejump.data.png import Pixels, read_png, read_pngs
from onejump.data.source import Source, line, shown
from onejump.types import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # a decoder is chosen by content: no others, whatever the suffix
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
ORIENTATION = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where a picture may say how it is held

Crop = str  # "center" or "dhariwal"


@dataclass(frozen=True)
class Decoding:
    """How encoded images become pixels uint8 [c, h, w].

    grey: True one channel, False RGB, None one channel for grey images and three for others. size: the side of the
    square made of each image; None leaves them as they are. crop: how that square is made,
      center    the central square, resized (Lanczos, antialiased; at its edges the filter sees beyond them);
      dhariwal  the published ImageNet pre-processing (Dhariwal & Nichol 2021): both sides halved (box filter, rounded
                down) while the shorter is at least 2 * size, then the whole image resized (bicubic) so that the
                shorter side is `size`, then the centre cut out. As published, EXIF orientation is not applied.
    """

    grey: bool | None = None
    size: int | None = None
    crop: Crop = "center"

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise UserError(f"--size {self.size}: the side of the images in pixels, 1 or more")
        if self.crop not in ("center", "dhariwal"):
            raise UserError(f"--crop {self.crop}: center or dhariwal is needed")

    def done(self, pixels: Pixels) -> bool:
        """Whether the pixels are as they are asked for."""
        h, w, c = pixels.shape
        return (self.size is None or self.size == h == w) and (self.grey is None or self.grey == (c == 1))

    def fit(self, pixels: Pixels) -> UInt8[np.ndarray, "H W c"]:
        """The square of side `size`, if one is asked for."""
        if self.size is None or pixels.shape[:2] == (self.size, self.size):
            return pixels
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        square = central_square if self.crop == "center" else dhariwal_square
        return np.asarray(square(image, self.size)).reshape(self.size, self.size, -1)


def decode_all(source: Source, names: Sequence[str], how: Decoding) -> list[UInt8[np.ndarray, "c h w"] | UserError]:
    """The images of these names, or why one cannot be had. Plain PNGs of one size take about half the time of each."""
    files: list[bytes] = []
    found: list[UInt8[np.ndarray, "c h w"] | UserError] = []
    errors: dict[int, UserError] = {}
    for k, name in enumerate(names):
        try:
            files.append(source.read(name))
        except UserError as error:
            files.append(b"")
            errors[k] = error
    for k, pixels in enumerate(read_pngs(files)):
        try:
            if k in errors:
                raise errors[k]
            if pixels is not None and how.done(pixels):
                found.append(pixels.transpose(2, 0, 1))
            else:
                found.append(decode(files[k], how, f"{shown(names[k])} in {source.path}", pixels))
        except UserError as error:
            found.append(error)
    return found


def decode(
    data: bytes, how: Decoding, where: str, known: UInt8[np.ndarray, "H W k"] | None = None
) -> UInt8[np.ndarray, "c h w"]:
    """The pixels of an encoded image. Raises UserError, in a line that begins with `where`, if that cannot be done.

    known: what the file holds, if it has been read already.
    """
    try:
        pixels = read_png(data, where) if known is None else known
        if pixels is None:
            pixels = _by_pillow(data, how.size is None or how.crop == "center")
        pixels = how.fit(pixels)
    except (UserError, MemoryError):
        raise
    except (TooLarge, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels"
        raise UserError(f"{where} has {limit}: make it smaller or remove it") from error
    except Exception as error:  # decoders raise almost anything on damaged files
        why = "no known image format" if isinstance(error, UnidentifiedImageError) else line(error)
        raise UserError(f"{where} cannot be read ({why}): replace or remove it") from error
    if how.grey is not None and how.grey != (pixels.shape[2] == 1):
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None] if how.grey else pixels.repeat(3, axis=2)
    return pixels.transpose(2, 0, 1)


class TooLarge(Exception):
    """More pixels than one image may have."""


def check_pixels(width: int, height: int) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise TooLarge


def _by_pillow(data: bytes, upright: bool) -> Pixels:
    """The first frame: transparency laid on white, 16 bits made 8, and turned as its EXIF says if `upright`."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        check_pixels(*opened.size)
        opened.load()
        image: Image.Image = opened
        if upright and any(key in image.info for key in ORIENTATION):
            image = ImageOps.exif_transpose(image)
        grey = image.mode in GREY_MODES
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return pixels[:, :, None] if grey else pixels


def central_square(image: Image.Image, size: int) -> Image.Image:
    """The largest square in the middle, resized with an antialiasing Lanczos filter."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


def dhariwal_square(image: Image.Image, size: int) -> Image.Image:
    """Halved while twice too large, resized by its shorter side, then cut: see `Decoding`."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    check_pixels(width, height)  # a line of pixels, scaled to `size`, could fill the memory
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
