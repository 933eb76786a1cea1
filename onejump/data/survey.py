"""One pass over a set too large for memory: its shape, what is damaged, its fingerprint; kept in a small file."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from onejump.types import UserError

VERSION = 1  # of the file; another one is made again
AT_ONCE = 256  # samples that are looked at together


@dataclass(frozen=True)
class Survey:
    """What the pass found. `bad`: why, by the name of what cannot be read; the rest are the set, in its order."""

    shape: tuple[int, ...]
    fingerprint: str
    bad: dict[str, str]
    mean: tuple[float, ...] = ()  # per channel, of latents
    std: tuple[float, ...] = ()


def cache_folder() -> Path:
    """Where surveys are kept: $XDG_CACHE_HOME/onejump/surveys, by default below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onejump" / "surveys"


def kept(path: Path, how: str, make: Callable[[], Survey], folder: Path | None = None) -> Survey:
    """make(), or what it gave the last time for the same files: sizes and times of change, and `how` they are read.

    A file that cannot be read or written costs the pass, nothing else.
    """
    key = sha256(f"{VERSION} {how} {state_of(path)}".encode()).hexdigest()
    place = (folder or cache_folder()) / f"{key[:32]}.json"
    try:
        found = json.loads(place.read_bytes())
        return Survey(**{f.name: _tuple(found[f.name]) for f in fields(Survey)})
    except (OSError, ValueError, KeyError, TypeError):
        survey = make()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(survey)))
        partial.replace(place)
    except OSError:
        pass
    return survey


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def state_of(path: Path) -> str:
    """A hash of the names, sizes and times of change of the file, or of every file below the folder."""
    digest = sha256(str(path.resolve()).encode("utf-8", "surrogateescape"))
    path = path if path.exists() else path.parent  # of shards that a pattern names
    files = [path] if path.is_file() else sorted(_files(path, set()))
    for file in files:
        status = file.stat()
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _files(folder: Path, seen: set[str]) -> Iterator[Path]:
    """Links are followed, circles are not."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(Path(entry.path), seen)
            elif entry.is_file():
                yield Path(entry.path)


def looked_at(
    make: Callable[[int], np.ndarray], numbers: Iterable[int], skip_bad: bool, threads: int
) -> Iterator[tuple[int, np.ndarray | UserError]]:
    """(i, sample i, or why it cannot be made), in the order of `numbers`; a little ahead, in threads.

    Without `skip_bad` the first that cannot be made raises.
    """

    def look(i: int) -> tuple[int, np.ndarray | UserError]:
        try:
            return i, make(i)
        except UserError as error:
            if not skip_bad:
                raise
            return i, error

    rest = iter(numbers)
    with ThreadPoolExecutor(threads) as pool:
        ahead = pool.map(look, list(islice(rest, AT_ONCE)))
        while some := list(islice(rest, AT_ONCE)):
            here, ahead = ahead, pool.map(look, some)
            yield from here
        yield from ahead
