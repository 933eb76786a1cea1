"""Everything that changes while a stage trains, which is what its checkpoints hold."""

import copy
import functools
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from onejump.analytic import AnalyticPrecond
from onejump.checkpoint import Checkpoint
from onejump.config import Stage
from onejump.distributed import Team, hollow, local, spread, whole
from onejump.ema import PowerEMA
from onejump.engine import Engine
from onejump.methods.base import Nets, Stats
from onejump.methods.continuous import ContinuousCD, ContinuousCT
from onejump.model import ConsistencyModel
from onejump.posthoc import Averager
from onejump.running_sums import RunningSums
from onejump.types import UserError
from onejump.update import Updater

PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BY_HAND = (ContinuousCT, ContinuousCD)  # methods whose forward derivatives cannot pass through DDP
CRITIC = "critic_optimizer"  # the prefix of its state in a checkpoint


@dataclass
class Run:
    """The networks, the student's EMA, the updates of the weights and the counters. `frozen` is a checksum of what must
    not change and a checkpoint does not hold: the teacher, the target's own networks, a table given as a file. `frame`:
    the EMA's model without its numbers, where those are in pieces."""

    stage: Stage
    nets: Nets
    ema: ConsistencyModel
    updater: Updater
    critic: Updater | None
    sums: RunningSums
    frozen: str
    step: int
    team: Team
    frame: ConsistencyModel | None = None
    averager: Averager | None = None
    rate: float = 0.0
    train_seconds: float = 0.0
    seconds_before: float = 0.0  # on the clock, before the last resume
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def start(cls, stage: Stage, nets: Nets, first_step: int, device: torch.device, team: Team | None = None) -> "Run":
        """A run before its first step: networks moved and in train mode, in the stage's precision; weights float32.

        team: whose processes then run them together.
        """
        team = team or Team(device=device)
        ema = copy.deepcopy(nets.student.to(device)).eval().requires_grad_(False)
        ema.jump = stage.sampling_jump(ema.jump)
        for model in nets.models:
            model.to(device).train(model is not nets.teacher).autocast = PRECISIONS[stage.precision]
        frozen = checksum_of_frozen(stage, nets)
        backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
        for backend in backends:
            backend.allow_tf32 = stage.precision == "tf32"  # fp32 is what it says, as in the published runs
        scaled = stage.precision == "fp16"
        frame = hollow(ema) if team.sharded else None
        prepare(stage, nets, ema, team)
        critic = None
        if nets.critic:
            nets.critic.net.to(device).train()
            critic = Updater(nets.critic.optimizer, trained(nets.critic.net), scaled=scaled)
        averager = averager_of(stage, nets.student, first_step)
        averages: list[Any] = [followers(nets.student, ema)]
        averages += [followers(nets.student, nets.average.model)] if nets.average else []
        averages += averager.lists if averager else []
        in_pieces = torch.tensor([spread(p) for p in trained(nets.student)], device=device)
        summed = functools.partial(norms_summed, team, in_pieces)
        return cls(
            stage=stage,
            nets=nets,
            ema=ema,
            updater=Updater(stage.optimizer, trained(nets.student), averages, scaled=scaled, summed=summed),
            critic=critic,
            sums=RunningSums.zero(device),
            frozen=frozen,
            step=first_step,
            team=team,
            frame=frame,
            averager=averager,
        )

    def whole_ema(self) -> ConsistencyModel:
        """In one piece, in eval mode; all processes must call it."""
        return whole(self.ema, self.frame, self.team.device) if self.frame else self.ema

    @property
    def student(self) -> ConsistencyModel:
        return self.nets.student

    @property
    def at_turn(self) -> Updater:
        """Of what this step trains: the student, or the critic at its turns."""
        if self.critic and self.nets.critic and self.nets.critic.turn(self.step):
            return self.critic
        return self.updater

    def update(self, loss: Tensor, stats: Stats, progress: float, steps: int) -> None:
        """Take the step that the gradients say, average the weights, and go on to the next step.

        Where the loss or a gradient is not finite nothing changes but the counts. progress: the share of the stage that
        is done; steps: the end of the chain.
        """
        updater, self.rate, decays = self.at_turn, self.stage.rate.rate(self.step, progress), self.decays(steps)
        if updater is self.critic or self.student.runner is self.student.net:  # no wrapper that does it
            self.team.average_gradients(updater.parameters)
        loss = self.team.mean(loss)
        if self.nets.critic and updater is self.critic:
            grad_norm = updater.step(loss, self.nets.critic.rate, (), self.stage.clip)
            self.updater.follow(decays, updater.skipped_in_row.clamp(max=1).float())
        else:
            grad_norm = updater.step(loss, self.rate, decays, self.stage.clip)
        if self.nets.critic:
            self.nets.critic.net.zero_grad()  # of its part in the student's loss
        self.sums.add(loss, grad_norm, stats, good=updater.skipped_in_row == 0)
        self.step += 1

    def decays(self, steps: int) -> list[float]:
        """The share that each average of the student keeps in this step. Power functions are of steps, and see the
        student stand still while the critic is trained; others, and the method's own, are of the student's updates."""
        is_update = self.at_turn is self.updater
        decays = [self.stage.ema.decay(self.step + 1) if is_update or isinstance(self.stage.ema, PowerEMA) else 1.0]
        if self.nets.average:
            decays.append(self.nets.average.decay(self.step, steps) if is_update else 1.0)
        return decays + (self.averager.decays(self.step + 1) if self.averager else [])

    @property
    def skipped(self) -> int:
        """Steps so far that were not finite; waits for the device."""
        return sum(int(updater.skipped) for updater in self.updaters.values())

    @property
    def skipped_in_row(self) -> int:
        """Up to now; waits for the device."""
        return max(int(updater.skipped_in_row) for updater in self.updaters.values())

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds besides optimisers and counters, by name."""
        found: dict[str, nn.Module] = {"student": self.student, "ema": self.ema}
        if self.nets.average:
            found["average"] = self.nets.average.model
        if self.nets.critic:
            found["critic"] = self.nets.critic.net
        return found

    @property
    def updaters(self) -> dict[str, Updater]:
        return {"optimizer": self.updater} | ({CRITIC: self.critic} if self.critic else {})

    def count(self, seconds: float) -> None:
        """The seconds that a step has taken."""
        self.train_seconds += seconds
        self.sums.steps += 1
        self.sums.seconds += seconds

    def clock(self) -> dict[str, float]:
        """seconds: on the clock; train_seconds: without sampling, evaluating and saving. Both over all resumes."""
        seconds = self.seconds_before + time.perf_counter() - self.began
        return {"seconds": seconds, "train_seconds": self.train_seconds}

    def log_line(self) -> dict[str, Any]:
        """The line of metrics.jsonl for the steps since the last one; the sums start again from zero."""
        sums, self.sums = self.sums.over(self.team.sum), RunningSums.zero(self.sums.loss.device)
        means = sums.means()
        return {
            "step": self.step,
            "loss": means["loss"],
            "rate": self.rate,
            "grad_norm": means["grad_norm"],
            "images_per_second": self.stage.batch * sums.steps / max(sums.seconds, 1e-9),
            "skipped": self.skipped,
            **self.clock(),
            "loss_by_t": means["loss_by_t"],
        }

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint; those of weights in pieces are the very ones that are trained."""
        sums = self.sums.over(self.team.sum)
        tensors = _named("sums", sums.tensors())
        for name, module in self.modules.items():
            tensors |= _named(name, module.state_dict())
        for name, updater in self.updaters.items():
            tensors |= _named(name, updater.tensors())
        return tensors | (_named("snapshots", self.averager.tensors()) if self.averager else {})

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, meta) for a checkpoint. Raises UserError rather than save a number that is not finite."""
        tensors = self.tensors()
        parts = {name: local(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
        bad = next((name for name, part in parts.items() if not part.isfinite().all()), None)
        if self.team.any(bad is not None):
            bad = next(name for name in self.team.all_told(bad) if name)
            raise UserError(f"step {self.step}: {bad} is no longer finite and was not saved; try a lower rate")
        return tensors, {"sums": self.sums.meta(), "rate": self.rate, "frozen": self.frozen, **self.clock()}

    def restore(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint. Raises UserError if it belongs to other networks or another optimiser."""
        meta, tensors = saved.meta, saved.tensors
        if meta["frozen"] != self.frozen:
            raise UserError(
                f"{saved.path}: the frozen network is not the one this stage began with, or the table of its jump is "
                "another: what they come from has changed; bring it back, or delete the stage's folder to train again"
            )
        for prefix, module in self.modules.items():
            _load(module, prefix, saved)
        for name, updater in self.updaters.items():
            updater.load(_without(name, tensors))
        if self.averager:
            self.averager.load(_without("snapshots", tensors))
        device = self.sums.loss.device
        sums: dict[str, Any] = {name: tensors[f"sums/{name}"].to(device) for name in self.sums.tensors()}
        self.sums = RunningSums(**sums, **meta["sums"])
        if not self.team.first:  # the first process goes on with the sums of all
            self.sums.distance.zero_(), self.sums.count.zero_()
        self.step, self.rate = saved.step, meta["rate"]
        self.train_seconds, self.seconds_before = meta["train_seconds"], meta["seconds"]


