"""Samples made in the background: what a step needs, and what the steps after it will need."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onejump.data.image_set import Step, epoch_order
from onejump.data.source import DiskError
from onejump.types import UserError

WORKERS = min(8, os.cpu_count() or 1)

SHARE, SHARE_BYTES = 128, 2**20  # samples that a thread makes at once, at most: small ones are faster together

Sample = np.ndarray | UserError  # or why it cannot be had: DiskError if it may be good, but cannot be got at
Make = Callable[[list[int]], list[Sample]]  # the samples with these numbers


def one_by_one(make: Callable[[int], np.ndarray]) -> Make:
    """Of samples that are no faster together."""

    def made(i: int) -> Sample:
        try:
            return make(i)
        except UserError as error:
            return error

    return lambda numbers: [made(i) for i in numbers]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, eq=False)
class Feeder:
    """Makes samples with threads, `ahead` steps before they are asked for; at most ahead + 1 batches are held.

    What a step gives is a function of the step alone: neither the threads nor the steps asked before matter. With
    `skip_bad`, the place of a damaged sample is taken by the next good one in the epoch's order, and each is told
    once; without, it raises UserError when its step is asked for. A disk that cannot be read always does.
    """

    name: str
    n: int
    shape: tuple[int, ...]
    dtype: Any  # of numpy
    make: Make
    skip_bad: bool = False
    workers: int = 4
    ahead: int = 2
    bad: dict[int, str] = field(default_factory=dict, init=False)  # why, by the sample's number
    _under_way: dict[Step, "Batch"] = field(default_factory=dict, init=False)
    _lock: Any = field(default_factory=threading.Lock, init=False)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.workers, "feeder")

    def take(self, step: Step, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(samples of this step [b, *shape], on the device, which is not waited for; their numbers int64 [b])."""
        device = torch.device(device)
        pin = device.type == "cuda"  # in memory that a GPU copies from directly
        with self._lock:
            window = [replace(step, step=step.step + k) for k in range(self.ahead + 1)]
            for left in self._under_way.keys() - set(window):
                self._under_way.pop(left).cancel()
            for each in window:
                if each not in self._under_way:
                    self._under_way[each] = self._begin(each, pin)
            wanted = self._under_way.pop(step)
        samples, numbers = wanted.result()
        return samples.to(device, non_blocking=True), numbers

    def rows(self, index: Tensor) -> Tensor:
        """The samples with these numbers; for a damaged one, the next good one in the set's order."""
        return self._gather(index.tolist(), partial(self._after, index), False).result()[0]

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(samples, their numbers) in the set's order, at most `size` at once; the next ones are on their way."""
        ahead = self._range(0, size)
        for first in range(0, self.n, size):
            here, ahead = ahead, self._range(first + size, size)
            yield here.result()

    def _range(self, first: int, size: int) -> "Batch":
        index = torch.arange(first, max(first, min(first + size, self.n)))
        return self._gather(index.tolist(), partial(self._after, index), False)

    def _begin(self, step: Step, pin: bool) -> "Batch":
        return self._gather(step.order[0].tolist(), partial(self._in_epoch, step), pin)

    def _in_epoch(self, step: Step, k: int) -> Iterator[int]:
        """What comes after the step's sample k in the order of its epoch, round to its start."""
        epochs, places = step.places
        order, place = epoch_order(self.n, step.seed, int(epochs[k]))[0], int(places[k])
        return (int(order[(place + j) % self.n]) for j in range(1, self.n))

    def _after(self, index: Tensor, k: int) -> Iterator[int]:
        return ((int(index[k]) + j) % self.n for j in range(1, self.n))

    def _gather(self, index: list[int], others: Callable[[int], Iterator[int]], pin: bool) -> "Batch":
        """others(k): what may take the place of sample k."""
        out = torch.empty((len(index), *self.shape), dtype=self._torch_dtype, pin_memory=pin)
        rows, numbers, share = out.numpy(), list(index), self._share(len(index), out[:1].nbytes)

        def fill(first: int) -> None:
            for k, sample in enumerate(self._made(index[first : first + share]), first):
                numbers[k], rows[k] = (index[k], sample) if sample is not None else self._next(others(k))

        return Batch(out, numbers, [self._threads.submit(fill, first) for first in range(0, len(index), share)])

    def _share(self, n: int, size: int) -> int:
        """How many samples of so many bytes a thread makes of n: as many as leave work for every thread."""
        together = min(SHARE, SHARE_BYTES // max(size, 1), n * (self.ahead + 1) // self.workers)
        return max(together, n // (2 * self.workers) + 1)

    def _next(self, candidates: Iterator[int]) -> tuple[int, np.ndarray]:
        """The first that can be made, and its number."""
        for i in candidates:
            sample = self._made([i])[0]
            if sample is not None:
                return i, sample
        raise UserError(f"{self.name}: none of {self.n} can be read")

    def _made(self, numbers: list[int]) -> list[np.ndarray | None]:
        """The samples, None for a damaged one that is to be skipped."""
        known = self.bad.keys() & set(numbers)
        made = iter(self.make([i for i in numbers if i not in known]))
        return [None if i in known else self._checked(i, next(made)) for i in numbers]

    def _checked(self, i: int, sample: Sample) -> np.ndarray | None:
        if not isinstance(sample, UserError):
            return sample
        if isinstance(sample, DiskError) or not self.skip_bad:
            raise sample
        self._note(i, str(sample))
        return None

    def _note(self, i: int, why: str) -> None:
        with self._lock:
            known = i in self.bad
            self.bad[i] = why
        if not known:
            tell(f"{why}; the next one takes its place ({len(self.bad)} so far)")

    @cached_property
    def _torch_dtype(self) -> torch.dtype:
        return torch.from_numpy(np.empty(0, self.dtype)).dtype


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples, and their numbers, that threads are filling in."""

    out: Tensor
    numbers: list[int]
    parts: list[Future]

    def result(self) -> tuple[Tensor, Tensor]:
        for part in self.parts:
            part.result()
        return self.out, torch.tensor(self.numbers, dtype=torch.int64)

    def cancel(self) -> None:
        for part in self.parts:
            part.cancel()
