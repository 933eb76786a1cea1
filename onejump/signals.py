"""What SIGINT and SIGTERM mean to training: finish the step, save, and end."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130  # the exit code of what Ctrl-C has stopped; what a scheduler has stopped ends with 0


class Interrupted(Exception):
    """Training was asked to stop, and did so after a complete step whose checkpoint is at `path`.

    code: what the process ends with, 0 where a scheduler asked with SIGTERM, 130 after Ctrl-C.
    """

    def __init__(self, step: int, path: Path, code: int = INTERRUPTED):
        super().__init__(f"stopped after step {step}; checkpoint: {path}")
        self.step, self.path, self.code = step, path, code


class Terminated(KeyboardInterrupt):
    """SIGTERM where there is no step to finish; it unwinds as Ctrl-C does."""


class StopOnSignal:
    """Within it, the first SIGINT or SIGTERM sets `requested`; `number` is that signal.

    After it, SIGINT acts at once, as it would without: a second Ctrl-C. SIGTERM never does, for schedulers and
    launchers often send it twice, and one that will wait no longer sends SIGKILL.
    Only the main thread may install handlers; elsewhere `requested` stays False.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self.previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.number is not None

    @property
    def code(self) -> int:
        """What the process ends with once the step is saved."""
        return 0 if self.number == signal.SIGTERM else INTERRUPTED

    def __enter__(self) -> "StopOnSignal":
        self.previous = _install(self.handle, signal.SIGINT, signal.SIGTERM)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.restore()

    def restore(self) -> None:
        self.previous = _restored(self.previous)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT:
                self.restore()
                signal.raise_signal(number)
            return
        self.number = signal.Signals(number)
        again = "; Ctrl-C once more to stop at once" if number == signal.SIGINT else ""
        os.write(2, f"\nStopping after this step{again}.\n".encode())  # print may not be re-entered here


class TermUnwinds:
    """Within it, and outside any StopOnSignal, SIGTERM raises Terminated: files are closed and locks are left."""

    def __init__(self) -> None:
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "TermUnwinds":
        self.previous = _install(self.handle, signal.SIGTERM)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.previous = _restored(self.previous)

    def handle(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # the second of two must not meet the unwinding
        raise Terminated


def _install(handler: Any, *numbers: signal.Signals) -> dict[int, Any]:
    """The handlers that were there before; none outside the main thread, which alone may set them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers}


def _restored(previous: dict[int, Any]) -> dict[int, Any]:
    for number, handler in previous.items():
        signal.signal(number, handler or signal.SIG_DFL)
    return {}
