"""The training loop of one stage, top to bottom.

Everything random is a pure function of (seed, step) and the sample: a run that is killed at any moment and started
again ends with the same bits as one that never stopped, one on many processes with the weights of one on one, and a
checkpoint holds no state of a generator.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onejump import draws
from onejump.by_first import by_first
from onejump.checkpoint import checkpoint_path, saved_steps
from onejump.config import Stage
from onejump.data.augment import Seeded
from onejump.data.training_set import TrainingSet
from onejump.distributed import Team, apart
from onejump.guidance import drop_labels
from onejump.intervals import Every, Keeper, Reports, due
from onejump.methods.base import Company, Nets, Stats, together
from onejump.methods.ctm import CTM
from onejump.methods.ctm_gan import CTMGAN
from onejump.methods.tcm import TCM
from onejump.metrics_log import Progress, RunLog
from onejump.model import ConsistencyModel
from onejump.networks.magnitude import normalized
from onejump.run_state import BY_HAND, Run
from onejump.saver import Saver
from onejump.signals import Interrupted, StopOnSignal
from onejump.types import Cond, Samples, UserError
from onejump.watchdog import Watchdog

SKIPS_IN_A_ROW = 10
PASSES, AUGMENT, LABELS = 0, 1, 2  # what a seed is for
WHOLE_ONLY = (CTM, CTMGAN, *BY_HAND)  # methods whose weights must be in one piece


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
    team: Team | None = None,
    tensorboard: bool = False,
) -> TrainResult:
    """Train nets.student for stage.steps steps, counted from first_step, or go on from the last checkpoint in `out`.

    Ends before them where its rule says so. Both callbacks get the EMA model; what on_evaluate returns becomes a line
    of evaluations.jsonl. All processes of a team call this with the same arguments, and have both callbacks called; the
    first one writes. Raises Interrupted after SIGINT or SIGTERM, and UserError after 10 steps in a row whose loss or
    gradient was not finite, and where the data cannot be read, after a checkpoint of the steps done.
    """
    device, folder, last_step = torch.device(device), out / "checkpoints", first_step + stage.steps
    team = team or Team(device=device)
    check(stage, team)
    run = Run.start(stage, nets, first_step, device, team)
    saver = Saver(folder, team)
    resumed, warnings = restore(run, saver, last_step)
    log = RunLog(out, run.step, tensorboard, team.first, functools.partial(by_first, team))
    company = Company(team.sharded, team.mean)
    watchdog, snapshots = Watchdog(out, rank=team.rank, world=team.world), Keeper(run, out / "ema", last_step)
    with closing(progress), closing(log), together(company), StopOnSignal() as stop, watchdog as dog:
        progress.start(stage.steps, run.step - first_step)
        for warning in warnings:
            progress.message(warning)
        reports = Reports(run, team, every, last_step, log, on_sample, on_evaluate)
        snapshots.begin()
        with dog.resting():
            over = resumed and reports.at_step()  # a kill may have come between the checkpoint and its reports
        while run.step < last_step and not over:
            began = time.perf_counter()
            x0, cond = samples_of(data, stage, run, saver, seed, device)
            drawn = Drawn(mix(seed, run.step, PASSES), team.rank, team.world)
            with normalized(nets.student):  # EDM2's weights; here, so that the EMA has them as the steps left them
                loss, stats = accumulate(stage, nets, x0, cond, run.step, last_step, drawn, run.at_turn.scale)
            run.update(loss, stats, (run.step - first_step) / stage.steps, last_step)
            logs = due(run.step, every.log, last_step)
            if logs and device.type == "cuda":
                torch.cuda.synchronize(device)  # the line is about to wait for it; the seconds are those of the work
            run.count(time.perf_counter() - began)
            metrics = run.log_line() if logs else None
            if (metrics or device.type == "cpu") and run.skipped_in_row >= min(SKIPS_IN_A_ROW, stage.steps):
                raise diverged(run.step, run.skipped_in_row, folder)
            if metrics is not None:
                log.metric(metrics)
            progress.update(run.step - first_step, metrics)
            dog.beat(run.step)
            with dog.resting():  # disks may be slow, evaluations long
                snapshots.at_step()
                stopping = team.any(stop.requested)
                if due(run.step, every.save, last_step) or stopping:
                    saver.save(run.step, *run.packed())
                if stopping:
                    raise interrupted(run.step, saver, stop)
                over = reports.at_step()
        with dog.resting():
            save_once(run, saver)
            if team.any(stop.requested):  # during the last evaluation
                raise interrupted(run.step, saver, stop)
            saver.wait()
    images, path = (run.step - first_step) * stage.batch, checkpoint_path(folder, run.step)
    ema = run.whole_ema()
    return TrainResult(ema, first_step, run.step, **run.clock(), images=images, skipped=run.skipped, path=path)


def interrupted(step: int, saver: Saver, stop: StopOnSignal) -> Interrupted:
    """Once its checkpoint is whole; a signal to one process is one to all."""
    saver.wait()
    codes = [code for code in saver.team.all_told(stop.code if stop.requested else None) if code is not None]
    return Interrupted(step, checkpoint_path(saver.folder, step), min(codes))


def restore(run: Run, saver: Saver, last_step: int) -> tuple[bool, tuple[str, ...]]:
    """Whether there was a checkpoint to go on from, and one line for every damaged one; its tensors are not kept."""
    saved = saver.load(run.tensors())
    if saved is None:
        return False, ()
    run.restore(saved)
    if run.step > last_step:
        raise UserError(
            f"steps: the last checkpoint is at step {run.step}, this stage would end at {last_step}; raise steps"
        )
    return True, saved.warnings


def check(stage: Stage, team: Team, name: str = "") -> None:
    """Whether these processes can train this stage. name: the stage's, for messages. Raises UserError."""
    if team.world == 1:
        return
    world, kind, path = team.world, type(stage.method).__name__, f"{name}." if name else ""
    if team.sharded and isinstance(stage.method, WHOLE_ONLY):
        kind = f"{name}: {kind}" if name else kind
        raise UserError(f"--shard: {kind} takes gradients within a pass, which weights in pieces cannot; leave it out")
    if divides(stage, world):
        return
    share = -(-stage.batch // world)
    passes = -(-share // (stage.micro_batch or share))
    told = f"{path}batch: {stage.batch} images do not divide among {world} processes"
    if stage.batch % world == 0 and isinstance(stage.core, TCM):
        rho = f"{path}method.rho={stage.core.rho:.15g}"
        told = f"{path}batch: {stage.batch} in {passes * world} passes would change the share of samples at t', {rho}"
    first = max(stage.batch - stage.batch % world, world)
    sizes = (*range(first, 0, -world), *range(first + world, first + 65 * world, world))  # the nearest first, each way
    fitting = [size for size in sizes if divides(stage, world, size)]
    below = [size for size in fitting if size < stage.batch][:1]
    nearest = below + [size for size in fitting if size > stage.batch][:1]
    raise UserError(f"{told}; give {' or '.join(map(str, nearest)) or 'fewer processes'}")


def divides(stage: Stage, world: int, batch: int = 0) -> bool:
    """Whether a batch (0: the stage's) falls into equal parts, which with TCM hold both kinds of samples as it does."""
    batch = batch or stage.batch
    share, left = divmod(batch, world)
    if left or not isinstance(stage.core, TCM):
        return not left
    passes = -(-share // (stage.micro_batch or share))
    if share % passes:
        return False
    try:
        return replace(stage, batch=batch).keeps_shares(share // passes, stage.core.rho)
    except UserError:  # no batch for this stage, whatever the processes
        return False


def samples_of(
    data: TrainingSet, stage: Stage, run: Run, saver: Saver, seed: int, device: torch.device
) -> tuple[Samples, Cond]:
    """The samples of the step to come, and what the network is told of each: its class, and how it was augmented."""
    team, problem = saver.team, None
    rank, world = team.rank, team.world
    try:
        x0, cond = data.batch(run.step, stage.batch // world, seed, rank, world, device)
    except UserError as error:
        problem = error
    if team.any(problem is not None):
        raise unreadable(problem, run, saver)
    if stage.label_dropout and cond is not None:
        cond = drop_labels(cond, stage.label_dropout, Seeded.of(mix(seed, run.step, LABELS), rank, world))
    if stage.augment is None:
        return x0, cond
    x0, labels = stage.augment(x0, Seeded.of(mix(seed, run.step, AUGMENT), rank, world))
    if cond is None:
        return x0, labels
    one_hot = cond[:, None] == torch.arange(data.classes, device=cond.device)  # zeros where there is no label
    return x0, torch.cat([one_hot.to(labels), labels], 1)


def unreadable(problem: UserError | None, run: Run, saver: Saver) -> UserError:
    """What to raise where this process, or another one, could not read its samples; saves what is done."""
    told = saver.team.all_told(None if problem is None else str(problem))
    text = next(found for found in told if found is not None)
    if saver.team.told(run.train_seconds) == 0:  # nothing to lose
        return UserError(text)
    save_once(run, saver)
    saver.wait()
    return UserError(f"{text}; training stopped after step {run.step}, which is saved")


def save_once(run: Run, saver: Saver) -> None:
    """The checkpoint of this step, unless it is there."""
    saver.wait()
    if saver.team.told(run.step not in saved_steps(saver.folder)):
        saver.save(run.step, *run.packed())


def mix(*numbers: int) -> int:
    """A seed of 63 bits for these numbers: each in turn goes through the finaliser of splitmix64.

    The finaliser is a bijection of 64-bit words in which every input bit flips each output bit with probability about
    one half, so neighbours share nothing, also in the low 32 bits, which are all that torch's generator on the CPU
    takes.
    """
    word, h = (1 << 64) - 1, 0
    for value in numbers:
        h = (h + value + 0x9E3779B97F4A7C15) & word
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & word
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & word
        h ^= h >> 31
    return h >> 1


@dataclass(frozen=True)
class Drawn:
    """The randomness of one step: its seed, and which of the samples are those of this process."""

    seed: int
    rank: int = 0
    world: int = 1

    @contextmanager
    def passes(self, micro: int, micros: int, n: int) -> Iterator[None]:
        """Micro-batch `micro` of the n samples of this process; each draws for all samples of the step."""
        torch.manual_seed(self.seed)
        with draws.rows(self.rank + self.world * micro, self.world * micros, self.world * n):
            yield


def accumulate(
    stage: Stage, nets: Nets, x0: Samples, cond: Cond, step: int, steps: int, drawn: Drawn, scale: Tensor
) -> tuple[Tensor, Stats]:
    """Add the gradient of the mean loss over x0, times scale, to the student, a micro-batch at a time.

    Micro-batch m of M holds samples m, m + M, m + 2 M, ..., and counts by its share of them. Returns the mean loss and
    the statistics of all samples.
    """
    micros = -(-len(x0) // (stage.micro_batch or len(x0)))
    total, stats = torch.zeros((), device=x0.device), []
    for micro in range(micros):
        x0_part, cond_part = x0[micro::micros], None if cond is None else cond[micro::micros]
        with apart(nets.student) if micro + 1 < micros else nullcontext():  # gradients meet in the last pass
            with drawn.passes(micro, micros, len(x0)):
                loss, stat = stage.method.loss(nets, x0_part, cond_part, step, steps)
            loss = loss * (len(x0_part) / len(x0))
            (loss * scale).backward()
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
