"""Everything that changes while a stage trains, which is what its checkpoints hold."""

import copy
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onejump.analytic import AnalyticPrecond
from onejump.checkpoint import Checkpoint, pack_optimizer, unpack_optimizer
from onejump.config import Stage
from onejump.ema import EMA, update_ema
from onejump.methods.base import Nets
from onejump.metrics_log import RunningSums
from onejump.model import ConsistencyModel
from onejump.types import UserError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Run:
    """The networks, the student's EMA, the optimiser, the loss scale and the counters. `frozen` is a checksum of what
    must not change and a checkpoint does not hold: the teacher, the target's own networks, a table given as a file."""

    nets: Nets
    ema: ConsistencyModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sums: RunningSums
    frozen: str
    step: int
    skipped: int = 0
    skipped_in_row: int = 0
    train_seconds: float = 0.0
    seconds_before: float = 0.0  # on the clock, before the last resume
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def start(cls, stage: Stage, nets: Nets, first_step: int, device: torch.device) -> "Run":
        """A run before its first step: networks moved and in train mode, in the stage's precision; weights float32.

        The loss scale of fp16 starts at 16 and doubles every 20,000 steps (TCM's released settings).
        """
        nets.student.to(device)
        ema = copy.deepcopy(nets.student).eval().requires_grad_(False)
        frozen = hashlib.sha256()
        average = (nets.average.model,) if nets.average else ()
        teacher = (nets.teacher,) if nets.teacher else ()
        for model in (nets.student, *average, *nets.frozen, *teacher):
            model.to(device).train(model not in teacher).autocast = PRECISIONS[stage.precision]
        if isinstance(stage.jump, AnalyticPrecond) and stage.jump.table:
            frozen.update(repr(nets.student.jump).encode())
        for p in (p for model in (*nets.frozen, *teacher) for p in model.parameters()):
            frozen.update(p.detach().cpu().contiguous().numpy().data)
        if nets.critic:
            nets.critic.net.to(device).train()
        torch.backends.cudnn.allow_tf32 = False  # fp32 is what it says, as in the published runs
        return cls(
            nets=nets,
            ema=ema,
            optimizer=stage.optimizer.build(p for p in nets.student.parameters() if p.requires_grad),
            scaler=torch.amp.GradScaler(
                device.type, init_scale=16.0, growth_interval=20_000, enabled=stage.precision == "fp16"
            ),
            sums=RunningSums.zero(device),
            frozen=frozen.hexdigest(),
            step=first_step,
        )

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @property
    def student(self) -> ConsistencyModel:
        return self.nets.student

    @property
    def critics_turn(self) -> bool:
        return self.nets.critic is not None and self.nets.critic.turn(self.step)

    @property
    def trained(self) -> torch.optim.Optimizer:
        """The optimiser of this step: the student's, or the critic's at its turns."""
        return self.nets.critic.optimizer if self.nets.critic and self.critics_turn else self.optimizer

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.trained.param_groups for p in group["params"]]

    def average(self, ema: EMA, steps: int) -> None:
        """After a step of the student: its EMA for evaluation, and the average that is its target."""
        if self.critics_turn:
            return
        update_ema(self.ema, self.student, ema.decay(self.step + 1))
        if self.nets.average:
            update_ema(self.nets.average.model, self.student, self.nets.average.decay(self.step, steps))

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        if self.nets.critic:
            self.nets.critic.optimizer.zero_grad()

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
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        found = {"optimizer": self.optimizer}
        return found | {"critic_optimizer": self.nets.critic.optimizer} if self.nets.critic else found

    def count_step(self, finite: bool, seconds: float) -> None:
        self.step += 1
        self.skipped += not finite
        self.skipped_in_row = 0 if finite else self.skipped_in_row + 1
        self.train_seconds += seconds
        self.sums.steps += 1
        self.sums.seconds += seconds

    def clock(self) -> dict[str, float]:
        """seconds: on the clock; train_seconds: without sampling, evaluating and saving. Both over all resumes."""
        seconds = self.seconds_before + time.perf_counter() - self.began
        return {"seconds": seconds, "train_seconds": self.train_seconds}

    def log_line(self, batch: int) -> dict[str, Any]:
        """The line of metrics.jsonl for the steps since the last one; the sums start again from zero."""
        sums, self.sums = self.sums, RunningSums.zero(self.sums.loss.device)
        means = sums.means()
        return {
            "step": self.step,
            "loss": means["loss"],
            "rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": means["grad_norm"],
            "images_per_second": batch * sums.steps / max(sums.seconds, 1e-9),
            "skipped": self.skipped,
            **self.clock(),
            "loss_by_t": means["loss_by_t"],
        }

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, meta) for save_checkpoint. Raises UserError rather than save a number that is not finite."""
        tensors, kinds = _named("sums", self.sums.tensors()), {}
        for name, module in self.modules.items():
            tensors |= _named(name, module.state_dict())
        for name, optimizer in self.optimizers.items():
            packed, kinds[name] = pack_optimizer(optimizer, name)
            tensors |= packed
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(f"step {self.step}: {name} is no longer finite and was not saved; try a lower rate")
        meta = {
            **kinds,
            "scaler": self.scaler.state_dict(),
            "sums": self.sums.meta(),
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "frozen": self.frozen,
            **self.clock(),
        }
        return tensors, meta

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
        for name, optimizer in self.optimizers.items():
            unpack_optimizer(optimizer, tensors, meta[name], name)
        if meta["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(meta["scaler"])
        device = self.sums.loss.device
        sums: dict[str, Any] = {name: tensors[f"sums/{name}"].to(device) for name in self.sums.tensors()}
        self.sums = RunningSums(**sums, **meta["sums"])
        self.step, self.skipped, self.skipped_in_row = saved.step, meta["skipped"], meta["skipped_in_row"]
        self.train_seconds, self.seconds_before = meta["train_seconds"], meta["seconds"]


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _load(module: nn.Module, prefix: str, saved: Checkpoint) -> None:
    start = f"{prefix}/"
    state = {name.removeprefix(start): t for name, t in saved.tensors.items() if name.startswith(start)}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{saved.path}: its weights do not fit this network; train with that run's recipe, or into a new folder"
        ) from error
