"""MNIST's idx files: images, and the labels that lie beside them."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from onejump.data.arrays import image_set
from onejump.data.image_set import ImageSet
from onejump.data.source import line
from onejump.types import UserError

IMAGES, LABELS = b"\0\0\x08\x03", b"\0\0\x08\x01"  # unsigned bytes with 3 axes, with 1
MAX_BYTES = 2**32


def idx_files(path: Path) -> list[Path]:
    """The files of images in a folder."""
    return sorted(file for file in path.iterdir() if is_idx_images(file))


def is_idx_images(path: Path) -> bool:
    return "images" in path.name and "idx3" in path.name and path.is_file()


def idx_folder(path: Path, found: list[Path]) -> ImageSet:
    """The training images of a folder with several files of images."""
    train = [file for file in found if "train" in file.name] or found
    if len(train) > 1:
        raise UserError(f"{path}: {', '.join(file.name for file in train[:5])} could all be meant; name one of them")
    return idx_set(train[0])


def idx_set(path: Path) -> ImageSet:
    """...images-idx3-ubyte[.gz] (a "." for the "-" is fine too), with ...labels-idx1-ubyte[.gz] if it is there."""
    images = _array(path, IMAGES, "images")
    stem = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    file = next((path.with_name(stem + end) for end in ("", ".gz") if path.with_name(stem + end).exists()), None)
    return image_set(path, images[:, None], None if file is None else _array(file, LABELS, "labels"))


def _array(path: Path, magic: bytes, what: str) -> np.ndarray:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            with gzip.open(path) as stream:
                head = stream.read(4 + 4 * magic[3])
                data = head + stream.read(min(_size(head, magic[3]), MAX_BYTES) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({line(error)}): download or copy it again") from error
    axes = magic[3]
    start = 4 + 4 * axes
    if data[:4] != magic or len(data) != start + _size(data[:start], axes):
        raise UserError(f"{path} is not an idx file of {what}, or not whole: download or copy it again")
    shape = np.frombuffer(data, ">u4", axes, 4).tolist()
    if not np.prod(shape):
        raise UserError(f"{path}: no {what}")
    return np.frombuffer(bytearray(data[start:]), np.uint8).reshape(shape)


def _size(head: bytes, axes: int) -> int:
    """Bytes that a header of so many axes announces."""
    return int(np.prod(np.frombuffer(head[4 : 4 + 4 * (len(head) // 4 - 1)], ">u4").astype(object)))
