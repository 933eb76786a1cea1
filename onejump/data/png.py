"""PNG with less of a codec: the usual kind is read several times faster, and written byte for byte the same everywhere.

Written files hold rows without filters in stored blocks, so reading one is little more than a copy of its bytes. Many
that are filtered are read together (`unfilter`), one alone by Pillow's decoder.
"""

import math
import struct
import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from onejump.data.unfilter import PAETH, unfiltered, worthwhile
from onejump.types import UserError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
START = SIGNATURE + b"\0\0\0\rIHDR"
CHANNELS = {0: 1, 2: 3}  # of the colour types that are read
IGNORED = frozenset((b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"bKGD", b"sBIT"))  # nothing here changes pixels
MAX_BLOCK = 65535
AT_ONCE = 2**21  # bytes of images that are read together: more would not stay in a core's cache

SIZES, CHUNK = struct.Struct(">IIBBBBB"), struct.Struct(">I4s")
IDAT_CRC = zlib.crc32(b"IDAT")

Pixels = UInt8[np.ndarray, "h w c"]
Extent = tuple[int, int, int]  # height, width and channels


def read_png(data: bytes, where: str) -> Pixels | None:
    """The pixels of a plain PNG: 8 bits, grey or RGB, not interlaced, nothing but pixels in it. None for others.

    Raises UserError, naming `where`, if the checksum of the pixels' bytes is wrong: decoders take them as they are.
    """
    extent = _extent(data)
    body = None if extent is None else _body(data, where)
    if extent is None or body is None:
        return None
    h, w, c = extent
    rows = _stored(body, h * (1 + w * c))
    if rows is not None:
        lines = np.frombuffer(rows, np.uint8).reshape(h, 1 + w * c)
        if not lines[:, 0].any():  # no filter in any row
            return lines[:, 1:].reshape(h, w, c)
    mode = "L" if c == 1 else "RGB"
    try:
        return np.asarray(Image.frombytes(mode, (w, h), body, "zip", mode)).reshape(h, w, c)
    except ValueError:
        return None


def read_pngs(files: Sequence[bytes]) -> list[Pixels | None]:
    """What `read_png` gives for each. None also for a damaged one, or too few of one size to be faster together."""
    found: list[Pixels | None] = [None] * len(files)
    alike: dict[bytes, list[int]] = defaultdict(list)
    for k, data in enumerate(files):
        alike[data[: 16 + SIZES.size]].append(k)
    for places in alike.values():
        extent = _extent(files[places[0]])
        most = 0 if extent is None else AT_ONCE // math.prod(extent)
        if extent is not None and worthwhile(min(len(places), most), *extent):
            for first in range(0, len(places), most):
                some = places[first : first + most]
                good, images = _read_together([files[k] for k in some], extent)
                for k, pixels in zip(good, images, strict=True):
                    found[some[k]] = pixels
    return found


def _read_together(files: list[bytes], extent: Extent) -> tuple[list[int], UInt8[np.ndarray, "n h w c"]]:
    """Which of these files can be read, and the pixels in those."""
    h, w, c = extent
    inflated = [_inflated(data, h * (1 + w * c)) for data in files]
    good = [k for k, rows in enumerate(inflated) if rows is not None]
    joined = b"".join([rows for rows in inflated if rows is not None])
    lines = np.frombuffer(joined, np.uint8).reshape(len(good), h, 1 + w * c)
    filters = lines[:, :, 0].max(1, initial=0)
    known = filters <= PAETH
    if not known.all():
        good, lines = [k for k, is_known in zip(good, known, strict=True) if is_known], lines[known]
    return good, unfiltered(lines, c) if filters.any() else lines[:, :, 1:].reshape(len(good), h, w, c)


def _extent(data: bytes) -> Extent | None:
    """Height, width and channels of what may be a plain PNG."""
    if data[:16] != START or len(data) < 33:
        return None
    w, h, bits, colour, *methods = SIZES.unpack_from(data, 16)
    if bits != 8 or colour not in CHANNELS or any(methods) or not 0 < w * h <= (Image.MAX_IMAGE_PIXELS or 2**40):
        return None
    return h, w, CHANNELS[colour]


def _inflated(data: bytes, size: int) -> bytes | None:
    """The first `size` bytes that a PNG's pixels inflate to, each row after its filter; None if there are fewer.

    The checksum of the compressed bytes is compared, so that zlib's own of what they hold need not be.
    """
    try:
        body = _body(data, "")
        if body is None or body[0] & 0x8F != 8 or body[1] & 32 or int.from_bytes(body[:2], "big") % 31:
            return None
        rows = zlib.decompressobj(-zlib.MAX_WBITS).decompress(body[2:], size)
    except (UserError, IndexError, zlib.error):
        return None
    return rows if len(rows) == size else None


def _body(data: bytes, where: str) -> bytes | None:
    """The compressed pixels; None if there is anything else that could matter, or the file is not whole."""
    parts, place, whole = [], 33, len(data)
    while place + 12 <= whole:
        size, kind = CHUNK.unpack_from(data, place)
        end = place + 8 + size
        if end + 4 > whole:
            return None
        if kind == b"IDAT":
            part = data[place + 8 : end]
            if zlib.crc32(part, IDAT_CRC) != int.from_bytes(data[end : end + 4], "big"):
                raise UserError(f"{where} cannot be read (damaged: a checksum is wrong): replace or remove it")
            parts.append(part)
        elif kind == b"IEND":
            return parts[0] if len(parts) == 1 else b"".join(parts) or None
        elif kind not in IGNORED:
            return None
        place = end + 4
    return None


def _stored(body: bytes, size: int) -> bytes | None:
    """What stored blocks of a zlib stream hold, if it is made of nothing else and holds `size` whole bytes."""
    place, parts, last = 2, [], False
    while not last:
        if place + 5 > len(body) or body[place] > 1:
            return None
        last, n, inverse = body[place] == 1, *struct.unpack_from("<HH", body, place + 1)
        if n ^ inverse != MAX_BLOCK:
            return None
        parts.append(body[place + 5 : place + 5 + n])
        place += 5 + n
    rows = parts[0] if len(parts) == 1 else b"".join(parts)
    whole = len(rows) == size and zlib.adler32(rows) == int.from_bytes(body[place : place + 4], "big")
    return rows if whole else None


def write_png(pixels: Pixels) -> bytes:
    """A PNG of grey or RGB pixels; the bytes depend on the pixels alone."""
    h, w, c = pixels.shape
    colour = {1: 0, 3: 2}[c]
    rows = np.zeros((h, 1 + w * c), np.uint8)
    rows[:, 1:] = pixels.reshape(h, w * c)
    raw = rows.tobytes()
    starts = range(0, len(raw), MAX_BLOCK)
    body = [b"\x78\x01"]
    for start in starts:
        block = raw[start : start + MAX_BLOCK]
        body += [struct.pack("<BHH", start == starts[-1], len(block), len(block) ^ MAX_BLOCK), block]
    body.append(zlib.adler32(raw).to_bytes(4, "big"))
    header = SIZES.pack(w, h, 8, colour, 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"".join(body)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
