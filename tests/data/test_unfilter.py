"""PNG's filters undone for many images at once: against their definitions, and against Pillow."""

import struct
import zlib

import numpy as np
import pytest
from image_files import encode, flat, noise, picture, write

from onejump.data import unfilter
from onejump.data.decode import Decoding, decode, decode_all
from onejump.data.files import folder_source
from onejump.data.png import SIGNATURE, _chunk, read_png, read_pngs
from onejump.data.unfilter import AVERAGE, PAETH, paeth, unfiltered
from onejump.types import UserError


@pytest.fixture
def together(monkeypatch):
    """However few there are."""
    monkeypatch.setattr(unfilter, "DIAGONAL", 0)


def filtered(pixels: np.ndarray, kinds: list[int]) -> bytes:
    """Rows as PNG's specification defines them, byte by byte: x - Filter(left, up, corner)."""
    h, w, c = pixels.shape
    rows = bytearray()
    at = np.zeros((h + 1, w + 1, c), int)
    at[1:, 1:] = pixels
    for i, kind in enumerate(kinds, 1):
        rows.append(kind)
        for j in range(1, w + 1):
            for left, up, corner, x in zip(at[i, j - 1], at[i - 1, j], at[i - 1, j - 1], at[i, j], strict=True):
                nearest = min((left, up, corner), key=lambda v, p=left + up - corner: abs(p - v))  # noqa: B023
                rows.append((x - (0, left, up, (left + up) // 2, nearest)[kind]) % 256)
    return bytes(rows)


def png(pixels: np.ndarray, kinds: list[int], body: bytes | None = None) -> bytes:
    h, w, c = pixels.shape
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, c - 1, 0, 0, 0))
    body = zlib.compress(filtered(pixels, kinds)) if body is None else body
    return SIGNATURE + header + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def test_paeth_is_the_nearest_of_the_three_for_all_bytes():
    left, up = (v.reshape(-1).astype(np.int16) for v in np.mgrid[:256, :256])
    for corner in range(0, 256, 3):
        far = [abs(left + up - corner - v) for v in (left, up, corner)]
        told = np.where((far[0] <= far[1]) & (far[0] <= far[2]), left, np.where(far[1] <= far[2], up, corner))
        given = (v.astype(np.uint8) for v in (left, up, np.full_like(up, corner)))
        assert np.array_equal(paeth(*given), told), corner


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (6, 1), (1, 6), (7, 5), (5, 7), (6, 6)])
def test_every_filter_is_undone_in_any_row_of_any_image(size, channels):
    rng = np.random.default_rng(0)
    images = np.stack([noise(k, size, channels) // (1, 8, 64)[k % 3] for k in range(12)])
    kinds = rng.integers(0, 5, (12, size[1]))
    kinds[:5] = np.arange(5)[:, None]  # each alone, too
    rows = b"".join(map(filtered, images, kinds.tolist()))
    lines = np.frombuffer(rows, np.uint8).reshape(12, size[1], -1)
    assert np.array_equal(unfiltered(lines, channels), images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("level", [0, 6])
def test_many_are_read_as_each_is(channels, level):
    smooth = np.add.outer(3 * np.arange(16), 2 * np.arange(20)).astype(np.uint8)[:, :, None].repeat(channels, 2)
    images = [smooth + noise(k, (20, 16), channels) // 32 for k in range(200)]
    files = [encode(picture(pixels), compress_level=level) for pixels in images]
    assert {kind for file in files[:9] for kind in rows_of(file, 16)} & {AVERAGE, PAETH}
    assert all(np.array_equal(a, b) for a, b in zip(read_pngs(files), images, strict=True))
    assert all(np.array_equal(read_png(file, "x"), b) for file, b in zip(files[:9], images, strict=False))
    assert read_pngs(files[:3]) == [None] * 3  # no faster together


def rows_of(file: bytes, h: int) -> set[int]:
    rows = zlib.decompress(file[41:-16])
    return set(rows[:: len(rows) // h])


def test_those_of_other_kinds_and_sizes_keep_their_places(tmp_path, together):
    files = {
        "a.png": flat((1, 2, 3)),
        "b.png": flat(7, "L"),
        "c.jpg": encode(picture(noise(1)), "JPEG"),
        "d.png": flat((9, 9, 9), size=(6, 5)),
        "e.png": b"bad",
        "f.png": flat((4, 5, 6)),
        "g.png": flat((1, 2, 3, 4), "RGBA"),
        "h.png": encode(picture(noise(2))),
    }
    source = folder_source(write(tmp_path, files))
    (tmp_path / "a.png").unlink()
    for how in (Decoding(), Decoding(grey=False, size=4), Decoding(grey=True)):
        found = decode_all(source, source.names, how)
        assert [isinstance(image, UserError) for image in found] == [k in (0, 4) for k in range(8)]
        assert "a.png in" in str(found[0]) and "e.png in" in str(found[4])
        for name, image in zip(source.names, found, strict=True):
            if not isinstance(image, UserError):
                assert np.array_equal(image, decode(files[name], how, name)), name


def test_what_is_damaged_does_no_harm_to_its_neighbours(together):
    pixels = [noise(k, (5, 4)) for k in range(7)]
    kinds = [PAETH] * 4
    good = [png(image, kinds) for image in pixels]
    rows = filtered(pixels[0], kinds)
    bad = {
        "a flipped bit": good[0][:60] + bytes([good[0][60] ^ 1]) + good[0][61:],
        "cut": good[0][:-40],
        "no such filter": png(pixels[0], kinds, zlib.compress(b"\5" + rows[1:])),
        "no zlib": png(pixels[0], kinds, b"\x79" + zlib.compress(rows)[1:]),
        "a dictionary": png(pixels[0], kinds, b"\x78\xbb" + zlib.compress(rows)[2:]),
        "nothing": png(pixels[0], kinds, b""),
    }
    for name, file in bad.items():
        found = read_pngs([*good[:3], file, *good[3:]])
        assert found.pop(3) is None, name
        assert all(np.array_equal(a, b) for a, b in zip(found, pixels, strict=True)), name
        with pytest.raises(UserError, match="^here "):
            decode(file, Decoding(), "here")
    more = read_pngs([*good, png(pixels[0], kinds, zlib.compress(rows + bytes(10**6)))])  # only what its header says
    assert all(np.array_equal(a, b) for a, b in zip(more, [*pixels, pixels[0]], strict=True))
