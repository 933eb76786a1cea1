"""What a run tells while it trains: running sums, lines in metrics.jsonl and evaluations.jsonl, a progress display."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from onejump.methods.base import Stats
from onejump.types import UserError

BINS, T_LOW, T_HIGH = 16, 0.002, 80.0  # of loss_by_t
LINE_EVERY = 10.0  # seconds between two lines of progress


def time_bin(t: Tensor) -> Tensor:
    """Which of the 16 bins, even in ln t between 0.002 and 80, holds each t; the end bins take what is outside."""
    share = (t.double() / T_LOW).log() / math.log(T_HIGH / T_LOW)
    return (share * BINS).floor().clamp(0, BINS - 1).long()


@dataclass
class RunningSums:
    """Sums over the steps since the last log line; the tensors stay on the device. Skipped steps count in time only."""

    loss: Tensor
    grad_norm: Tensor
    distance: Tensor  # [16], by time
    count: Tensor  # [16], samples
    good: int = 0
    steps: int = 0
    seconds: float = 0.0

    @classmethod
    def zero(cls, device: torch.device) -> "RunningSums":
        zeros = torch.zeros(2 + 2 * BINS, dtype=torch.float64, device=device)
        return cls(zeros[0].clone(), zeros[1].clone(), zeros[2 : 2 + BINS].clone(), zeros[2 + BINS :].clone())

    def add(self, loss: Tensor, grad_norm: Tensor, stats: Stats) -> None:
        self.loss += loss
        self.grad_norm += grad_norm
        bins, distance = time_bin(stats["t"]), stats["distance"].detach().double()
        self.distance.index_add_(0, bins, distance)
        self.count.index_add_(0, bins, torch.ones_like(distance))
        self.good += 1

    def means(self) -> dict[str, Any]:
        """Means over the good steps; None where there were none, or no sample in a bin."""
        sums = torch.cat([self.loss[None], self.grad_norm[None], self.distance, self.count]).tolist()
        pairs = zip(sums[2 : 2 + BINS], sums[2 + BINS :], strict=True)
        return {
            "loss": sums[0] / self.good if self.good else None,
            "grad_norm": sums[1] / self.good if self.good else None,
            "loss_by_t": [distance / count if count else None for distance, count in pairs],
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"loss": self.loss, "grad_norm": self.grad_norm, "distance": self.distance, "count": self.count}

    def meta(self) -> dict[str, Any]:
        return {"good": self.good, "steps": self.steps, "seconds": self.seconds}


class JsonLines:
    """A file with one JSON object a line, each with its "step"; flushed line by line.

    Opened to go on after `last_step`: later lines, which the resumed run will write again, and torn ones are dropped.
    """

    def __init__(self, path: Path, last_step: int):
        self.path = path
        lines = [line for line in _whole_lines(path) if line["step"] <= last_step]
        self.last_step = lines[-1]["step"] if lines else None
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}")
        draft.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(draft, path)
        self.file = open(path, "a")

    def append(self, line: Mapping[str, Any]) -> None:
        """Raises UserError if the disk is full."""
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            reason = f"{self.path}: could not write ({error.strerror}); checkpoints are untouched"
            raise UserError(f"{reason}; free space and run the same command again") from error
        self.last_step = line["step"]


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            yield content


class RunLog:
    """metrics.jsonl and evaluations.jsonl in the folder of a stage, and TensorBoard's copy of them if asked for."""

    def __init__(self, out: Path, last_step: int, tensorboard: bool = False):
        self.metrics = JsonLines(out / "metrics.jsonl", last_step)
        self.evaluations = JsonLines(out / "evaluations.jsonl", last_step)
        self.board = _tensorboard(out / "tensorboard", last_step) if tensorboard else None

    def write(self, file: JsonLines, line: Mapping[str, Any]) -> None:
        file.append(line)
        if self.board is not None:
            for name, value in _scalars(line, ""):
                self.board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.metrics.file.close()
        self.evaluations.file.close()
        if self.board is not None:
            self.board.close()


