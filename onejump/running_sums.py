"""What the lines of metrics.jsonl are the means of."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from onejump.methods.base import Stats
from onejump.model import beside

BINS, T_LOW, T_HIGH = 16, 0.002, 80.0  # of loss_by_t


def time_bin(t: Tensor) -> Tensor:
    """Which of the 16 bins, even in ln t between 0.002 and 80, holds each t; the end bins take what is outside."""
    share = (t.double() / T_LOW).log() / math.log(T_HIGH / T_LOW)
    return (share * BINS).floor().clamp(0, BINS - 1).long()


@dataclass
class RunningSums:
    """Sums over the steps since the last log line, on the device, which is not waited for. Skipped steps count in time
    only."""

    loss: Tensor
    grad_norm: Tensor
    good: Tensor  # steps that were not skipped
    distance: Tensor  # [16], by time
    count: Tensor  # [16], samples
    steps: int = 0
    seconds: float = 0.0

    @classmethod
    def zero(cls, device: torch.device) -> "RunningSums":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(zeros(), zeros(), zeros(), zeros(BINS), zeros(BINS))

    def add(self, loss: Tensor, grad_norm: Tensor, stats: Stats, good: Tensor) -> None:
        """good: whether the step was taken, a bool on the device."""
        bins, distance = beside(time_bin(stats["t"]), self.loss), stats["distance"].detach().double()
        self.loss += torch.where(good, loss, 0.0)
        self.grad_norm += torch.where(good, grad_norm, 0.0)
        self.good += good
        self.distance.index_add_(0, bins, torch.where(good, distance, 0.0))
        self.count.index_add_(0, bins, good.expand(len(bins)).double())

    def over(self, total: Callable[[Tensor], Tensor]) -> "RunningSums":
        """Of all processes, of which `total` is the sum: losses and norms are the same on all, samples are not."""
        distance, count = total(torch.stack([self.distance, self.count]))
        return replace(self, distance=distance, count=count)

    def means(self) -> dict[str, Any]:
        """Means over the good steps; None where there were none, or no sample in a bin."""
        loss, grad_norm, good, *sums = torch.cat([tensor.reshape(-1) for tensor in self.tensors().values()]).tolist()
        pairs = zip(sums[:BINS], sums[BINS:], strict=True)
        return {
            "loss": loss / good if good else None,
            "grad_norm": grad_norm / good if good else None,
            "loss_by_t": [distance / count if count else None for distance, count in pairs],
        }

    def tensors(self) -> dict[str, Tensor]:
        names = ("loss", "grad_norm", "good", "distance", "count")
        return {name: getattr(self, name) for name in names}

    def meta(self) -> dict[str, Any]:
        return {"steps": self.steps, "seconds": self.seconds}
