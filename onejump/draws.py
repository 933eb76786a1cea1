"""The randomness of methods: drawn, row by row, for the whole batch of an optimiser step.

A pass over some of its rows draws for all of them and takes its own, so that neither the number of processes nor that
of micro-batches changes what a sample is given. Without `rows`, a pass is the whole batch. Everything comes from
torch's generator; times and indices are drawn on the CPU, where looking at them waits for no device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from onejump.types import Samples


@dataclass(frozen=True)
class Rows:
    """Rows first, first + every, first + 2 every, ... of `total`."""

    first: int
    every: int
    total: int

    def of(self, drawn: Tensor) -> Tensor:
        return drawn[self.first :: self.every].contiguous()


_rows: ContextVar[Rows | None] = ContextVar("rows", default=None)


@contextmanager
def rows(first: int, every: int, total: int) -> Iterator[None]:
    """Within it, a pass has these rows of a batch of `total`: those of one process, or one micro-batch."""
    before = _rows.set(Rows(first, every, total))
    try:
        yield
    finally:
        _rows.reset(before)


def _drawn(n: int, draw: Callable[[int], Tensor]) -> Tensor:
    mine = _rows.get()
    if mine is None or mine.every == 1:
        return draw(n)
    found = mine.of(draw(mine.total))
    assert len(found) == n, f"{n} samples in a pass of {len(found)} rows"
    return found


def places(n: int) -> tuple[Int64[Tensor, " n"], int]:
    """(the places of the n rows of this pass in the whole batch, the size of that)."""
    mine = _rows.get() or Rows(0, 1, n)
    return mine.of(torch.arange(mine.total)), mine.total


def normal_like(x: Samples) -> Samples:
    """eps ~ N(0, 1), one number for each of x's."""
    mine = _rows.get()
    if mine is None or mine.every == 1:
        return torch.randn_like(x)
    return mine.of(torch.randn(mine.total, *x.shape[1:], dtype=x.dtype, device=x.device))


def uniform(n: int) -> Float[Tensor, " n"]:
    """Uniform on [0, 1), float64."""
    return _drawn(n, lambda n: torch.rand(n, dtype=torch.float64))


def integers(low: int, high: int, n: int) -> Int64[Tensor, " n"]:
    """low, ..., high - 1 with equal probability."""
    return _drawn(n, lambda n: torch.randint(low, high, (n,)))


def categories(p: Float[Tensor, " k"], n: int) -> Int64[Tensor, " n"]:
    """0, ..., k - 1 with these probabilities."""
    return _drawn(n, lambda n: torch.multinomial(p, n, replacement=True))


def keys(n: int, device: torch.device) -> Int64[Tensor, " n"]:
    """Dropout keys."""
    return _drawn(n, lambda n: torch.randint(2**62, (n,), device=device))
