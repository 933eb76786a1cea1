"""CIFAR-10 and CIFAR-100 as their authors distribute them: binary or Python batches, in a folder or as the .tar.gz."""

import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from onejump.data.arrays import image_set
from onejump.data.batch_pickle import read_batch
from onejump.data.image_set import ImageSet
from onejump.data.source import MAX_ENTRY, line
from onejump.types import UserError

PIXELS = 3 * 32 * 32
MAX_MEMBERS = 1000

Read = Callable[[str], bytes]


@dataclass(frozen=True)
class Layout:
    """One of the distributions: the files of the training images, the number of classes, and where their names are.

    `label_bytes` before the pixels of a binary record (the last is the class), or the Python dict's `label_key`.
    """

    name: str
    files: tuple[str, ...]
    classes: int
    names_file: str
    label_bytes: int = 0
    label_key: str = ""
    names_key: str = ""


FIVE = tuple(f"data_batch_{k}" for k in range(1, 6))
LAYOUTS = (
    Layout("cifar10", tuple(f"{file}.bin" for file in FIVE), 10, "batches.meta.txt", label_bytes=1),
    Layout("cifar10", FIVE, 10, "batches.meta", label_key="labels", names_key="label_names"),
    Layout("cifar100", ("train.bin",), 100, "fine_label_names.txt", label_bytes=2),
    Layout("cifar100", ("train",), 100, "meta", label_key="fine_labels", names_key="fine_label_names"),
)


def layout_of(names: set[str]) -> Layout | None:
    """The distribution that files of these names are of. CIFAR-100's names are common: its list of classes decides."""
    for layout in LAYOUTS:
        if names & set(layout.files) and (len(layout.files) > 1 or layout.names_file in names):
            return layout
    return None


def cifar_folder(path: Path) -> ImageSet | None:
    """The training images in a folder, or in the single folder inside it; None if it is something else."""
    for folder in (path, *_single_folder(path)):
        names = {file.name for file in folder.iterdir() if file.is_file()}
        layout = layout_of(names)
        if layout is not None:
            return _read(path, layout, names, lambda name, folder=folder: _file(folder / name))  # type: ignore[misc]
    return None


def binary_file(path: Path) -> ImageSet:
    """One binary batch, such as test_batch.bin: of CIFAR-100 if the names of its classes lie beside it."""
    hundred = (path.parent / LAYOUTS[2].names_file).is_file()
    layout = replace(LAYOUTS[2 if hundred else 0], files=(path.name,))
    names = {path.name, *(file.name for file in path.parent.iterdir())}
    return _read(path, layout, names, lambda name: _file(path.parent / name))


def cifar_tar(path: Path) -> ImageSet | None:
    """The training images in cifar-10-binary.tar.gz and the like, held in memory; None if it is something else."""
    wanted = {name for layout in LAYOUTS for name in (*layout.files, layout.names_file)}
    held: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for count, member in enumerate(archive):
                if count >= MAX_MEMBERS or member.size > MAX_ENTRY:
                    return None
                name = PurePosixPath(member.name).name
                if member.isreg() and name in wanted:
                    stream = archive.extractfile(member)
                    assert stream is not None
                    held[name] = stream.read()
            assert archive.fileobj is not None
            while archive.fileobj.read(2**20):  # to the end, where the checksum of a .gz is compared
                pass
    except Exception as error:  # damaged archives raise almost anything
        if layout_of(set(held)) is None:
            return None
        raise UserError(f"{path} is damaged ({line(error)}): download or copy it again") from error
    layout = layout_of(set(held))
    return None if layout is None else _read(path, layout, set(held), held.__getitem__)


def _single_folder(path: Path) -> list[Path]:
    inside = [item for item in path.iterdir() if item.is_dir() and not item.name.startswith(".")]
    return inside if len(inside) == 1 else []


def _file(file: Path) -> bytes:
    if file.stat().st_size > MAX_ENTRY:
        raise UserError(f"{file} is larger than any file of CIFAR: download it again")
    return file.read_bytes()


def _read(path: Path, layout: Layout, names: set[str], read: Read) -> ImageSet:
    missing = [file for file in layout.files if file not in names]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing beside the other parts of {layout.name}: download it again")
    decode = _binary if layout.label_bytes else _python
    parts = [decode(read(file), layout, f"{file} in {path}") for file in layout.files]
    short = min(range(len(parts)), key=lambda k: len(parts[k][1]))
    if len({len(labels) for _, labels in parts}) > 1:
        raise UserError(f"{layout.files[short]} in {path} holds fewer images than the others: download it again")
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    class_names = _class_names(layout, read, path) if layout.names_file in names else None
    found = image_set(path, images, labels, class_names or tuple(map(str, range(layout.classes))))
    return ImageSet(layout.name, found.images, found.labels, found.class_names)


def _binary(data: bytes, layout: Layout, where: str) -> tuple[np.ndarray, np.ndarray]:
    record = layout.label_bytes + PIXELS
    if not data or len(data) % record:
        raise UserError(f"{where} is not whole: {len(data):,} bytes, not records of {record:,}; download it again")
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    labels = records[:, layout.label_bytes - 1].astype(np.int64)
    _check(labels, layout, where)
    return records[:, layout.label_bytes :].reshape(-1, 3, 32, 32), labels


def _python(data: bytes, layout: Layout, where: str) -> tuple[np.ndarray, np.ndarray]:
    content = read_batch(data, where)
    images, labels = content.get("data"), content.get(layout.label_key)
    images = images if isinstance(images, np.ndarray) and images.shape[1:] == (PIXELS,) else np.empty(0, np.uint8)
    if not len(images) or not isinstance(labels, list) or len(labels) != len(images):
        raise UserError(f"{where} does not hold images of 3 x 32 x 32 bytes with labels: download it again")
    if not all(type(label) is int for label in labels):
        raise UserError(f"{where} holds labels that are no whole numbers: download it again")
    classes = np.array(labels, np.int64)
    _check(classes, layout, where)
    return images.reshape(-1, 3, 32, 32), classes


def _check(labels: np.ndarray, layout: Layout, where: str) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= layout.classes))
    if len(wrong):
        told = f"image {wrong[0]} of {where} has the label {labels[wrong[0]]}"
        raise UserError(f"{told}; {layout.name} has 0 to {layout.classes - 1}: download it again")


def _class_names(layout: Layout, read: Read, path: Path) -> tuple[str, ...] | None:
    """From the distribution's own list; None if that is not what it should be."""
    where = f"{layout.names_file} in {path}"
    if layout.label_bytes:
        names = read(layout.names_file).decode("utf-8", "replace").split()
    else:
        found = read_batch(read(layout.names_file), where).get(layout.names_key)
        names = [str(name) for name in found] if isinstance(found, list) else []
    return tuple(names) if len(names) == layout.classes else None
