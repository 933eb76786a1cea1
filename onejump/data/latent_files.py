"""Where latents lie: .npy files in a folder or a zip, one latent each, or one large array that is mapped."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import numpy as np

from onejump.data.arrays import HEADERS, MAX_HEADER
from onejump.data.feeder import DiskError
from onejump.data.layout import LABELS, labelled_by_file, labelled_by_folders
from onejump.data.source import MAX_LABEL, SUFFIXES, Source, line, numbered, shown, telling
from onejump.types import UserError

MOMENTS = "mean-std"  # in the names of files with twice the channels: means, then deviations (EDM2's)
MEAN, STD = "-mean.npy", "-std.npy"  # ends of the names of two files for one latent


@dataclass(frozen=True)
class LatentFiles:
    """get(i): latent i as stored, float32 [c, h, w], with `moments` the deviations after the means."""

    path: Path
    names: list[str]
    get: Callable[[int], np.ndarray]
    moments: bool
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...]


def is_latents(path: Path) -> bool:
    """Whether a file holds an array of floats with four axes, or a folder or zip .npy files and no images.

    Not a folder with images.npy, which is an array of images with its labels beside it. Raises UserError for a zip
    that is damaged.
    """
    if path.suffix.lower() == ".npy" and path.is_file():
        try:
            array = _mapped(path)
        except UserError:
            return False
        return array.dtype.kind == "f" and array.ndim == 4
    if (path / "images.npy").is_file():
        return False
    names = _names(path)
    return any(name.endswith(".npy") for name in names) and not any(n.lower().endswith(SUFFIXES) for n in names)


def latent_files(path: Path) -> LatentFiles:
    """Raises UserError for what is missing or ambiguous; the latents themselves are not read."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    return _of_array(path) if path.suffix.lower() == ".npy" else _of_files(path)


def _names(path: Path) -> list[str]:
    """Files in a folder or zip, relative, without hidden ones."""
    names: list[str] = []
    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    elif path.is_file() and path.suffix.lower() != ".npz" and is_zipfile(path):
        names = _entries(path)
    return sorted(name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))


def _entries(path: Path) -> list[str]:
    try:
        with ZipFile(path) as archive:
            return [info.filename for info in archive.infolist() if not info.is_dir()]
    except Exception as error:  # damaged lists of entries raise almost anything
        raise UserError(f"{path} is a damaged zip file ({line(error)}): download or copy it again") from error


def _of_files(path: Path) -> LatentFiles:
    files = _names(path)
    read = _reader(path)
    arrays = [name for name in files if name.endswith(".npy")]
    means = [name for name in arrays if name.endswith(MEAN)]
    names = means or arrays
    if means and sorted(_partner(name) for name in means) != [name for name in arrays if name not in means]:
        raise UserError(f"{path}: each latent needs NAME{MEAN} and NAME{STD}, and nothing else may lie beside them")
    if len(names) < 2:
        raise UserError(f"{path}: {len(names)} latents (.npy) found; at least 2 are needed")
    source = Source(path, names, telling(read, path))
    source = labelled_by_file(source, None) if LABELS in files else labelled_by_folders(source)
    moments = [MOMENTS in name.rsplit("/", 1)[-1] for name in names]
    if any(moments) and not all(moments):
        raise UserError(f"{path}: {shown(names[moments.index(False)])} has no {MOMENTS} in its name, others have")

    def get(i: int) -> np.ndarray:
        name = source.names[i]
        latent = _parsed(source, name)
        return np.concatenate([latent, _parsed(source, _partner(name))]) if means else latent

    return LatentFiles(path, names, get, bool(means) or moments[0], source.labels, source.class_names)


def _reader(path: Path) -> Callable[[str], bytes]:
    if path.is_dir():
        return lambda name: (path / name).read_bytes()
    archive = ZipFile(path)
    return archive.read


def _partner(name: str) -> str:
    return name.removesuffix(MEAN) + STD


def _parsed(source: Source, name: str) -> np.ndarray:
    """float32 [c, h, w] of one file."""
    try:
        data = source.read(name)
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise DiskError(str(error)) from error
        raise
    where = f"{shown(name)} in {source.path}"
    try:
        with HEADERS:
            array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False, max_header_size=MAX_HEADER)
    except Exception as error:
        raise UserError(f"{where} cannot be read ({line(error)}): replace or remove it") from error
    if array.dtype.kind != "f" or array.ndim != 3:
        raise UserError(f"{where} holds {array.dtype} {list(array.shape)}; floats [c, h, w] are needed")
    return array.astype(np.float32)


def _of_array(path: Path) -> LatentFiles:
    array, stem = _mapped(path), path.stem
    if array.dtype.kind != "f" or array.ndim != 4 or len(array) < 2:
        raise UserError(f"{path}: floats [n, c, h, w] are needed, 2 or more, not {array.dtype} {list(array.shape)}")
    file, labels = path.with_name(f"{stem}_labels.npy"), None
    if file.exists():
        found = _mapped(file)
        whole = found.dtype.kind in "iu" and found.shape == (len(array),)
        if not whole or found.min() < 0 or found.max() >= MAX_LABEL:
            told = f"a class from 0 to {MAX_LABEL - 1:,} for each of the {len(array)} latents is needed"
            raise UserError(f"{file}: {told}, as whole numbers [n]")
        labels = tuple(found.tolist())
    names = [f"latent {i}" for i in range(len(array))]
    class_names = () if labels is None else numbered(labels)
    return LatentFiles(path, names, lambda i: array[i].astype(np.float32), MOMENTS in stem, labels, class_names)


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=MAX_HEADER)
    except Exception as error:
        raise UserError(f"{path} cannot be read ({line(error)}): download or copy it again") from error
