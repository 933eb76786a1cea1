"""The field's checkpoint files, read without running anything: pickles (EDM, EDM2, ECT, TCM) and torch.save's files."""

import mmap
import string
from pathlib import Path

from onejump.importers.foreign_names import Meanings
from onejump.importers.foreign_tensors import MAGIC, Resolve, no_storage, read_legacy
from onejump.importers.inert import Budget, printable
from onejump.importers.module_record import ModuleRecord
from onejump.importers.pickle_machine import Machine
from onejump.importers.torch_zip import read_zip
from onejump.types import UserError

__all__ = ["ModuleRecord", "read_torch"]

PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
KNOWN = {  # first bytes of what is often taken for a checkpoint
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself (git lfs pull)",
    b"<": "a web page; the download went wrong",
    b"{": "JSON",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "a zstandard archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it",
}


def read_torch(path: Path) -> object:
    """What is in a .pkl, .pt or .pth file: dicts, lists, tuples, sets, texts, numbers, torch's dtypes, NumPy arrays,
    tensors, and a ModuleRecord for every object of a network's class.

    Tensors are views of the mapped file without memory of their own: the file must stay as it is. In a pickle they may
    begin at any byte: copy one before calculating with it. Bytes are memoryviews, devices are texts ("cuda:0").
    Raises UserError if the file asks for anything else (it names what), is damaged, or is no such file.
    """
    data = mapped(path)
    budget = Budget(str(path), copies=2 * len(data))

    def meaning(resolve: Resolve) -> Meanings:
        return Meanings(budget, resolve)

    first = bytes(data[:64])
    if first.startswith(b"PK\x03\x04"):
        return read_zip(data, budget, meaning)
    if not first.startswith(PICKLES):
        raise UserError(f"{path}: not a checkpoint of PyTorch: it looks like {looks_like(first)}")
    machine = Machine(data, meaning(no_storage), budget)
    value = machine.run()
    return read_legacy(data, budget, meaning) if type(value) is int and value == MAGIC else value


def mapped(path: Path) -> memoryview:
    """The file's bytes, read when they are looked at. What is written to them stays in memory."""
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise UserError(f"{path}: the file is empty")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def looks_like(first: bytes) -> str:
    for begin, name in KNOWN.items():
        if first.startswith(begin):
            return name
    if len(first) > 9 and first[8:10] == b'{"':
        return "safetensors; give it to onejump as it is"
    if all(byte in string.printable.encode() for byte in first):
        return f"a text that begins with {printable(first.decode())[:40]!r}"
    return f"data that begins with {first[:8].hex(' ')}"