def checksum_of_frozen(stage: Stage, nets: Nets) -> str:
    frozen = hashlib.sha256()
    if isinstance(stage.jump, AnalyticPrecond) and stage.jump.table:
        frozen.update(repr(nets.student.jump).encode())
    for model in (*nets.frozen, *((nets.teacher,) if nets.teacher else ())):
        for p in model.parameters():
            frozen.update(p.detach().cpu().contiguous().numpy().data)
    return frozen.hexdigest()


def norms_summed(team: Team, in_pieces: Tensor, squares: Tensor) -> Tensor:
    """The square of the norm of a whole gradient, from those of its tensors' parts on this process."""
    if not team.sharded:
        return squares.sum()
    zero = squares.new_zeros(())
    return team.shard_sum(torch.where(in_pieces, squares, zero).sum()) + torch.where(in_pieces, zero, squares).sum()


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def prepare(stage: Stage, nets: Nets, ema: ConsistencyModel, team: Team) -> None:
    """How the networks run, on this device and on these processes."""
    engine = Engine.for_device(team.device)
    engine = replace(engine, channels_last=engine.channels_last and not team.sharded)  # FSDP2 wants rows of weights
    for model in (ema, *nets.models):
        how = replace(engine, compiled=engine.compiled and model is not ema)  # which other code copies and saves
        how.prepare(model, checkpointing=stage.checkpointing and model is nets.student)
        team.wrap(model, trained=model is nets.student and not isinstance(stage.method, BY_HAND))


def averager_of(stage: Stage, student: ConsistencyModel, first_step: int) -> Averager | None:
    """Of the snapshots that the stage keeps."""
    named = {name: p for name, p in student.net.named_parameters() if p.requires_grad}
    return Averager(stage.snapshots, named, first_step) if stage.snapshots else None


def followers(student: nn.Module, average: nn.Module) -> list[nn.Parameter]:
    """Of an average of the student, the parameters that follow its trained ones, in their order."""
    theirs = dict(average.named_parameters())
    return [theirs[name] for name, p in student.named_parameters() if p.requires_grad]


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _without(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names start with it, by the rest of their names."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _load(module: nn.Module, prefix: str, saved: Checkpoint) -> None:
    try:
        module.load_state_dict(_without(prefix, saved.tensors))
    except RuntimeError as error:
        raise UserError(
            f"{saved.path}: its weights do not fit this network; train with that run's recipe, or into a new folder"
        ) from error
