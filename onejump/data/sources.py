"""Any usual form of a set of images, told apart by what is there and not by a name for it."""

from pathlib import Path
from zipfile import is_zipfile

from onejump.data.arrays import npy_set, npz_set
from onejump.data.cifar import binary_file, cifar_folder, cifar_tar
from onejump.data.files import folder_source, zip_source
from onejump.data.huggingface import huggingface_source, is_huggingface
from onejump.data.idx import idx_files, idx_folder, idx_set, is_idx_images
from onejump.data.image_set import ImageSet
from onejump.data.shards import refuse_glob, shard_source, shards_of
from onejump.data.source import SUFFIXES, Bad, Source
from onejump.types import UserError

FORMS = "others that are: CIFAR, idx, .npz or .npy arrays, .tar shards, a saved `datasets` folder"


def open_source(path: str | Path, bad: Bad | None = None) -> Source | ImageSet:
    """The set at a path: encoded images as a `Source`; forms that are arrays come decoded.

    With `bad`, images without a valid label, or there twice, are noted in it and left out; else they are refused.
    Raises UserError for anything missing, damaged, unsafe or ambiguous.
    """
    path = Path(path).expanduser()
    refuse_glob(path)
    try:
        if path.is_dir():
            return _folder(path, bad)
        if path.exists():
            return _file(path, bad)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from error
    if "{" in path.name and path.name.endswith(".tar"):
        return shard_source(path, shards_of(path), bad)
    raise UserError(f"{path}: no such folder or file")


def _folder(path: Path, bad: Bad | None) -> Source | ImageSet:
    if is_huggingface(path):
        return huggingface_source(path, bad)
    cifar = cifar_folder(path)
    if cifar is not None:
        return cifar
    found = idx_files(path)
    if found:
        return idx_folder(path, found)
    if (path / "images.npy").is_file():
        return npy_set(path / "images.npy")
    plain = any(item.is_dir() or item.name.lower().endswith(SUFFIXES) for item in path.iterdir())
    shards = [] if plain else shards_of(path)
    return shard_source(path, shards, bad) if shards else folder_source(path, bad)


def _file(path: Path, bad: Bad | None) -> Source | ImageSet:
    name = path.name.lower()
    if name.endswith(".npz"):
        return npz_set(path)
    if name.endswith(".npy"):
        return npy_set(path)
    if is_idx_images(path):
        return idx_set(path)
    if name.endswith(".bin"):
        return binary_file(path)
    if is_zipfile(path):
        return zip_source(path, bad)
    if name.endswith(".zip"):
        raise UserError(f"{path} is a damaged zip file (download or copy it again)")
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        cifar = cifar_tar(path)
        if cifar is not None:
            return cifar
        if not name.endswith(".tar"):
            raise UserError(f"{path} is compressed, so that its images cannot be read one by one: unpack it")
        return shard_source(path, [path], bad)
    raise UserError(f"{path} is a file, not a folder of images or a zip of images ({FORMS})")
