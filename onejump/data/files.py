"""Images in a folder, or in a zip: read without unpacking it."""

import os
import stat
import struct
import sys
import zlib
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from onejump.data.layout import parts_of, source_of
from onejump.data.source import MAX_ENTRY, Bad, Source, line, shown
from onejump.types import UserError

HEADER = 30  # bytes of a zip entry's own header before its name
SLACK = 64  # room for extra fields in it


def folder_source(path: Path, bad: Bad | None = None) -> Source:
    """Linked files and folders are followed, circles of them are not; what is no plain file cannot be read."""
    names, seen = [], set()
    for folder, subfolders, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up: do not walk in circles
            subfolders.clear()
            continue
        seen.add(real)
        below = Path(folder).relative_to(path).as_posix()
        names += files if below == "." else [f"{below}/{file}" for file in files]

    def read(name: str) -> bytes:
        with open(f"{path}/{name}", "rb", buffering=0, opener=_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{shown(name)} in {path} is no plain file: replace or remove it")
            check_size(found.st_size, name, path)
            return file.read()

    return source_of(path, names, read, bad)


def _at_once(file: str, flags: int) -> int:
    """A pipe would wait for ever to be opened."""
    return os.open(file, flags | getattr(os, "O_NONBLOCK", 0))


def zip_source(path: Path, bad: Bad | None = None) -> Source:
    """Refuses a zip with absolute names or names with "..", although nothing is unpacked: it is not what it seems."""
    try:
        archive = ZipFile(path)
        infos = [info for info in archive.infolist() if not info.is_dir()]
    except Exception as error:  # damaged lists of entries raise almost anything
        raise UserError(f"{path} is a damaged zip file ({line(error)}): download or copy it again") from error
    for info in infos:
        entry = info.filename.replace("\\", "/")
        parts = parts_of(entry)
        if entry.startswith("/") or ".." in parts or ":" in "".join(parts[:1]):
            told = f"entry {shown(info.filename)!r} points outside the zip"
            raise UserError(f"{path}: {told}; pack it again with relative names")

    def read(name: str) -> bytes:
        info = archive.getinfo(name)
        check_size(info.file_size, name, path)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(f"{shown(name)} in {path} is a link: pack the file itself")
        if info.compress_type == ZIP_STORED and not info.flag_bits & 1 and sys.platform != "win32":
            return _stored(archive, info)
        return archive.read(name)

    return source_of(path, [info.filename for info in infos], read, bad)


def check_size(size: int, name: str, path: Path) -> None:
    if size > MAX_ENTRY:
        limit = f"the limit is {MAX_ENTRY >> 20} MB"
        raise UserError(f"{shown(name)} in {path} unpacks to {size >> 20} MB; {limit}: remove it")


def _stored(archive: ZipFile, info: ZipInfo) -> bytes:
    """An entry that is not compressed, in one read of the file that other threads need not wait for."""
    assert archive.fp is not None
    file, room = archive.fp.fileno(), HEADER + len(info.orig_filename.encode()) + SLACK
    head = os.pread(file, room + info.file_size, info.header_offset)
    if head[:4] != b"PK\3\4":
        raise BadZipFile("no entry where the list of entries has one")
    start = HEADER + sum(struct.unpack_from("<HH", head, 26))
    data = head[start : start + info.file_size]
    if start > room:
        data = os.pread(file, info.file_size, info.header_offset + start)
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise BadZipFile("damaged: the checksum is wrong")
    return data