def _tensorboard(folder: Path, last_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError('tensorboard: not installed; pip install "onejump[log]" or leave the option out') from error
    return SummaryWriter(str(folder), purge_step=last_step + 1)


def _scalars(line: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """The numbers of a line, nested ones under "outer/inner"."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield prefix + name, float(value)


@runtime_checkable
class Progress(Protocol):
    """Where training shows how far it is. Steps are counted within the stage."""

    def start(self, total: int, done: int) -> None: ...

    def update(self, done: int, metrics: Mapping[str, Any] | None) -> None:
        """After every step; metrics is the line just written to metrics.jsonl, None between two lines."""

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


def progress_for(title: str) -> Progress:
    """A live bar if standard error is a terminal, plain lines elsewhere."""
    return ProgressBar(title) if sys.stderr.isatty() else ProgressLines(title)


@dataclass
class ProgressLines:
    """One line of text per log interval, and no more than one in 10 seconds."""

    title: str
    every: float = 10.0  # seconds
    total: int = 0
    first: tuple[int, float] = (0, 0.0)  # steps done and the clock at the start
    shown: float = -math.inf

    def start(self, total: int, done: int) -> None:
        self.total, self.first = total, (done, time.monotonic())

    def update(self, done: int, metrics: Mapping[str, Any] | None) -> None:
        now = time.monotonic()
        if metrics is None or (now - self.shown < self.every and done < self.total):
            return
        self.shown = now
        left = (now - self.first[1]) / max(done - self.first[0], 1) * (self.total - done)
        self.message(f"{done}/{self.total}  {summary(metrics)}  {duration(left)} left")

    def message(self, text: str) -> None:
        print(f"{self.title}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class ProgressBar:
    """rich's live bar: steps, time left, loss, images a second."""

    def __init__(self, title: str):
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[summary]}"),
        )
        self.bar = progress.Progress(*columns, console=Console(stderr=True))
        self.task = self.bar.add_task(title, start=False, total=None, summary="")

    def start(self, total: int, done: int) -> None:
        self.bar.update(self.task, total=total, completed=done)
        self.bar.start_task(self.task)
        self.bar.start()

    def update(self, done: int, metrics: Mapping[str, Any] | None) -> None:
        if metrics is None:
            self.bar.update(self.task, completed=done)
        else:
            self.bar.update(self.task, completed=done, summary=summary(metrics))

    def message(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """A bar that has not come to its end is wiped: the words about Ctrl-C have left a copy of it above them."""
        self.bar.live.transient = not self.bar.finished
        self.bar.stop()


def summary(metrics: Mapping[str, Any]) -> str:
    loss = "-" if metrics["loss"] is None else f"{metrics['loss']:.4g}"
    skipped = f"  {metrics['skipped']} skipped" if metrics["skipped"] else ""
    rate = metrics["images_per_second"]
    return f"loss {loss}  {rate:{',.0f' if rate >= 10 else '.2g'}} images/s{skipped}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


@contextmanager
def progress_of(title: str) -> Iterator[Callable[[int, int], None]]:
    """Told (done, in all): a live bar if standard error is a terminal; elsewhere a line every 10 seconds at most."""
    first: tuple[int, float] | None = None
    shown = time.monotonic()
    bar = ProgressBar(title) if sys.stderr.isatty() else None

    def tell(done: int, total: int) -> None:
        nonlocal first, shown
        now = time.monotonic()
        if first is None:
            first = done, now
            if bar is not None:
                bar.start(total, done)
        if bar is not None:
            bar.update(done, None)
        elif done > first[0] and (now - shown >= LINE_EVERY or done == total):
            shown = now
            left = (now - first[1]) / (done - first[0]) * (total - done)
            print(f"{title}: {done}/{total}  {duration(left)} left", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        if bar is not None:
            bar.close()
