"""A set for training, from whatever is at a path: in memory where it fits, else streamed; or latents."""

import math
import os
from pathlib import Path

from PIL import Image

from onejump.data.arrays import fitted
from onejump.data.decode import Crop, Decoding, decode
from onejump.data.feeder import tell
from onejump.data.image_set import ImageSet
from onejump.data.latent_files import is_latents
from onejump.data.latents import LatentScaling, open_latents
from onejump.data.load import check_any, gathered
from onejump.data.shards import refuse_glob
from onejump.data.source import Bad, Source, shown
from onejump.data.sources import open_source
from onejump.data.stream import streamed
from onejump.data.text_set import is_text_set, open_text_set
from onejump.data.training_set import TrainingSet
from onejump.types import UserError

SHARE = 0.25  # of the free memory that a set may take
GB = 1e9


def open_training_set(
    path: str | Path,
    size: int | None = None,
    crop: Crop = "center",
    bad: Bad | None = None,
    stream: bool | None = None,
    scaling: LatentScaling | None = None,
    cache: Path | None = None,
) -> TrainingSet:
    """The set at a path. With `bad`, what cannot be read is noted in it and left out; else it raises UserError.

    Decoded into memory (`ImageSet`) if that takes a quarter of the free memory at most, else decoded while training
    (`StreamedSet`): the same images in the same order, and the same fingerprint. `stream` decides instead, if given.
    .npy files of floats are latents (`LatentSet`), which `scaling` brings to what training expects; with captions, a
    folder that `prepare_text` made (`TextSet`).
    """
    check_side(size)
    path, how = Path(path).expanduser(), Decoding(None, size, crop)
    refuse_glob(path)
    if is_text_set(path):
        return open_text_set(path)
    if is_latents(path):
        return open_latents(path, scaling, bad is not None, cache=cache)
    source = open_source(path, bad)
    if isinstance(source, ImageSet):
        return fitted(source, how)
    check_any(source)
    need, free = bytes_of(source, how), free_memory()
    if stream is None:
        stream = need > SHARE * free
        if stream:
            share = f"more than a quarter of the {free / GB:.1f} GB that are free"
            tell(f"{path}: {need / GB:.1f} GB of images, {share}: decoded while training")
    return streamed(source, how, bad, cache=cache) if stream else gathered(source, how, bad)


def check_side(size: int | None) -> None:
    """Raises UserError for a side that makes images of more pixels than one that is read may have."""
    limit = Image.MAX_IMAGE_PIXELS
    if size is not None and limit is not None and size**2 > limit:
        raise UserError(f"--size {size}: an image may have {limit:,} pixels, so {math.isqrt(limit):,} at most")


def bytes_of(source: Source, how: Decoding) -> int:
    """All images in memory, if they are like the first that can be read and in colour."""
    pixels = 0
    for name in source.names[:100]:
        try:
            found = decode(source.read(name), how, shown(name))
        except UserError:
            continue  # told when all are read
        pixels = found.shape[1] * found.shape[2]
        break
    return 3 * pixels * len(source.names)


def free_memory() -> int:
    """Bytes that may be used: of the machine, and of the container that it may run in."""
    page = os.sysconf("SC_PAGE_SIZE") if os.name == "posix" else 0
    free = page * os.sysconf("SC_PHYS_PAGES") // 2 if page else 8 * 2**30
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = (_text(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        free = min(free, int(limit) - int(used))
    return max(free, 0)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
