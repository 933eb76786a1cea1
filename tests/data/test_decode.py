"""Pixels of encoded images: our PNG reader and writer against Pillow, and the two crops against their definitions."""

import io
import struct
import zlib

import numpy as np
import pytest
from image_files import encode, flat, noise, picture
from PIL import Image

from onejump.data import png
from onejump.data.decode import Decoding, decode
from onejump.data.png import read_png, write_png
from onejump.types import UserError


def fitted(pixels: np.ndarray, size: int, crop: str) -> np.ndarray:
    return Decoding(size=size, crop=crop).fit(pixels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (5, 7), (200, 130)])  # the last: more than one stored block
def test_a_written_png_is_a_png_of_those_pixels(channels, size):
    pixels = noise(1, size, channels)
    data = write_png(pixels)
    assert np.array_equal(read_png(data, "x"), pixels)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))).reshape(pixels.shape), pixels)


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_quick_way_reads_what_pillow_wrote(level, channels):
    gradient = np.add.outer(np.arange(20), 3 * np.arange(30)).astype(np.uint8)[:, :, None].repeat(channels, 2)
    for pixels in (noise(2, (30, 20), channels), gradient):  # Pillow gives rows of a gradient filters
        quick = read_png(encode(picture(pixels), compress_level=level), "x")
        assert quick is not None and np.array_equal(quick, pixels)


def test_the_quick_way_leaves_what_is_not_plain_pixels_to_pillow():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255])
    assert read_png(flat((1, 2, 3, 4), "RGBA"), "x") is None
    assert read_png(encode(palette), "x") is None
    assert read_png(encode(Image.fromarray(np.full((4, 4), 999, np.uint16))), "x") is None
    assert read_png(encode(Image.new("RGB", (4, 4)), transparency=(0, 0, 0)), "x") is None
    assert read_png(flat(0, "L")[:-12], "x") is None  # no end


def test_a_flipped_bit_in_a_png_is_found():
    data = bytearray(write_png(noise(3)))
    data[80] ^= 1
    with pytest.raises(UserError, match="^here cannot be read .*checksum"):
        decode(bytes(data), Decoding(), "here")


def test_a_png_that_unpacks_to_more_than_it_says_gives_no_more():
    rows = zlib.compress(bytes(10**6))
    header = png._chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0))
    data = png.SIGNATURE + header + png._chunk(b"IDAT", rows) + png._chunk(b"IEND", b"")
    assert decode(data, Decoding(), "x").tolist() == np.zeros((1, 4, 4)).tolist()


def test_center_is_the_central_square_resized():
    pixels = noise(4, (50, 30))
    square = Image.fromarray(pixels).resize((16, 16), Image.Resampling.LANCZOS, (10, 0, 40, 30))
    assert np.array_equal(fitted(pixels, 16, "center"), np.asarray(square))
    assert np.array_equal(fitted(pixels[:, 10:40], 30, "center"), pixels[:, 10:40])


def test_dhariwal_halves_by_averages_then_resizes_then_cuts():
    pixels = noise(5, (83, 67))  # at 16: 83x67 -> 41x33 -> 20x16, which is not twice 16
    once = Image.fromarray(pixels).resize((41, 33), Image.Resampling.BOX)
    twice = once.resize((20, 16), Image.Resampling.BOX)
    assert np.array_equal(fitted(pixels, 16, "dhariwal"), np.asarray(twice)[:, 2:18])
    third = once.resize((round(41 * 24 / 33), 24), Image.Resampling.BICUBIC)  # at 24: 41x33 -> 30x24
    assert np.array_equal(fitted(pixels, 24, "dhariwal"), np.asarray(third)[:, 3:27])


def test_halving_is_the_mean_of_four_pixels():
    pixels = noise(6, (32, 32)) // 4 * 4  # means without rounding
    means = pixels.reshape(16, 2, 16, 2, 3).astype(int).sum((1, 3)) / 4
    assert np.abs(fitted(pixels, 16, "dhariwal") - means).max() <= 0.5


def test_small_images_are_enlarged_by_either_crop():
    for crop in ("center", "dhariwal"):
        assert (fitted(np.full((5, 9, 3), 77, np.uint8), 16, crop) == 77).all()


def test_orientation_is_applied_but_not_in_the_published_steps():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = picture(noise(7, (8, 6)))
    data = encode(stored, exif=exif)
    turned = np.asarray(stored.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(decode(data, Decoding(), "x").transpose(1, 2, 0), turned)
    assert np.array_equal(decode(data, Decoding(size=6), "x").transpose(1, 2, 0), turned[1:7])
    assert np.array_equal(
        decode(data, Decoding(size=6, crop="dhariwal"), "x").transpose(1, 2, 0), noise(7, (8, 6))[:, 1:7]
    )


def test_channels_can_be_asked_for():
    assert decode(flat(9, "L"), Decoding(), "x").shape == (1, 4, 4)
    assert decode(flat(9, "L"), Decoding(False), "x")[:, 0, 0].tolist() == [9, 9, 9]
    assert decode(flat((0, 255, 0)), Decoding(True), "x")[:, 0, 0].tolist() == [150]  # 0.587 of 255


def test_a_line_of_pixels_cannot_fill_the_memory():
    data = flat((1, 2, 3), size=(60_000, 1))
    with pytest.raises(UserError, match="^x has more than"):
        decode(data, Decoding(size=64, crop="dhariwal"), "x")
    assert decode(data, Decoding(size=64), "x").shape == (3, 64, 64)


@pytest.mark.parametrize(("size", "crop", "word"), [(0, "center", "--size 0"), (4, "left", "--crop left")])
def test_impossible_options_are_named(size, crop, word):
    with pytest.raises(UserError, match=word):
        Decoding(size=size, crop=crop)
