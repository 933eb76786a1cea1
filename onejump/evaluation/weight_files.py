"""Published weight files: found by name, checked by sha256, read without running anything that is in them."""

import io
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onejump.types import UserError

FOLDER_VARIABLE = "ONEJUMP_DETECTORS"
CACHE = Path("~/.cache/onejump/detectors")
LIST_BUILDERS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class WeightFile:
    """A published file. `where`: where it is usually found."""

    name: str
    size: int
    sha256: str
    where: str

    def __str__(self) -> str:
        return f"{self.name} ({self.size:,} bytes, sha256 {self.sha256}), usually found at {self.where}"


def detector_folder() -> Path:
    """$ONEJUMP_DETECTORS, or ~/.cache/onejump/detectors."""
    return Path(os.environ.get(FOLDER_VARIABLE) or CACHE).expanduser()


def find(detector: str, given: Path | None, names: tuple[str, ...], about: str, kind: str = "FILE") -> Path:
    """The file or folder `given`, or what has one of the names in it or in the detectors' folder.

    Raises UserError if there is none: `about` describes the first of the names, and says where it is found.
    """
    place = (given or detector_folder()).expanduser()
    if given and (place.is_file() or place.name in names and place.exists()):
        return place
    for name in names:
        if (place / name).exists():
            return place / name
    gone = given and not place.exists()
    fault = f"{given} does not exist" if gone else f"no weights for detector {detector}: not in {place}"
    folder = detector_folder() if gone else place
    ways_out = f"give --weights {kind}, or put {names[0]} into {folder}"
    raise UserError(f"{fault}; {ways_out}; where to get it: docs/detectors.md, that is {about}")


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file; read once as long as it does not change. Raises UserError if it cannot be read."""
    try:
        state = path.stat()
        return _sha256(path.absolute(), state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


@lru_cache(maxsize=32)
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def check_published(path: Path, files: tuple[WeightFile, ...]) -> None:
    """Raises UserError if a file has the name of a published one and other content."""
    for file in files:
        if path.name == file.name and (found := sha256_of(path)) != file.sha256:
            size = path.stat().st_size
            raise UserError(
                f"{path} has {size:,} bytes and sha256 {found}, not those of {file}: fetch it anew, or rename your own"
            )


def read_tensors(path: Path) -> Tensors:
    """All tensors of an .npz, a .safetensors, a state dict saved by torch, or a TorchScript archive, by their names.

    A state dict may lie under the key state_dict. Of an archive only the tensors are read; its code is not looked at.
    Raises UserError for anything else, for a damaged file, and for a file that asks for more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if not zipfile.is_zipfile(path):
            return _of_mapping(torch.load(path, map_location="cpu", weights_only=True))
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if all(name.endswith(".npy") for name in names):
            return _read_npz(path)
        if any(name.endswith("/constants.pkl") for name in names):
            return _read_torchscript(path)
        return _of_mapping(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        kind = type(error).__name__
        raise UserError(f"{path}: not a readable file of weights ({kind}), it may be damaged: fetch it anew") from error


def _of_mapping(content: object) -> Tensors:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not tensors by name")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _read_npz(path: Path) -> Tensors:
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


class Inert:
    """Stands for an object of a TorchScript archive: holds its attributes and does nothing."""


def _read_torchscript(path: Path) -> Tensors:
    """Tensors by their dotted path. Every class of the archive becomes `Inert`; torch refuses any other global."""
    plain = _without_code(path)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(plain)
    lists = {f"torch.jit._pickle.{name}" for name in LIST_BUILDERS}
    known: list[Any] = [(_inert(name), name) for name in names if name.startswith("__torch__.")]
    known += [(list, name) for name in lists.intersection(names)]
    plain.seek(0)
    with torch.serialization.safe_globals(known):
        root = torch.load(plain, map_location="cpu", weights_only=True)
    return dict(_tensors_under(root, ""))


def _inert(name: str) -> type:
    """A class of its own for each name, since torch wants every class named once."""
    return type(name.rpartition(".")[2], (Inert,), {})


def _without_code(path: Path) -> io.BytesIO:
    """The archive's data alone: without code and constants torch reads it like any file of torch.save."""
    plain = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(plain, "w") as copy:
        for info in archive.infolist():
            if info.filename.split("/")[1:2] in (["code"], ["constants.pkl"], ["constants"]):
                continue
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError("compressed tensors")
            copy.writestr(info.filename, archive.read(info))
    plain.seek(0)
    return plain


def _tensors_under(value: object, prefix: str) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for name, inside in vars(value).items() if isinstance(value, Inert) else ():
        if isinstance(inside, Tensor):
            found.append((f"{prefix}{name}", inside))
        found += _tensors_under(inside, f"{prefix}{name}.")
    return found
