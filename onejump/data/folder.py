"""Images from a folder or a zip: plain, one sub-folder a class, or PNGs beside a `dataset.json` (EDM's layout)."""

import io
import json
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from onejump.data.image_set import ImageSet
from onejump.types import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # a decoder is chosen by content: no others, whatever the suffix
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B")
MAX_ENTRY = 256 * 2**20  # bytes of one unpacked zip entry
MAX_LABEL = 1_000_000
LABELS = "dataset.json"
THREADS = 4


@dataclass(frozen=True)
class Source:
    """Where the images lie: their names (sorted, relative, with "/") and how the bytes of one are read."""

    path: Path
    names: list[str]
    read: Callable[[str], bytes]
    labels: str | None  # the name of the EDM label file


def load_images(path: str | Path, size: int | None = None) -> ImageSet:
    """Reads a folder or zip of png, jpg, webp, bmp and gif (first frame) images into memory.

    Images directly inside are unlabelled; one sub-folder a class labels them (classes in sorted order); a
    `dataset.json` holding {"labels": [[file, class], ...] or null} decides where it exists. A single folder around
    everything is looked through. Other files and hidden ones are ignored. Order: sorted by name.

    All grey: one channel, else RGB. Transparency is laid on white, 16 bits become 8, EXIF orientation is applied.
    With `size` each image is cropped to its central square and resized (Lanczos, antialiased); without, all must
    share one size. Raises UserError for anything missing, damaged, unsafe or ambiguous.
    """
    if size is not None and size < 1:
        raise UserError(f"--size {size}: the side of the images in pixels, 1 or more")
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such folder or zip file")
    if path.is_dir():
        return _load(_folder(path), size)
    if not is_zipfile(path):
        why = "a damaged zip file (download or copy it again)" if path.suffix.lower() == ".zip" else "a file"
        raise UserError(f"{path} is {why}, not a folder of images or a zip of images")
    try:
        with ZipFile(path) as archive:
            return _load(_zip(path, archive), size)
    except BadZipFile as error:
        raise UserError(f"{path} is a damaged zip file ({_line(error)}): download or copy it again") from error


def _load(source: Source, size: int | None) -> ImageSet:
    if len(source.names) < 2:
        kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
        found = f"only one image ({source.names[0]})" if source.names else f"no images found (looked for {kinds})"
        raise UserError(f"{source.path}: {found}; at least 2 are needed")
    labels, class_names = _labels_of_file(source) if source.labels else _labels_of_folders(source)
    images = torch.from_numpy(_decode_all(source, size))
    name = Path(os.path.abspath(source.path)).name.removesuffix(".zip")
    return ImageSet(name, images, None if labels is None else torch.tensor(labels), class_names)


# ---------------------------------------------------------------------------------------------------- where they lie


def _folder(path: Path) -> Source:
    names, seen = [], set()
    for folder, subfolders, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up: do not walk in circles
            subfolders.clear()
            continue
        seen.add(real)
        names += [(Path(folder) / file).relative_to(path).as_posix() for file in files]
    return _source(path, names, lambda name: (path / name).read_bytes())


def _zip(path: Path, archive: ZipFile) -> Source:
    for name in archive.namelist():
        entry = PurePosixPath(name.replace("\\", "/"))
        if entry.is_absolute() or ".." in entry.parts or ":" in entry.parts[:1]:
            raise UserError(f"{path}: entry {name!r} points outside the zip; pack it again with relative names")
    names = [info.filename for info in archive.infolist() if not info.is_dir()]

    def read(name: str) -> bytes:
        if (bytes_ := archive.getinfo(name).file_size) > MAX_ENTRY:
            limit = f"the limit is {MAX_ENTRY >> 20} MB"
            raise UserError(f"{name} in {path} unpacks to {bytes_ >> 20} MB; {limit}: remove it from the zip")
        return archive.read(name)

    return _source(path, names, read)


def _source(path: Path, files: list[str], read: Callable[[str], bytes]) -> Source:
    """Keeps images and the label file, drops hidden files, and looks through a single folder around everything."""
    file_of = {PurePosixPath(file).parts: file for file in files}
    parts = [p for p in file_of if not any(part.startswith((".", "__MACOSX")) for part in p)]
    parts = [p for p in parts if p[-1].lower().endswith(SUFFIXES) or p[-1] == LABELS]
    depth = 0
    while parts and all(len(p) > depth + 1 and p[depth] == parts[0][depth] for p in parts):
        depth += 1
    original = {"/".join(p[depth:]): file_of[p] for p in parts}
    images = sorted(name for name in original if name.lower().endswith(SUFFIXES))
    return Source(path, images, lambda name: read(original[name]), LABELS if LABELS in original else None)


