"""torch's format since 1.6: a zip archive whose members are stored as they are: its tensors are views of the file."""

import io
import re
import struct
import zipfile
from collections.abc import Callable

from onejump.importers.foreign_tensors import Resolve, Storage, StorageId, check_byte_order
from onejump.importers.inert import Budget, Meaning, printable
from onejump.importers.pickle_machine import Machine
from onejump.types import UserError

MAX_MEMBERS = 100_000
MAX_DIRECTORY = 8 << 20  # bytes of the archive's table of contents
LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # signature, version, flags, method, time, date, checksum, sizes, lengths
ENCRYPTED = 1


class Opened(io.RawIOBase):
    """The mapped file, as zipfile reads it: never much at once."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(offset + (0, self.at, len(self.data))[whence], 0)
        return self.at

    def tell(self) -> int:
        return self.at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        size = len(self.data) if size is None or size < 0 else size
        content = self.data[self.at : self.at + size]
        if len(content) > MAX_DIRECTORY:
            raise ValueError("its table of contents is too large")
        self.at += len(content)
        return bytes(content)


def read_zip(data: memoryview, budget: Budget, meaning: Callable[[Resolve], Meaning]) -> object:
    """The value in ROOT/data.pkl, its storages in ROOT/data/KEY. `meaning` makes its meaning from what finds a storage.

    Raises UserError if a member is compressed, lies outside the file, or has a name that is no plain path.
    """
    file = budget.file
    try:
        infos = directory(data)
        script = any(re.fullmatch(r"[^/]*/(constants\.pkl|code/.*)", info.orig_filename) for info in infos)
        members = {} if script else contents(data, infos)
    except Exception as error:  # zipfile raises many kinds for a damaged archive
        raise UserError(f"{file}: not a readable torch file ({printable(error)}); download it again") from error
    if script:
        raise UserError(f"{file}: a TorchScript archive, whose network is code; save its state_dict() by torch.save")
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise UserError(f"{file}: a zip archive, but not of torch.save (it needs one data.pkl)")
    root = roots[0]
    order = members.get(f"{root}byteorder")
    check_byte_order(file, "little" if order is None else bytes(order[:16]).decode("ascii", "replace"))

    def resolve(identity: StorageId) -> Storage:
        found = members.get(f"{root}data/{identity.key}")
        if found is None:
            raise ValueError(f"storage {printable(identity.key)} is not in the archive")
        return identity.of(found)

    return Machine(members[f"{root}data.pkl"], meaning(resolve), budget).run()


def directory(data: memoryview) -> list[zipfile.ZipInfo]:
    """The table of contents. Raises ValueError, or what zipfile raises, if there is none."""
    with zipfile.ZipFile(Opened(data)) as archive:
        infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise ValueError(f"it has more than {MAX_MEMBERS:,} members")
    return infos


def contents(data: memoryview, infos: list[zipfile.ZipInfo]) -> dict[str, memoryview]:
    """The bytes of every member. Raises ValueError if they are not plainly stored."""
    members: dict[str, memoryview] = {}
    for info in infos:
        name = info.orig_filename
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or ".." in parts or "" in parts[:-1]:
            raise ValueError(f"the member {printable(name)} has no plain path")
        if name in members:
            raise ValueError(f"the member {printable(name)} is there twice")
        members[name] = stored(data, info)
    return members


def stored(data: memoryview, info: zipfile.ZipInfo) -> memoryview:
    """A member's bytes, where its own header says they begin."""
    name = printable(info.orig_filename)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ENCRYPTED or info.compress_size != info.file_size:
        raise ValueError(f"the member {name} is compressed or encrypted; torch stores it plainly")
    first = info.header_offset
    if not 0 <= first <= len(data) - LOCAL_HEADER.size:
        raise ValueError(f"the member {name} lies outside the file")
    signature, _, flags, method, *_, name_length, extra_length = LOCAL_HEADER.unpack_from(data, first)
    begin = first + LOCAL_HEADER.size
    own_name = bytes(data[begin : begin + name_length])
    encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
    if signature != b"PK\x03\x04" or method or flags & ENCRYPTED or own_name != info.orig_filename.encode(encoding):
        raise ValueError(f"the member {name} has a header of its own that differs")
    begin += name_length + extra_length
    if info.file_size > len(data) - begin:
        raise ValueError(f"the member {name} lies outside the file")
    return data[begin : begin + info.file_size]
