"""Encoded images at rest: what every reader hands on, and how what is bad in it is refused or left out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onejump.types import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MAX_ENTRY = 256 * 2**20  # bytes of one encoded image or entry
MAX_LABEL = 1_000_000

Bad = dict[str, str]  # the name of what is left out -> the line that says why


class DiskError(UserError):
    """The file may be good, but the disk or the network it lies on cannot be read: nothing to skip."""


@dataclass(frozen=True)
class Source:
    """Encoded images somewhere. `read` is thread-safe and raises UserError for whatever it cannot read."""

    path: Path
    names: list[str]  # in the set's order
    read: Callable[[str], bytes]
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    caption: Callable[[str], str] | None = None  # the text beside an image


def leave_out(bad: Bad | None, name: str, error: UserError) -> None:
    """Notes why an image is left out, or raises where nothing is to be left out (`bad` is None)."""
    if bad is None:
        raise error
    bad.setdefault(name, str(error))


def shown(name: str) -> str:
    """A file's name as it can be printed in one line, whatever bytes it holds."""
    text = name.encode("utf-8", "replace").decode()
    return text if text.isprintable() else ascii(text)[1:-1]


def line(error: Exception) -> str:
    """The first line of an error's message; of the system's, without number and path."""
    text = error.strerror if isinstance(error, OSError) else None
    return ((text or str(error) or type(error).__name__).splitlines() or [""])[0]


def telling(read: Callable[[str], bytes], path: Path) -> Callable[[str], bytes]:
    """`read` with every way in which it can fail told as one line that names the file."""

    def told(name: str) -> bytes:
        try:
            return read(name)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # damaged archives raise almost anything
            why = f"{shown(name)} in {path} cannot be read ({line(error)}): replace or remove it"
            raise (DiskError if isinstance(error, OSError) else UserError)(why) from error

    return told


def label_of(value: Any, name: str, where: str) -> int:
    """A class: a whole number from 0 on."""
    if type(value) is not int or not 0 <= value < MAX_LABEL:
        told = f"the label of {shown(name)} is {shown(str(value)[:40])}"
        raise UserError(f"{where}: {told}; a class is a whole number from 0 to {MAX_LABEL - 1:,}")
    return value


def numbered(labels: tuple[int, ...] | list[int]) -> tuple[str, ...]:
    """Names for classes that have none: "0", "1", ... up to the largest label."""
    return tuple(str(i) for i in range(max(labels) + 1)) if labels else ()
