"""What a run tells while it trains: lines in metrics.jsonl and evaluations.jsonl, a progress display."""

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

from onejump.types import UserError

Share = Callable[[Callable[[], None]], None]
LINE_EVERY = 10.0  # seconds between two lines of progress


class JsonLines:
    """A file with one JSON object a line, each with its "step"; flushed line by line.

    Opened to go on after `last_step`: later lines, which the resumed run will write again, and torn ones are dropped.
    """

    def __init__(self, path: Path, last_step: int):
        self.path = path
        lines = [line for line in _whole_lines(path) if line["step"] <= last_step]
        self.last_step = lines[-1]["step"] if lines else None
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}")
            draft.write_text("".join(json.dumps(line) + "\n" for line in lines))
            os.replace(draft, path)
            self.file = open(path, "a")

    def append(self, line: Mapping[str, Any]) -> None:
        """Raises UserError if the disk is full."""
        with self._writing():
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        self.last_step = line["step"]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = f"{self.path}: could not write ({error.strerror}); checkpoints are untouched"
            raise UserError(f"{reason}; free space and run the same command again") from error


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            yield content


class RunLog:
    """metrics.jsonl and evaluations.jsonl in the folder of a stage, and TensorBoard's copy of them if asked for.

    writes: False in all but one of several processes, where nothing is opened and nothing happens. share: does what it
    is given, and has its failure known to the other processes, all of which make the same calls.
    """

    def __init__(
        self,
        out: Path,
        last_step: int,
        tensorboard: bool = False,
        writes: bool = True,
        share: Share = lambda work: work(),
    ):
        self.metrics: JsonLines | None = None
        self.evaluations: JsonLines | None = None
        self.board: Any = None
        self.share = share
        share(lambda: self._open(out, last_step, tensorboard) if writes else None)

    def _open(self, out: Path, last_step: int, tensorboard: bool) -> None:
        self.metrics = JsonLines(out / "metrics.jsonl", last_step)
        self.evaluations = JsonLines(out / "evaluations.jsonl", last_step)
        self.board = _tensorboard(out / "tensorboard", last_step) if tensorboard else None

    @property
    def evaluated(self) -> int | None:
        """The step of the last evaluation on file."""
        return self.evaluations.last_step if self.evaluations else None

    def evaluated_lines(self) -> list[dict[str, Any]]:
        """All of evaluations.jsonl."""
        return list(_whole_lines(self.evaluations.path)) if self.evaluations else []

    def metric(self, line: Mapping[str, Any]) -> None:
        self.share(lambda: self._write(self.metrics, line))

    def evaluation(self, line: Mapping[str, Any]) -> None:
        self.share(lambda: self._write(self.evaluations, line))

    def _write(self, file: JsonLines | None, line: Mapping[str, Any]) -> None:
        if file is not None:
            file.append(line)
        if self.board is not None:
            for name, value in _scalars(line, ""):
                self.board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        for file in (self.metrics, self.evaluations):
            if file is not None:
                file.file.close()
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


class Silence:
    """The display of all but one of several processes."""

    def start(self, total: int, done: int) -> None: ...

    def update(self, done: int, metrics: Mapping[str, Any] | None) -> None: ...

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
