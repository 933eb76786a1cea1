"""Ends a process that makes no step any more, so that its launcher can start it again from the last checkpoint."""

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

HUNG = 75  # the exit code: "temporary failure", for which torchrun --max-restarts starts all processes again
SLOWER = 20  # a step may take so many times the longest one before it


@dataclass(frozen=True)
class Patience:
    """How long a step may take, in seconds. 0 for `later`: no step is ever too long.

    first: the first step of a process, in which graphs are compiled and other processes are waited for.
    later: every other one; where steps are slow, SLOWER times the longest of them instead.
    """

    first: float = 3600.0
    later: float = 600.0

    def limit(self, longest: float | None) -> float:
        """longest: of the steps since the first, None before there is one."""
        return max(self.later, self.first if longest is None else SLOWER * longest)


class Watchdog:
    """Within it, beat(step) is to come after every step. If it does not, the process ends with exit code 75.

    A thread looks at the time. When it runs out, the stacks of all threads go to FOLDER/hung-RANK.txt and one line that
    says so to standard error. Time in which this very thread did not run (Ctrl-Z, a frozen container) does not count.
    Where a step keeps the interpreter's lock, no thread of Python can speak: then, unless standard error is a terminal,
    the interpreter's own timer writes the stacks there, and ends the process with exit code 1.
    """

    def __init__(self, folder: Path, patience: Patience = Patience(), rank: int = 0, world: int = 1):
        self.file, self.patience, self.rank, self.world = folder / f"hung-{rank}.txt", patience, rank, world
        self.step: int | None = None  # the last that was made
        self.longest: float | None = None
        self.began = time.monotonic()  # of the step under way
        self.waited = 0.0  # seconds in it, as the thread has counted them
        self.pause = patience.later / 20  # between two looks
        self.watching = patience.later > 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.watching:
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.done.set()
        if self.watching:
            self.thread.join()

    def beat(self, step: int) -> None:
        """This step is made, the next one begins."""
        if self.step is not None:
            took = min(time.monotonic() - self.began, self.waited + self.pause)
            self.longest = max(self.longest or 0.0, took)
        self.step = step
        self._begin()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """While it lasts, nothing is expected: evaluations and samples take what they take."""
        watching, self.watching = self.watching, False
        try:
            yield
        finally:
            self._begin()
            self.watching = watching

    def _begin(self) -> None:
        self.began, self.waited = time.monotonic(), 0.0

    def _watch(self) -> None:
        last_resort = not os.isatty(2)
        try:
            while True:
                limit = self.patience.limit(self.longest)
                if last_resort:
                    faulthandler.dump_traceback_later(limit + 10 * self.pause, exit=True, file=2)
                if self.watching and self.waited > limit:
                    self._end()
                if self.done.wait(self.pause):
                    break
                self.waited += self.pause
        finally:
            if last_resort:
                faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        where = f"the stacks of its threads are in {self.file}"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "w") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {self._what()}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            where = f"{self.file}: {error.strerror}; its threads:"
            faulthandler.dump_traceback(2)
        text = f"\nonejump: {self._what()}; {where}. It ends with exit code {HUNG}; the same command goes on\n"
        os.write(2, text.encode())
        os._exit(HUNG)

    def _what(self) -> str:
        who = f"process {self.rank} of {self.world} (pid {os.getpid()} on {socket.gethostname()})"
        before = "the first step" if self.step is None else f"the step after {self.step}"
        return f"{who} hangs: {before} has taken {self.waited:.0f} s"
