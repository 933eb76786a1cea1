"""Files of the safetensors layout, written and read tensor by tensor: beside the weights no more than one is in memory.

    8 bytes   n, the length of the header, little-endian
    n bytes   JSON: {"__metadata__": {text: text}, name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, ...},
              filled up with spaces to a multiple of 8
    the rest  every tensor, row by row, little-endian, one behind the other without gaps

In the order and with the bytes that the safetensors package itself writes: large numbers first, then by name.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onejump.types import UserError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
RANKS = {dtype: rank for rank, dtype in enumerate(NAMES)}
MAX_HEADER = 2**22  # bytes; the header of a network of 1,000 tensors and its configuration takes 2^17
CHUNK = 2**23  # bytes read, written and hashed at once

assert sys.byteorder == "little", "tensors are written as they lie in memory"


@dataclass(frozen=True)
class Entry:
    """What the header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Callable[[str], dict[str, str]] | None = None
) -> str:
    """Writes the file whole or not at all, also if the power is cut, and returns its checksum.

    The checksum is the sha256 of the file as it is without metadata. metadata: what to add to the header, by this
    checksum; its length must not depend on it. Each tensor is asked for when it is its turn, and copied only if it is
    not contiguous or not on the CPU. Raises OSError if the file cannot be written, UserError for tensors or metadata
    that do not fit into one.
    """
    entries = _sorted({name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    plain = header_of(entries, {})
    digest = hashlib.sha256(plain)
    header = header_of(entries, metadata("0" * 64)) if metadata else plain
    draft = path.with_name(f".{path.name}")
    try:
        with open(draft, "wb") as file:
            file.write(header)
            for name in entries:
                _pour(tensors[name], file.write, digest.update)
            if metadata:
                header, placeholder = header_of(entries, metadata(digest.hexdigest())), header
                assert len(header) == len(placeholder)
                file.seek(0)
                file.write(header)
            file.flush()
            os.fsync(file.fileno())  # or the rename could reach the disk before the bytes do
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """The checksum of the file that write_tensors would write."""
    entries = _sorted({name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    digest = hashlib.sha256(header_of(entries, {}))
    for name in entries:
        _pour(tensors[name], digest.update)
    return digest.hexdigest()


def _pour(tensor: Tensor, *into: Callable[[memoryview], object]) -> None:
    """Nothing of the tensor is held when the next one is asked for."""
    for chunk in _chunks(tensor):
        for take in into:
            take(chunk)


def looks_like_tensors(path: Path) -> bool:
    """Whether it begins as a file of this layout. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(10)[8:] == b'{"'


def header_of(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file with these tensors in this order, up to the data."""
    content: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.nbytes
        content[name] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise UserError(f"a header of {len(text):,} bytes; {MAX_HEADER:,} are allowed: shorten the names or the record")
    return len(text).to_bytes(8, "little") + text


def _sorted(entries: dict[str, Entry]) -> dict[str, Entry]:
    for name, entry in entries.items():
        if entry.dtype not in NAMES:
            raise UserError(f"{name}: {entry.dtype} has no place in a safetensors file; convert it")
        if name == "__metadata__":
            raise UserError(f"{name}: no name for a tensor in a safetensors file; rename it")
    return dict(sorted(entries.items(), key=lambda item: (-RANKS[item[1].dtype], item[0])))


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    memory = _bytes(tensor.detach().cpu().contiguous())
    return (memory[i : i + CHUNK] for i in range(0, len(memory), CHUNK))


@dataclass(frozen=True)
class TensorFile:
    """A file whose header was read and found sound: its tensors, one behind the other, fill the file exactly."""

    path: Path
    raw: bytes  # the file up to the data
    metadata: dict[str, str]
    entries: dict[str, Entry]  # in the order of the data

    @property
    def plain(self) -> bytes:
        """What `raw` is in the same file without metadata."""
        return header_of(self.entries, {})

    def load(self, header: bytes) -> tuple[dict[str, Tensor], str]:
        """Every tensor, and the sha256 of `header` and the data: of what has been loaded, for it is read once.

        Raises OSError or ValueError if the file has changed since it was opened.
        """
        tensors, digest = {}, hashlib.sha256(header)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(len(self.raw))
            for name, entry in self.entries.items():
                tensors[name] = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
                memory = _bytes(tensors[name])
                done = 0
                while done < len(memory):
                    count = file.readinto(memory[done : done + CHUNK])
                    if not count:
                        raise ValueError(f"{self.path.name} was cut off while it was read")
                    digest.update(memory[done : done + count])
                    done += count
        return tensors, digest.hexdigest()


def open_tensors(path: Path) -> TensorFile:
    """Reads the header and nothing else, in bounded memory. Raises OSError, or ValueError for no sound file."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise ValueError(f"{path.name} is no safetensors file, or only the beginning of one")
        if length > MAX_HEADER:
            raise ValueError(f"{path.name} has a header of {length:,} bytes; {MAX_HEADER:,} are allowed")
        text = file.read(length)
    try:
        content = json.loads(text)
        metadata = content.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is no text")
        entries = _entries(content, size - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"the header of {path.name} is damaged ({_short(error)})") from error
    return TensorFile(path, prefix + text, metadata, entries)


def _entries(content: dict[str, Any], size: int) -> dict[str, Entry]:
    """The tensors in the order of their data, which must be `size` bytes without gap or overlap."""
    entries, end = {}, 0
    for name, about in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (start, stop) = about["shape"], about["data_offsets"]
        if len(shape) > 16 or not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise ValueError(f"{name}: shape {shape}")
        entries[name] = Entry(DTYPES[about["dtype"]], tuple(shape))
        if start != end or stop != start + entries[name].nbytes:
            raise ValueError(f"{name}: it cannot be in bytes {start} to {stop}")
        end = stop
    if end != size:
        raise ValueError(f"{end:,} bytes of data announced, {size:,} there")
    return entries


def _short(error: Exception) -> str:
    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(reason.split())[:200]
