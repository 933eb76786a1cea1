"""The training loop of one stage, top to bottom.

Everything random is a pure function of (seed, step, rank): a run that is killed at any moment and started again ends
with the same bits as one that never stopped, and a checkpoint holds no state of a generator.
"""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from onejump.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint, saved_steps
from onejump.config import Stage
from onejump.data.augment import Seeded
from onejump.data.training_set import TrainingSet
from onejump.methods.base import Nets, Stats
from onejump.metrics_log import Progress, RunLog
from onejump.model import ConsistencyModel
from onejump.networks.magnitude import normalize_weights
from onejump.run_state import Run
from onejump.types import Cond, Samples, UserError

SKIPS_IN_A_ROW = 10
AUGMENT = -1  # the number of a pass that no micro-batch has


@dataclass(frozen=True)
class Every:
    """Intervals in optimiser steps, counted over the whole chain; each also happens at the end. 0: only there."""

    log: int = 25
    save: int = 200
    sample: int = 200
    evaluate: int = 200


@dataclass(frozen=True)
class TrainResult:
    """How a stage ended. ema: its averaged model, float32, in eval mode."""

    ema: ConsistencyModel
    first_step: int
    last_step: int
    seconds: float  # on the clock, over all resumes
    train_seconds: float  # without sampling, evaluating and saving
    images: int
    skipped: int  # steps whose gradient was not finite
    path: Path  # of the last checkpoint


class Interrupted(Exception):
    """Training was asked to stop, and did so after a complete step whose checkpoint is at `path`."""

    def __init__(self, step: int, path: Path):
        super().__init__(f"stopped after step {step}; checkpoint: {path}")
        self.step, self.path = step, path


def train(
    stage: Stage,
    nets: Nets,
    data: TrainingSet,
    out: Path,
    *,
    seed: int,
    first_step: int,
    every: Every,
    device: torch.device | str,
    progress: Progress,
    on_sample: Callable[[ConsistencyModel, int], None],
    on_evaluate: Callable[[ConsistencyModel, int], dict[str, Any]],
    rank: int = 0,
    world: int = 1,
    tensorboard: bool = False,
) -> TrainResult:
    """Train nets.student for stage.steps steps, counted from first_step, or go on from the last checkpoint in `out`.

    Both callbacks get the EMA model; what on_evaluate returns becomes a line of evaluations.jsonl. Raises Interrupted
    after SIGINT or SIGTERM, and UserError after 10 steps in a row whose loss or gradient was not finite, and where the
    data cannot be read, after a checkpoint of the steps done.
    """
    device, folder, last_step = torch.device(device), out / "checkpoints", first_step + stage.steps
    run = Run.start(stage, nets, first_step, device)
    resumed, warnings = restore(run, folder)
    check(stage, run.step, last_step, world)
    log = RunLog(out, run.step, tensorboard)
    with closing(progress), closing(log), StopOnSignal() as stop:
        progress.start(stage.steps, run.step - first_step)
        for warning in warnings:
            progress.message(warning)
        reports = Reports(run, every, last_step, log, on_sample, on_evaluate)
        if resumed:
            reports.at_step()  # a kill may have come between the checkpoint and its reports
        while run.step < last_step:
            began = time.perf_counter()
            x0, cond = samples_of(data, stage, run, folder, seed, rank, world, device)
            run.set_rate(stage.rate.rate(run.step, (run.step - first_step) / stage.steps))
            normalize_weights(nets.student)  # of EDM2's network; here, so that the EMA has them as the steps left them
            seed_of = functools.partial(mix, seed, run.step, rank)
            loss, stats = accumulate(stage, nets, x0, cond, run.step, last_step, seed_of, run.scaler)
            run.scaler.unscale_(run.trained)
            grad_norm = nn.utils.clip_grad_norm_(run.parameters, stage.clip)
            finite = bool((loss + grad_norm).isfinite())  # waits for the device
            if finite:
                run.scaler.step(run.trained)
                run.average(stage.ema, last_step)
                run.sums.add(loss, grad_norm, stats)
            run.scaler.update()
            run.zero_grad()
            run.count_step(finite, time.perf_counter() - began)
            if run.skipped_in_row == min(SKIPS_IN_A_ROW, stage.steps):
                raise diverged(run.step, run.skipped_in_row, folder)

            metrics = run.log_line(stage.batch) if due(run.step, every.log, last_step) else None
            if metrics is not None:
                log.write(log.metrics, metrics)
            progress.update(run.step - first_step, metrics)
            if due(run.step, every.save, last_step) or stop.requested:
                path = save_checkpoint(folder, run.step, *run.packed())
                if stop.requested:
                    raise Interrupted(run.step, path)
            reports.at_step()
        if stop.requested:  # during the last evaluation
            raise Interrupted(run.step, checkpoint_path(folder, run.step))
    images, path = stage.steps * stage.batch, checkpoint_path(folder, last_step)
    return TrainResult(run.ema, first_step, last_step, **run.clock(), images=images, skipped=run.skipped, path=path)


