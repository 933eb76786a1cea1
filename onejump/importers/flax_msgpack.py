"""Flax's checkpoints: MessagePack with arrays as extensions. Arrays stay slices of the file; work is bounded.

Of MessagePack (github.com/msgpack/msgpack, spec.md): the first byte of a value tells its type and often its length.
Flax's extension 1 is an array, 3 a number of NumPy: (shape, name of the type, bytes), again as MessagePack.
"""

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from onejump.importers.inert import printable

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint32),
    )
}
ARRAY, SCALAR = 1, 3
MAX_VALUES, MAX_DEPTH, MAX_TEXT = 1_000_000, 64, 4096
MAX_PARTS, MAX_PATH = 16, 1000  # of an array's path
NUMBERS = {  # first byte -> layout
    **{0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"},
    **{0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"},
}
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
# first byte -> (bytes of the length that follows it)
BYTES, EXTENSIONS, TEXTS = {0xC4: 1, 0xC5: 2, 0xC6: 4}, {0xC7: 1, 0xC8: 2, 0xC9: 4}, {0xD9: 1, 0xDA: 2, 0xDB: 4}
FIXED = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}  # extensions of so many bytes
LISTS, MAPS = {0xDC: 2, 0xDD: 4}, {0xDE: 2, 0xDF: 4}


@dataclass(frozen=True, eq=False)
class Array:
    """Numbers in the file: their bytes, which may begin anywhere."""

    data: Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, data: Tensor) -> Tensor:
        """The numbers in a copy of the bytes."""
        return data.view(self.dtype).reshape(self.shape)


@dataclass
class Reader:
    """Values of `data` one behind the other from `at`. Raises ValueError where it is damaged."""

    data: memoryview
    at: int = 0
    left: int = MAX_VALUES
    depth: int = 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError("it is cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def count(self, width: int) -> int:
        return int.from_bytes(self.take(width), "big")

    def value(self) -> object:
        self.left -= 1
        if self.left < 0 or self.depth > MAX_DEPTH:
            raise ValueError("it holds more values than any checkpoint, or they are nested too deep")
        self.depth += 1
        found = self.read(self.count(1))
        self.depth -= 1
        return found

    def read(self, first: int) -> object:
        if first < 0x80 or first >= 0xE0:
            return first if first < 0x80 else first - 0x100
        if first < 0x90 or first in MAPS:
            return self.map(first & 0x0F if first < 0x90 else self.count(MAPS[first]))
        if first < 0xA0 or first in LISTS:
            n = first & 0x0F if first < 0xA0 else self.count(LISTS[first])
            return [self.value() for _ in range(n)]
        if first < 0xC0 or first in TEXTS:
            n = first & 0x1F if first < 0xC0 else self.count(TEXTS[first])
            return str(self.take(self.short(n)), "utf-8")
        if first in BYTES:
            return self.take(self.count(BYTES[first]))
        if first in NUMBERS:
            layout = NUMBERS[first]
            return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        if first in CONSTANTS:
            return CONSTANTS[first]
        if first in EXTENSIONS or first in FIXED:
            n = FIXED[first] if first in FIXED else self.count(EXTENSIONS[first])
            return self.extension(self.count(1), self.take(n))
        raise ValueError(f"a value of type 0x{first:02x}")

    def short(self, n: int) -> int:
        if n > MAX_TEXT:
            raise ValueError(f"a text of {n:,} bytes")
        return n

    def map(self, n: int) -> dict[str, object]:
        found: dict[str, object] = {}
        for _ in range(n):
            key = self.value()
            if not isinstance(key, str) or key in found:
                raise ValueError("a name that is no text, or is there twice")
            found[key] = self.value()
        return found

    def extension(self, kind: int, data: memoryview) -> object:
        if kind not in (ARRAY, SCALAR):
            return None  # a complex number, or what is not flax's
        inner = Reader(data, left=32)
        content = inner.value()
        if not (isinstance(content, list) and len(content) == 3 and inner.at == len(data)):
            raise ValueError("an array that is not flax's")
        return array(*content)


def array(shape: object, name: object, data: object) -> Array:
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None or not isinstance(data, memoryview) or not isinstance(shape, list):
        raise ValueError(f"an array of {printable(name, 40)}")
    if len(shape) > 16 or not all(type(side) is int and 0 <= side < 2**40 for side in shape):
        raise ValueError("an array whose shape is none")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("an array of another size than it says")
    held = torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
    return Array(held, dtype, tuple(shape))


def looks_like_msgpack(first: bytes) -> bool:
    """A map whose first key is a short text, as every checkpoint of flax begins."""
    start = {0xDE: 3, 0xDF: 5}.get(first[0], 1) if first else 0
    is_map = bool(first) and (0x81 <= first[0] <= 0x8F or first[0] in MAPS)
    return is_map and len(first) > start and 0xA1 <= first[start] <= 0xBF


def read_msgpack(data: memoryview) -> object:
    """The one value in the file: maps, lists, texts, numbers and Arrays. Raises ValueError if it is damaged."""
    reader = Reader(data)
    try:
        found = reader.value()
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError("a text that is none") from error
    if reader.at != len(data):
        raise ValueError("there is something behind its end")
    return found


def arrays_in(value: object, name: str = "", depth: int = 0) -> dict[str, Array]:
    """Every array under its path, such as Conv_0/kernel. Raises ValueError for longer paths than any checkpoint's."""
    if depth > MAX_PARTS or len(name) > MAX_PATH:
        raise ValueError(f"an array's path of more than {MAX_PARTS} parts or {MAX_PATH} letters")
    if isinstance(value, Array):
        return {name: value}
    found: dict[str, Array] = {}
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found |= arrays_in(item, f"{name}/{key}" if name else str(key), depth + 1)
    return found
