"""How fast are sets of images read? Our readers against a plain loop over Pillow, in images a second of CPU time.

    OMP_NUM_THREADS=1 python bench/readers.py --n 3000 --rounds 7 --out runs/readers.json

A set of random smooth images is written once at 32x32 and at 64x64 as a zip of compressed PNGs (as Pillow writes
them), a zip of uncompressed filtered PNGs (as the published tools write them), the zip of `onejump data prepare`, a
folder, and WebDataset shards. Then each way to read is run in turn, round by round, in one process and one thread;
ratios to the plain loop over the same zip are taken within a round, and their median is told. The plain loop is
np.asarray(Image.open(archive.open(name)).convert("RGB")). `codec` is what no reader over Pillow can beat: its PNG
decoder alone, on bytes that are in memory and already taken out of their file. Ours open the set, and read as many
images at once as when a set is loaded; `zip, streamed` only as many as a thread makes of a training step. Times are of
the process's CPU, so that a busy machine disturbs them little. Needs a checkout of this repository.
"""

import argparse
import io
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import PIL
import torch
from PIL import Image

from onejump.data.decode import Decoding, decode_all
from onejump.data.feeder import SHARE, SHARE_BYTES
from onejump.data.image_set import ImageSet
from onejump.data.load import CHUNK, as_source, load_images
from onejump.data.prepare import prepare

Read = Callable[[], None]
BATCH = 128


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--n", type=int, default=5000, help="images of each size (default: %(default)s)")
    options.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    options.add_argument("--out", type=Path, help="write a JSON record")
    args = options.parse_args()
    torch.set_num_threads(1)
    record = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "n": args.n}
    record |= {"python": platform.python_version(), "pillow": PIL.__version__, "rounds": args.rounds, "results": {}}
    for size in (32, 64):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            ways = ways_to_read(Path(folder), size, args.n)
            record["results"][size] = measured(ways, args.n, args.rounds)
        print(f"{size}x{size}{'images/s':>30} {'of plain':>9}")
        for name, found in record["results"][size].items():
            print(f"  {name:<24}{found['images_per_second']:>11,.0f} {found['ratio']:>8.2f}x")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1))


def pictures(size: int, n: int) -> list[Image.Image]:
    """Smooth colours with a little noise: PNGs of them shrink about as much as those of photographs."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (n, 5, 5, 3), np.uint8)
    fine = random.normal(0, 6, (16, size, size, 3))
    made = []
    for k, pixels in enumerate(coarse):
        smooth = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
        made.append(Image.fromarray((smooth + fine[k % 16]).clip(0, 255).astype(np.uint8)))
    return made


def ways_to_read(root: Path, size: int, n: int) -> dict[str, Read]:
    images = pictures(size, n)
    pngs = {level: [encoded(image, level) for image in images] for level in (0, 6)}
    names = [f"{k:08d}.png" for k in range(n)]
    for level, name in ((0, "level0.zip"), (6, "level6.zip")):
        with ZipFile(root / name, "w", ZIP_STORED) as archive:
            for entry, data in zip(names, pngs[level], strict=True):
                archive.writestr(entry, data)
    (root / "folder").mkdir()
    (root / "shards").mkdir()
    for k, (name, data) in enumerate(zip(names, pngs[6], strict=True)):
        (root / "folder" / name).write_bytes(data)
        with tarfile.open(root / "shards" / f"{k * 4 // n:03d}.tar", "a") as shard:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    prepare(root / "level6.zip", root / "prepared.zip", Decoding())
    memory = load_images(root / "prepared.zip")
    return {
        "plain zip": lambda: plain(root / "level6.zip", names),
        "zip": lambda: ours(root / "level6.zip"),
        "zip, streamed": lambda: ours(root / "level6.zip", min(SHARE, SHARE_BYTES // (3 * size * size))),
        "codec": lambda: codec(pngs[6]),
        "plain zip, level 0": lambda: plain(root / "level0.zip", names),
        "zip, level 0": lambda: ours(root / "level0.zip"),
        "codec, level 0": lambda: codec(pngs[0]),
        "prepared zip": lambda: ours(root / "prepared.zip"),
        "folder": lambda: ours(root / "folder"),
        "WebDataset": lambda: ours(root / "shards"),
        "in memory": lambda: batches(memory),
    }


def encoded(image: Image.Image, level: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=level)
    return stream.getvalue()


def plain(path: Path, names: list[str]) -> None:
    with ZipFile(path) as archive:
        for name in names:
            with archive.open(name) as file:
                np.asarray(Image.open(file).convert("RGB"))


def ours(path: Path, at_once: int = CHUNK) -> None:
    source, how = as_source(path), Decoding()
    for first in range(0, len(source.names), at_once):
        decode_all(source, source.names[first : first + at_once], how)


def codec(pngs: list[bytes]) -> None:
    """Pillow's inflating and unfiltering, on the compressed bytes (one IDAT from byte 41 on, 16 bytes after it)."""
    for data in pngs:
        w, h = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
        Image.frombytes("RGB", (w, h), data[41:-16], "zip", "RGB")


def batches(images: ImageSet) -> None:
    for step in range(images.n // BATCH):
        images.batch(step, BATCH, seed=0)


def measured(ways: dict[str, Read], n: int, rounds: int) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, read in ways.items():
            start = time.process_time()
            read()
            seconds[name].append(time.process_time() - start)
    found = {}
    for name, times in seconds.items():
        against = seconds["plain zip, level 0" if "level 0" in name or name == "prepared zip" else "plain zip"]
        ratio = statistics.median(b / a for a, b in zip(times, against, strict=True))
        found[name] = {"images_per_second": n / statistics.median(times), "ratio": ratio}
    return found


if __name__ == "__main__":
    main()