def restore(run: Run, folder: Path) -> tuple[bool, tuple[str, ...]]:
    """Whether there was a checkpoint to go on from, and one line for every damaged one; its tensors are not kept."""
    saved = load_checkpoint(folder)
    if saved is None:
        return False, ()
    run.restore(saved)
    return True, saved.warnings


def check(stage: Stage, step: int, last_step: int, world: int) -> None:
    if step > last_step:
        raise UserError(
            f"steps: the last checkpoint is at step {step}, this stage would end at {last_step}; raise steps"
        )
    if stage.batch % world:
        raise UserError(f"batch: {stage.batch} images do not divide among {world} processes")


def samples_of(
    data: TrainingSet, stage: Stage, run: Run, folder: Path, seed: int, rank: int, world: int, device: torch.device
) -> tuple[Samples, Cond]:
    """The samples of the step to come, and what the network is told of each: its class, and how it was augmented."""
    try:
        x0, cond = data.batch(run.step, stage.batch // world, seed, rank, world, device)
    except UserError as error:
        if run.train_seconds == 0:  # nothing to lose
            raise
        if run.step not in saved_steps(folder):
            save_checkpoint(folder, run.step, *run.packed())
        raise UserError(f"{error}; training stopped after step {run.step}, which is saved") from error
    if stage.augment is None:
        return x0, cond
    x0, labels = stage.augment(x0, Seeded.of(mix(seed, run.step, rank, AUGMENT)))
    if cond is None:
        return x0, labels
    return x0, torch.cat([one_hot(cond, data.classes).to(labels), labels], 1)


def due(step: int, interval: int, last_step: int) -> bool:
    return step == last_step or (interval > 0 and step % interval == 0)


def mix(seed: int, step: int, rank: int, micro: int) -> int:
    """A seed of 63 bits for one pass: each number in turn goes through the finaliser of splitmix64.

    The finaliser is a bijection of 64-bit words in which every input bit flips each output bit with probability about
    one half, so (seed, step, rank, micro) and its neighbours share nothing, also in the low 32 bits, which are all
    that torch's generator on the CPU takes.
    """
    word, h = (1 << 64) - 1, 0
    for value in (seed, step, rank, micro):
        h = (h + value + 0x9E3779B97F4A7C15) & word
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & word
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & word
        h ^= h >> 31
    return h >> 1


def accumulate(
    stage: Stage,
    nets: Nets,
    x0: Samples,
    cond: Cond,
    step: int,
    steps: int,
    seed_of: Callable[[int], int],
    scaler: torch.amp.GradScaler,
) -> tuple[Tensor, Stats]:
    """Add the gradient of the mean loss over x0 to the student, a micro-batch at a time, each weighted by its share.

    seed_of(i) seeds torch for micro-batch i. Returns the mean loss and the statistics of all samples.
    """
    size = stage.micro_batch or len(x0)
    total, stats = torch.zeros((), device=x0.device), []
    for micro, x0_part in enumerate(x0.split(size)):
        cond_part = None if cond is None else cond[micro * size : micro * size + len(x0_part)]
        torch.manual_seed(seed_of(micro))
        loss, stat = stage.method.loss(nets, x0_part, cond_part, step, steps)
        loss = loss * (len(x0_part) / len(x0))
        scaler.scale(loss).backward()
        total += loss.detach()
        stats.append(stat)
    return total, {name: torch.cat([stat[name].detach() for stat in stats]) for name in ("t", "distance")}


def diverged(step: int, skipped: int, folder: Path) -> UserError:
    saved = saved_steps(folder)
    last = f"the last good checkpoint is {checkpoint_path(folder, saved[-1])}" if saved else "none is saved yet"
    return UserError(
        f"step {step}: the loss or its gradient was not finite {skipped} steps in a row; {last}; "
        "try a lower rate, precision=bf16 or fp32, or a smaller clip"
    )


@dataclass(frozen=True)
class Reports:
    """Samples and evaluations of the EMA model, at their intervals."""

    run: Run
    every: Every
    last_step: int
    log: RunLog
    on_sample: Callable[[ConsistencyModel, int], None]
    on_evaluate: Callable[[ConsistencyModel, int], dict[str, Any]]

    def at_step(self) -> None:
        """What is due at this step; an evaluation that is already on file is not repeated."""
        step = self.run.step
        if due(step, self.every.sample, self.last_step):
            self.on_sample(self.run.ema, step)
        if due(step, self.every.evaluate, self.last_step) and self.log.evaluations.last_step != step:
            line = {"step": step, **self.run.clock(), **self.on_evaluate(self.run.ema, step)}
            self.log.write(self.log.evaluations, line)


class StopOnSignal:
    """Within it, the first SIGINT or SIGTERM sets `requested`; a second one acts at once, as it would without.

    Only the main thread may install handlers; elsewhere `requested` stays False.
    """

    def __init__(self) -> None:
        self.requested = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.restore()

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self.previous = {}

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self.restore()
            signal.raise_signal(number)
        self.requested = True
        os.write(2, b"\nStopping after this step; once more to stop at once.\n")  # print may not be re-entered here
