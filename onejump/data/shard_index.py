"""Where each image of tar shards lies, with its label and its caption: found once, and kept in a cache folder."""

import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from onejump.data.source import MAX_LABEL, SUFFIXES, line, shown
from onejump.types import UserError

BESIDE = (".cls", ".txt", ".json")
LABEL_KEYS = ("label", "cls")  # of a .json
NO_LABEL, BAD_LABEL = -1, -2
MAX_TEXT = 2**20  # bytes of a label or a caption
FORGET = 1000  # members after which tarfile's own list of them is emptied
VERSION = 2  # of the kept index
COLUMNS = ("shard", "start", "size", "label", "text_start", "text_size", "in_json")
ROW = np.dtype([(name, "<i8") for name in COLUMNS])

BLOCK, CHUNK = 512, 2**20  # bytes of a header, and read at once

Place = tuple[int, int]  # first byte and number of bytes


@dataclass(frozen=True)
class Index:
    """A row of numbers (COLUMNS) for each image; `problems` says why names in it (or whole shards) cannot be used."""

    names: list[str]
    rows: np.ndarray
    problems: dict[str, str]


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/onejump/shards, by default below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onejump" / "shards"


def index_of(shards: list[Path], cache: Path) -> Index:
    """From the cache if the shards have the sizes and times of change that they had, else from their headers."""
    found = [(str(shard.resolve()), shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    kept = cache / f"{sha256(json.dumps([VERSION, found]).encode()).hexdigest()[:32]}.npz"
    index = _load(kept)
    if index is None:
        index = _build(shards)
        _save(index, kept)
    return index


def read_at(file: Path, start: int, size: int) -> bytes:
    with open(file, "rb", buffering=0) as stream:
        stream.seek(start)
        data = stream.read(size)
    if len(data) != size:
        raise UserError(f"{file} has become shorter: copy it again")
    return data


def _load(kept: Path) -> Index | None:
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            names = arrays["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
            index = Index(names, arrays["rows"], json.loads(arrays["problems"].tobytes()))
    except Exception:  # not there, or damaged: it is made again
        return None
    return index if index.rows.dtype == ROW and len(index.rows) == len(names) else None


def _save(index: Index, kept: Path) -> None:
    """Whole or not at all; a cache that cannot be written costs time only."""
    part = kept.with_name(f"{kept.stem}.{os.getpid()}.part")
    names = "".join(f"{name}\0" for name in index.names).encode("utf-8", "surrogateescape")
    problems = json.dumps(index.problems).encode()
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as stream:
            texts = np.frombuffer(names, np.uint8), np.frombuffer(problems, np.uint8)
            np.savez(stream, rows=index.rows, names=texts[0], problems=texts[1])
        os.replace(part, kept)
    except OSError:
        with suppress(OSError):
            part.unlink()


def _build(shards: list[Path]) -> Index:
    names: list[str] = []
    rows: list[tuple[int, ...]] = []
    problems: dict[str, str] = {}
    common = os.path.commonpath([shard.absolute().parent for shard in shards])
    for number, shard in enumerate(shards):
        name = Path(os.path.relpath(shard.absolute(), common)).with_suffix("").as_posix()
        samples: dict[str, dict[str, Place]] = {}
        twice: dict[str, str] = {}
        for member, place in _members(shard, name + shard.suffix, problems):
            key, kind = _split(member)
            kinds = samples.setdefault(key, {}) if kind in (*SUFFIXES, *BESIDE) else {}
            if kind in kinds or (kind in SUFFIXES and any(suffix in kinds for suffix in SUFFIXES)):
                twice[key] = kind
            kinds.setdefault(kind, place)
        for key in sorted(samples):
            image = next((kind for kind in samples[key] if kind in SUFFIXES), None)
            if image is not None:
                names.append(f"{name}/{key}{image}")
                if key in twice:
                    problems[names[-1]] = f"is not the only one of its key (a second {twice[key]}): leave one"
                rows.append((number, *samples[key][image], *_beside(shard, samples[key], names[-1], problems)))
    return Index(names, np.array(rows, ROW), problems)


def _split(member: str) -> tuple[str, str]:
    """A member's key and what it holds of it: everything after the first dot of its file name."""
    folder, _, file = member.rpartition("/")
    stem, dot, rest = file.partition(".")
    return f"{folder}/{stem}" if folder else stem, (dot + rest).lower()


def _members(shard: Path, name: str, problems: dict[str, str]) -> Iterator[tuple[str, Place]]:
    """Names and places of the plain files of a tar, without one whose end is not there any more."""
    end, whole = 0, shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            for count, member in enumerate(archive):
                entry = PurePosixPath(member.name)
                if entry.is_absolute() or ".." in entry.parts:
                    told = f"entry {shown(member.name)!r} points outside"
                    raise UserError(f"{shard}: {told}; pack it with relative names")
                plain = member.isreg() and not member.issparse() and not entry.name.startswith(".")
                if plain and member.offset_data + member.size <= whole:
                    yield entry.as_posix(), (member.offset_data, member.size)
                if count % FORGET == 0:
                    archive.members.clear()  # type: ignore[attr-defined]
            end = archive.offset
        if wrong := _wrong_with_end(shard, end):
            problems[name] = f"{wrong}: download or copy it again"
    except UserError:
        raise
    except Exception as error:
        packed = " (if it is compressed, unpack it to .tar first)" if not end else ""
        problems[name] = f"is a damaged tar file ({line(error)}): download or copy it again{packed}"


def _wrong_with_end(shard: Path, end: int) -> str:
    """What `tarfile` lets pass: it takes a broken or empty header, and the end of a file that was cut, for the end.

    A whole tar ends with two blocks of zeros (one will do here), and holds nothing but zeros from there on.
    """
    with open(shard, "rb", buffering=0) as stream:
        stream.seek(end)
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            return f"is cut off at byte {end:,}, where its mark of the end, or more images, would be"
        if any(block):
            return f"is damaged at byte {end:,}, and ends there"
        while chunk := stream.read(CHUNK):
            if chunk.strip(b"\0"):
                return f"is damaged at byte {end:,}: a header is empty, and more follows it"
    return ""


def _beside(shard: Path, kinds: dict[str, Place], name: str, problems: dict[str, str]) -> tuple[int, ...]:
    """label, text_start, text_size, in_json of a sample."""
    large = [kind for kind in BESIDE if kind in kinds and kinds[kind][1] > MAX_TEXT]
    if large:
        problems[name] = f"has a {large[0]} of {kinds[large[0]][1] >> 20} MB beside it: shorten it"
        return BAD_LABEL, 0, 0, 0
    text = next((kind for kind in (".txt", ".json") if kind in kinds), None)
    caption = (*kinds[text], int(text == ".json")) if text else (0, 0, 0)
    try:
        if ".cls" in kinds:
            label: Any = int(read_at(shard, *kinds[".cls"]))
        elif ".json" in kinds:
            content = json.loads(read_at(shard, *kinds[".json"]))
            label = next((content[key] for key in LABEL_KEYS if key in content), NO_LABEL)
        else:
            return NO_LABEL, *caption
    except (ValueError, TypeError, RecursionError) as error:
        problems[name] = f"has a damaged {'.cls' if '.cls' in kinds else '.json'} beside it ({shown(line(error))})"
        return BAD_LABEL, *caption
    if type(label) is not int or not NO_LABEL <= label < MAX_LABEL or (label == NO_LABEL and ".cls" in kinds):
        problems[name] = f"has the label {shown(str(label)[:40])}; a class is a whole number from 0 on"
        return BAD_LABEL, *caption
    return label, *caption
