"""Thousands of samples in parts: made and measured by any number of processes, kept in files, resumed after a kill.

A part is 512 images. What it holds is a function of what is asked for, and of its place; not of who made it.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from onejump.evaluation.reading import Reader
from onejump.generate import Rounding, denoise_images, generate
from onejump.prompts import Prompts
from onejump.reference import NEAREST, Tell, read_checked, write_checked
from onejump.samplers import Sampler
from onejump.saved import SavedModel, not_written
from onejump.types import Images, UserError

PART = 512  # images; a multiple of the blocks
WAIT = 0.05  # seconds between two looks at what the other processes have done


@runtime_checkable
class Source(Protocol):
    """Where samples come from: those at some places, always the same ones."""

    def __call__(self, places: Sequence[int]) -> Images: ...

    def on(self, device: torch.device) -> "Source": ...


@dataclass(frozen=True, eq=False)
class Generated:
    """Images of a model, number k at place k."""

    saved: SavedModel
    sampler: Sampler
    steps: int
    labels: Tensor | None
    seed: int
    batch: int = 256
    block: int | None = None
    rounding: Rounding = "round"
    prompts: Prompts | None = None  # of a text-to-image model, in place of labels

    def __call__(self, places: Sequence[int]) -> Images:
        labels, decode = None if self.labels is None else self.labels[list(places)], None
        if self.prompts:
            labels, decode = self.prompts.embeddings(places), self.prompts.decode
        about = (self.saved.shape, labels, self.seed, self.batch, self.block, self.rounding, decode)
        return generate(self.saved.model, self.sampler, self.steps, places, *about)

    def on(self, device: torch.device) -> "Generated":
        self.saved.model.to(device)
        return replace(self, prompts=self.prompts.on(device)) if self.prompts else self


@dataclass(frozen=True, eq=False)
class Denoised:
    """f(x0 + t eps, t) of given images x0, for the denoising FID."""

    saved: SavedModel
    images: Images
    labels: Tensor | None
    t: float
    seed: int
    batch: int = 256
    block: int | None = None
    rounding: Rounding = "round"

    def __call__(self, places: Sequence[int]) -> Images:
        labels = None if self.labels is None else self.labels[list(places)]
        about = (labels, self.seed, self.batch, self.block, self.rounding)
        return denoise_images(self.saved.model, self.images[list(places)], self.t, places, *about)

    def on(self, device: torch.device) -> "Denoised":
        self.saved.model.to(device)
        return self


@dataclass(frozen=True, eq=False)
class Given:
    """Images that are there already."""

    images: Images

    def __call__(self, places: Sequence[int]) -> Images:
        return self.images[list(places)]

    def on(self, device: torch.device) -> "Given":
        return self


@dataclass(frozen=True)
class Workers:
    """Who makes the parts, and the folder in which they meet.

    processes: of our own, on the CPU or over the GPUs. rank, world: or one of several that were started from outside
    (torchrun), each of which makes every world-th part, and the first of which waits for them all.
    """

    folder: Path | None = None
    processes: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        assert self.folder or self.processes == self.world == 1, "several processes meet in a folder"


@contextmanager
def workers_beside(out: Path | None, processes: int = 1, rank: int = 0, world: int = 1) -> Iterator[Workers]:
    """Parts lie beside `out`, for the next attempt; else, if several processes have to meet, in a temporary folder."""
    if out is None and processes == 1:
        yield Workers()
    elif out is None:
        with tempfile.TemporaryDirectory(prefix="onejump-") as place:
            yield Workers(Path(place), processes)
    else:
        folder = out.with_name(f"{out.name}.parts")
        try:
            yield Workers(folder, processes, rank, world)
        except KeyboardInterrupt:
            print(f"\nThe parts done are kept in {folder}; the same command goes on from them", file=sys.stderr)
            raise
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class Job:
    """n samples of a source, read by a reader; the parts of one job lie in one folder, named by what `about` says."""

    source: Source
    reader: Reader
    n: int
    about: Mapping[str, Any]
    workers: Workers = Workers()

    @property
    def parts(self) -> list[range]:
        return [range(i, min(i + PART, self.n)) for i in range(0, self.n, PART)]

    @property
    def folder(self) -> Path:
        assert self.workers.folder is not None
        return self.workers.folder / hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:20]

    def path(self, part: range) -> Path:
        """A part with fewer images is another one, and made anew when n grows."""
        return self.folder / f"{part.start:08d}-{part.stop:08d}.safetensors"

    def make(self, part: range) -> dict[str, Tensor]:
        """The kinds that the reader reads, images (of the first 1,000 samples), and how many seconds making took."""
        began = time.perf_counter()
        images = self.source(part)
        seconds = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        prompts = self.source.prompts if isinstance(self.source, Generated) else None
        read = self.reader(images) | (prompts.scores(images, part) if prompts else {})
        return {**read, "seconds": seconds, "images": images[: max(NEAREST - part.start, 0)]}

    def share(self, rank: int, world: int, tell: Tell, others: Callable[[], bool] = lambda: True) -> None:
        """Makes those of every world-th part that are not on file, for as long as `others` says that it is wanted."""
        for part in self.parts[rank::world]:
            if not others():
                return
            if not self.path(part).exists():
                self._keep(part)
            tell(self.done(), self.n)

    def _keep(self, part: range) -> dict[str, Tensor]:
        made = self.make(part)
        try:
            write_checked(self.path(part), made, self.about)
        except OSError as error:
            raise not_written(self.path(part), error) from error
        return made

    def done(self) -> int:
        """Images on file."""
        return sum(len(part) for part in self.parts if self.path(part).exists())

    def run(self, tell: Tell = lambda done, total: None) -> Iterator[dict[str, Tensor]]:
        """Makes what is missing and gives every part in its order; a damaged one is made again.

        In all but the first of several processes started from outside it does their share, and gives none.
        """
        if self.workers.folder is None:
            tell(0, self.n)
            for part in self.parts:
                yield self.make(part)
                tell(part.stop, self.n)
            return
        tell = _news_only(tell)
        tell(self.done(), self.n)
        missing = sum(not self.path(part).exists() for part in self.parts)
        if min(self.workers.processes, missing) > 1:
            self._spawn(tell, min(self.workers.processes, missing))
        else:
            self.share(self.workers.rank, self.workers.world, tell)
        if self.workers.rank:
            return
        while self.done() < self.n:
            time.sleep(WAIT)
            tell(self.done(), self.n)
        for part in self.parts:
            yield read_checked(self.path(part), self.about) or self._keep(part)

    def _spawn(self, tell: Tell, count: int) -> None:
        """So many processes of our own, ended with this one. Raises UserError if one of them fails."""
        context = torch.multiprocessing.get_context("spawn")
        threads = max(torch.get_num_threads() // count, 1)
        home = _gpu_of(self.source)
        devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if home else []
        job = replace(self, source=self.source.on(torch.device("cpu")))  # whose memory the processes can share
        processes = []
        for rank in range(count):
            device = devices[rank % len(devices)] if devices else "cpu"
            processes.append(context.Process(target=_worker, args=(job, rank, count, device, threads), daemon=True))
            processes[-1].start()
        try:
            _watch(processes, lambda: tell(self.done(), self.n))
        finally:
            for process in processes:
                process.terminate()
                process.join()
            if home:
                self.source.on(home)


def _news_only(tell: Tell) -> Tell:
    """Passes on what differs from the last that was told."""
    last = (-1, -1)

    def news(done: int, total: int) -> None:
        nonlocal last
        if (done, total) != last:
            last = done, total
            tell(done, total)

    return news


def _watch(processes: Sequence[BaseProcess], tell: Callable[[], None]) -> None:
    while any(process.is_alive() for process in processes):
        time.sleep(WAIT)
        tell()
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed:
            raise UserError(f"a process of the evaluation ended with code {failed[0]}; what it said is above")


def _gpu_of(source: Source) -> torch.device | None:
    """Where its model is, if that is a GPU."""
    device = next(source.saved.model.parameters()).device if isinstance(source, Generated | Denoised) else None
    return device if device and device.type == "cuda" else None


def _worker(job: Job, rank: int, world: int, device: str, threads: int) -> None:
    """What each process of `_spawn` does. It stops after its part if the process that started it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started it
    torch.set_num_threads(threads)
    parent = os.getppid()
    on = torch.device(device)
    reader = job.reader if torch.device(job.reader.device or "cpu").type == "cpu" else job.reader.on(on)
    job = replace(job, source=job.source.on(on), reader=reader)
    job.share(rank, world, lambda done, total: None, lambda: os.getppid() == parent)