# ------------------------------------------------------------------------------------------------------------ labels


def _labels_of_folders(source: Source) -> tuple[list[int] | None, tuple[str, ...]]:
    inside = [name for name in source.names if "/" not in name]
    nested = [name for name in source.names if "/" in name]
    if inside and nested:
        raise UserError(
            f"{source.path}: {inside[0]} lies directly inside and {nested[0]} in a sub-folder; "
            "put every image in the sub-folder of its class, or all directly inside"
        )
    if inside:
        return None, ()
    folders = [name.split("/")[0] for name in nested]
    class_names = tuple(sorted(set(folders)))
    number = {name: i for i, name in enumerate(class_names)}
    return [number[folder] for folder in folders], class_names


def _labels_of_file(source: Source) -> tuple[list[int] | None, tuple[str, ...]]:
    where = f"{LABELS} of {source.path}"
    try:
        content = json.loads(source.read(LABELS))
        pairs = content["labels"]
        label_of = None if pairs is None else {str(file).replace("\\", "/"): label for file, label in pairs}
    except UserError:
        raise
    except Exception as error:
        expected = '{"labels": [["file.png", 0], ...]} or {"labels": null}'
        raise UserError(f"{where}: expected {expected} ({_line(error)})") from error
    if label_of is None:
        return None, ()
    missing = [name for name in source.names if name not in label_of]
    if missing:
        raise UserError(f"{where}: no label for {len(missing)} of {len(source.names)} images, e.g. {missing[0]}")
    labels = [_class(label_of[name], name, where) for name in source.names]
    return labels, tuple(str(i) for i in range(max(labels) + 1))


def _class(label: Any, name: str, where: str) -> int:
    if type(label) is not int or not 0 <= label < MAX_LABEL:
        raise UserError(f"{where}: the label of {name} is {str(label)[:40]}; a class is a whole number from 0 on")
    return label


# ---------------------------------------------------------------------------------------------------------- decoding


def _decode_all(source: Source, size: int | None) -> np.ndarray:
    """uint8 [n, c, h, w]; each image is decoded on its own into the array, so memory is the array's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        grey = all([_guarded(source, name, lambda image: image.mode) in GREY_MODES for name in source.names])
        first = _guarded(source, source.names[0], lambda image: _pixels(image, grey, size))
        try:
            images = np.empty((len(source.names), *first.shape), np.uint8)
        except MemoryError as error:
            c, h, w = first.shape
            need = f"{len(source.names)} images of {w}x{h} pixels need {len(source.names) * first.size / 1e9:.1f} GB"
            raise UserError(f"{source.path}: {need} of memory; pass --size to make them smaller") from error

        def decode(i: int) -> None:
            pixels = _guarded(source, source.names[i], lambda image: _pixels(image, grey, size))
            if pixels.shape != first.shape:
                raise UserError(
                    f"{source.path}: {source.names[0]} has {_extent(first)} pixels and {source.names[i]} "
                    f"{_extent(pixels)}; pass --size (e.g. --size 64) to crop and resize all to one size"
                )
            images[i] = pixels

        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(decode, range(len(source.names))):
                pass
    return images


def _extent(pixels: np.ndarray) -> str:
    return f"{pixels.shape[2]}x{pixels.shape[1]}"


def _guarded(source: Source, name: str, use: Callable[[Image.Image], Any]) -> Any:
    """use(the opened image), with every way in which a file can be bad told as one line."""
    try:
        with Image.open(io.BytesIO(source.read(name)), formats=FORMATS) as image:
            return use(image)
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
        raise UserError(f"{name} in {source.path} has {limit}: make it smaller or remove it") from error
    except Exception as error:  # decoders raise almost anything on damaged files
        why = "no known image format" if isinstance(error, UnidentifiedImageError) else _line(error)
        raise UserError(f"{name} in {source.path} cannot be read ({why}): replace or remove it") from error


def _pixels(image: Image.Image, grey: bool, size: int | None) -> np.ndarray:
    """uint8 [1 or 3, h, w] of the first frame."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if grey else "RGB")
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.LANCZOS, box)
    pixels = np.asarray(image)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
