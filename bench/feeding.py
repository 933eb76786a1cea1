"""What does feeding cost? Images in memory as a share of a training step, and images a second decoded while training.

    OMP_NUM_THREADS=1 python bench/feeding.py --out runs/feeding-cpu.json
    python bench/feeding.py --device cuda --batch 512 --out runs/feeding-cuda.json

`memory`: the batch of a set of 50,000 noise images of 32x32 pixels, against forward and backward pass of DDPM++ for
CIFAR-10 with that batch; a step's augmentation besides. `stream`: images a second from zips of stored PNGs in EDM's
layout and of deflated ones, by threads, against a plain loop over Pillow and zipfile in the same process: of time and
of CPU time. Variants run in turn, round by round; ratios are taken within a round and their median is told.
`second_thread`: how many times more two threads hash than one, which is what a second thread could add at all.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from PIL import Image

from onejump.data.augment import AugmentPipe, Seeded
from onejump.data.decode import Decoding
from onejump.data.image_set import ImageSet
from onejump.data.sources import open_source
from onejump.data.stream import StreamedSet, streamed
from onejump.methods.ect import ECT
from onejump.model import ConsistencyModel
from onejump.networks.song_unet import SongUNetConfig
from onejump.run_record import device_name, versions


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def second_thread(rounds: int) -> float:
    """2 if a core is free for it."""
    work, blocks = bytes(2**20), 200

    def hashed() -> None:
        for _ in range(blocks):
            sha256(work).digest()

    def both() -> None:
        threads = [Thread(target=hashed) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    cpu = torch.device("cpu")
    return statistics.median(2 * seconds(hashed, cpu) / seconds(both, cpu) for _ in range(rounds))


def memory_rows(device: torch.device, batch: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a batch from memory, of its augmentation and of a training step; medians of shares by round."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images, pipe, method = ImageSet("noise", pixels), AugmentPipe(), ECT()
    nets = method.nets(ConsistencyModel(SongUNetConfig(dropout=0.2).build()).to(device).train())
    x0, _ = images.batch(0, batch, 0, device=device)

    def step() -> None:
        loss, _ = method.loss(nets, x0, None, 0, 100)
        loss.backward()

    works = {
        "batch": lambda k: images.batch(k, batch, 0, device=device),
        "augment": lambda k: pipe(x0, Seeded.of(k)),
        "step": lambda k: step(),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for k in range(rounds + 1):
        for name, work in works.items():
            found[name].append(seconds(lambda k=k, work=work: work(k), device))
    found = {name: values[1:] for name, values in found.items()}  # the first warms up
    shares = {name: [a / b for a, b in zip(found[name], found["step"], strict=True)] for name in ("batch", "augment")}
    return {
        "batch": batch,
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in found.items()},
        "share_of_step": {name: statistics.median(values) for name, values in shares.items()},
    }


def zip_of(path: Path, side: int, n: int, deflated: bool) -> Path:
    """n smooth images with noise, as PNGs: as EDM's tool writes them, or compressed as usual."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for k in range(n):
            small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            pixels = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)).astype(int)
            pixels = (pixels + rng.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8)
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG", compress_level=6 if deflated else 0)
            archive.writestr(f"{k // 1000:05}/img{k:08}.png", stream.getvalue())
    return path


def plain_loop(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        return sum(np.asarray(Image.open(io.BytesIO(archive.read(name)))).shape[0] > 0 for name in names)


def stream_rows(side: int, deflated: bool, n: int, rounds: int, workers: list[int], device: torch.device) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = zip_of(Path(folder) / "set.zip", side, n, deflated)
        source = open_source(path)
        sets = {k: streamed(source, Decoding(), workers=k, cache=Path(folder)) for k in workers}
        works: dict[str, Callable[[], Any]] = {"plain": partial(plain_loop, path)}
        works |= {str(k): partial(epoch, images, device) for k, images in sets.items()}
        times: dict[str, list[float]] = {k: [] for k in works}
        cpu_times: dict[str, list[float]] = {k: [] for k in works}
        for _ in range(rounds):
            for k, work in works.items():
                began = time.process_time()
                times[k].append(seconds(work, device))
                cpu_times[k].append(time.process_time() - began)
    return {
        "side": side,
        "png": "deflated" if deflated else "stored",
        "images_per_second": {k: n / statistics.median(values) for k, values in times.items()},
        "of_plain": of_plain(times),
        "images_per_cpu_second": {k: n / statistics.median(values) for k, values in cpu_times.items()},
        "of_plain_cpu": of_plain(cpu_times),
    }


def of_plain(times: dict[str, list[float]]) -> dict[str, float]:
    """How many times faster than the plain loop, by the median of the rounds."""
    ratios = {k: [a / b for a, b in zip(times["plain"], values, strict=True)] for k, values in times.items()}
    return {k: statistics.median(values) for k, values in ratios.items()}


def epoch(images: StreamedSet, device: torch.device) -> None:
    """One epoch in batches of 128, and nothing decoded beyond it."""
    images = replace(images, feeder=replace(images.feeder, ahead=2))
    for step in range(images.n // 128):
        images.batch(step, 128, 0, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description="What feeding costs.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="of the training step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--n", type=int, default=4096, help="images of the streamed sets")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, 2, min(8, os.cpu_count() or 1)}))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    found = {
        "memory": memory_rows(device, args.batch, args.rounds),
        "stream": [
            stream_rows(side, deflated, args.n, args.rounds, args.workers, device)
            for side in (32, 64)
            for deflated in (False, True)
        ],
        "second_thread": second_thread(args.rounds),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    for name, value in found["memory"]["milliseconds"].items():
        share = found["memory"]["share_of_step"].get(name)
        print(f"{name:8} {value:10.2f} ms" + (f"   {100 * share:.3f} % of a step" if share else ""))
    for row in found["stream"]:
        told = []
        for k, rate in row["images_per_second"].items():
            told.append(f"{k}: {rate:,.0f}/s ({row['of_plain'][k]:.2f}x, of CPU time {row['of_plain_cpu'][k]:.2f}x)")
        print(f"{row['side']} px, {row['png']}: {', '.join(told)}")
    print(f"hashing with two threads: {found['second_thread']:.2f}x")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
