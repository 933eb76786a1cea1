"""Sets that come as arrays: .npz and .npy files, and what every reader of arrays checks."""

import os
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onejump.data.decode import Decoding
from onejump.data.image_set import ImageSet
from onejump.data.source import MAX_LABEL, line, numbered
from onejump.types import UserError

ENDINGS = (".zip", ".npz", ".npy", ".tar", ".tar.gz", ".tgz", ".gz", ".bin")
MAPPED = 256 * 2**20  # bytes from which an array of a .npz stays in its file
MAX_HEADER = 10_000  # characters that describe an array
# numpy reads a header with Python's compiler, in which two threads trip over each other (3.11)
HEADERS = threading.Lock()


def name_of(path: Path) -> str:
    """A set's name: its file's without the ending."""
    name = Path(os.path.abspath(path)).name
    for ending in ENDINGS:
        if name.lower().endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)]
    return name


def image_set(path: Path, images: np.ndarray, labels: np.ndarray | None, class_names: tuple[str, ...] = ()) -> ImageSet:
    """uint8 images [n, c, h, w] and labels [n], checked; large arrays stay where they are mapped from."""
    if labels is None:
        return ImageSet(name_of(path), torch.from_numpy(images))
    if len(labels) != len(images):
        raise UserError(f"{path}: {len(labels):,} labels for {len(images):,} images")
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    most = len(class_names) or MAX_LABEL
    if low < 0 or high >= most:
        at = int(labels.argmin() if low < 0 else labels.argmax())
        told = f"{path}: the label of image {at} is {labels[at]}"
        raise UserError(f"{told}; a class is a whole number from 0 to {most - 1:,}")
    names = class_names or numbered([high])
    return ImageSet(name_of(path), torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), names)


def fitted(images: ImageSet, how: Decoding) -> ImageSet:
    """Images of an array cropped and resized as encoded ones are; itself where nothing is to be done."""
    if how.size is None or images.shape[1:] == (how.size, how.size):
        return images
    made = np.empty((images.n, images.shape[0], how.size, how.size), np.uint8)
    for k, image in enumerate(images.images):
        made[k] = how.fit(image.permute(1, 2, 0).numpy()).transpose(2, 0, 1)
    return replace(images, images=torch.from_numpy(made))


# ------------------------------------------------------------------------------------------------------ .npz and .npy


def npz_set(path: Path) -> ImageSet:
    """The images are the array of bytes with 3 or 4 axes, the labels the array of whole numbers with one axis.

    Where there are several, those with "train" in their names. arr_0 and arr_1 of published samples are just that.
    """
    shapes = _headers(path)
    kinds = {
        "images": [name for name, (shape, kind) in shapes.items() if kind == np.uint8 and len(shape) in (3, 4)],
        "labels": [name for name, (shape, kind) in shapes.items() if kind.kind in "iu" and _a_row(shape)],
    }
    chosen = {what: _only(path, what, names) for what, names in kinds.items()}
    if chosen["images"] is None:
        found = ", ".join(f"{name} {kind} {list(shape)}" for name, (shape, kind) in shapes.items()) or "nothing"
        raise UserError(f"{path}: no array of images, uint8 [n, h, w, c] or [n, c, h, w] (found {found[:200]})")
    labels = None if chosen["labels"] is None else _read(path, chosen["labels"]).reshape(-1)
    if labels is not None and not len(labels):  # samples of a model without classes
        labels = None
    return image_set(path, channels_first(path, _read(path, chosen["images"])), labels)


def npy_set(path: Path) -> ImageSet:
    """One array of images, mapped; labels from NAME_labels.npy or, beside images.npy, labels.npy."""
    images = channels_first(path, _load(path))
    beside = [path.with_name(f"{path.stem}_labels.npy"), *([path.with_name("labels.npy")] * (path.stem == "images"))]
    file = next((file for file in beside if file.exists()), None)
    if file is None:
        return image_set(path, images, None)
    labels = _load(file)
    if labels.dtype.kind not in "iu" or not _a_row(labels.shape):
        raise UserError(f"{file}: whole numbers [n] are needed as labels, not {labels.dtype} {list(labels.shape)}")
    return image_set(path, images, labels.reshape(-1))


def channels_first(path: Path, images: np.ndarray) -> np.ndarray:
    """uint8 [n, h, w], [n, h, w, c] or [n, c, h, w] with 1 or 3 channels as [n, c, h, w]."""
    told = f"{path}: uint8 images [n, h, w, c] or [n, c, h, w] with 1 or 3 channels are needed, not"
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise UserError(f"{told} {images.dtype} {list(images.shape)}")
    if images.ndim == 3:
        return images[:, None]
    if images.shape[3] in (1, 3):
        return images.transpose(0, 3, 1, 2)
    if images.shape[1] not in (1, 3):
        raise UserError(f"{told} {list(images.shape)}")
    return images


def _a_row(shape: tuple[int, ...]) -> bool:
    return len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)


def _only(path: Path, what: str, names: list[str]) -> str | None:
    names = [name for name in names if "train" in name.lower()] or names
    if len(names) > 1:
        raise UserError(f"{path}: {', '.join(names[:5])} could all be the {what}; save one of them alone")
    return names[0] if names else None


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array of a .npz; of those that hold objects, nothing is read."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as stream:
                        shape, _, kind = _header(stream)
                    found[name.removesuffix(".npy")] = shape, kind
    except Exception as error:
        raise UserError(f"{path} cannot be read ({line(error)}): download or copy it again") from error
    return found


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream, max_header_size=MAX_HEADER)


def _read(path: Path, name: str) -> np.ndarray:
    """One array of a .npz: mapped if it is large and not compressed, else read into memory, its checksum compared."""
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as stream:
                shape, fortran, kind = _header(stream)
                start = stream.tell()
            if start + kind.itemsize * int(np.prod(shape, dtype=object)) != info.file_size:
                raise ValueError(f"{name} does not have the size that it says")
            if info.compress_type != zipfile.ZIP_STORED or fortran or info.file_size < MAPPED:
                with archive.open(info) as stream:
                    return np.lib.format.read_array(stream, allow_pickle=False, max_header_size=MAX_HEADER)
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)
            lengths = file.read(4)
        start += info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        return np.memmap(path, kind, "c", start, shape)
    except Exception as error:
        raise UserError(f"{path} cannot be read ({line(error)}): download or copy it again") from error


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False, max_header_size=MAX_HEADER)
    except Exception as error:
        raise UserError(f"{path} cannot be read ({line(error)}): download or copy it again") from error
