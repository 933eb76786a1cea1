"""PNG without a codec: the usual kind is read several times faster, and written byte for byte the same everywhere.

Written files hold rows without filters in stored blocks, so reading one is little more than a copy of its bytes.
"""

import struct
import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from onejump.types import UserError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
START = SIGNATURE + b"\0\0\0\rIHDR"
MODES = {0: ("L", 1), 2: ("RGB", 3)}  # colour type -> Pillow's mode, channels
IGNORED = frozenset((b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"bKGD", b"sBIT"))  # nothing here changes pixels
MAX_BLOCK = 65535

Pixels = UInt8[np.ndarray, "h w c"]


def read_png(data: bytes, where: str) -> Pixels | None:
    """The pixels of a plain PNG: 8 bits, grey or RGB, not interlaced, nothing but pixels in it. None for others.

    Raises UserError, naming `where`, if the checksum of the pixels' bytes is wrong: decoders take them as they are.
    """
    if data[:16] != START or len(data) < 33:
        return None
    w, h, bits, colour, *methods = struct.unpack_from(">IIBBBBB", data, 16)
    if bits != 8 or colour not in MODES or any(methods) or not 0 < w * h <= (Image.MAX_IMAGE_PIXELS or 2**40):
        return None
    body = _body(data, where)
    if body is None:
        return None
    mode, c = MODES[colour]
    rows = _stored(body, h * (1 + w * c))
    if rows is not None:
        lines = np.frombuffer(rows, np.uint8).reshape(h, 1 + w * c)
        if not lines[:, 0].any():  # no filter in any row
            return lines[:, 1:].reshape(h, w, c)
    try:
        return np.asarray(Image.frombytes(mode, (w, h), body, "zip", mode)).reshape(h, w, c)
    except ValueError:
        return None


def _body(data: bytes, where: str) -> bytes | None:
    """The compressed pixels; None if there is anything else that could matter, or the file is not whole."""
    parts, place = [], 33
    while place + 12 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 8 + size
        if end + 4 > len(data):
            return None
        if kind == b"IDAT":
            if zlib.crc32(data[place + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise UserError(f"{where} cannot be read (damaged: a checksum is wrong): replace or remove it")
            parts.append(data[place + 8 : end])
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
    header = struct.pack(">IIBBBBB", w, h, 8, colour, 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"".join(body)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
