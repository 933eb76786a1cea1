"""The phases of a training step, timed without waiting for the device within it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onejump.methods.base import Nets

PHASES = ("data", "forward", "target", "backward", "optimiser", "EMA", "other")


@dataclass
class Phases:
    """When each phase of one step began, by the clock of the device; one thread of a CPU is timed by processor time."""

    device: torch.device
    marks: list[tuple[str, Any]] = field(default_factory=list)
    passes: int = 0  # images through networks; 3 for each that goes backwards too

    def enter(self, name: str) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Of each phase, once the step is over and `enter` has been called for what comes after it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = dict.fromkeys(PHASES, 0.0)
        for (name, began), (_, ended) in zip(self.marks, self.marks[1:], strict=False):
            found[name] += began.elapsed_time(ended) / 1e3 if self.device.type == "cuda" else ended - began
        return found


@contextmanager
def watched(nets: Nets, phases: Phases) -> Iterator[None]:
    """Within it, passes of the networks are phases: forward with gradients, else target; backward from their end on."""

    def before(is_student: bool, n: int) -> None:
        phases.enter("forward" if is_student and torch.is_grad_enabled() else "target")
        phases.passes += n * (3 if torch.is_grad_enabled() else 1)

    def after(out: Tensor) -> None:
        phases.enter("other")
        if out.requires_grad:
            out.register_hook(lambda grad: phases.enter("backward"))

    handles = []
    for model in nets.models:

        def began(
            module: nn.Module,
            args: Any,
            is_student: bool = model is nets.student,
            passes: int = model.passes,
        ) -> None:
            before(is_student, passes * len(args[0]))

        handles.append(model.runner.register_forward_pre_hook(began))
        handles.append(model.runner.register_forward_hook(lambda module, args, out: after(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
