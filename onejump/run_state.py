"""Everything that changes while a stage trains, which is what its checkpoints hold."""

import copy
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onejump.checkpoint import Checkpoint, pack_optimizer, unpack_optimizer
from onejump.config import Stage
from onejump.methods.base import Nets
from onejump.metrics_log import RunningSums
from onejump.model import ConsistencyModel
from onejump.types import UserError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Run:
    """The student, its EMA, the optimiser, the loss scale and the counters. `frozen` is a checksum of what must not
    change: the target's own networks, which a checkpoint does not hold."""

    student: ConsistencyModel
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
        for model in (nets.student, *nets.frozen):
            model.to(device).train().autocast = PRECISIONS[stage.precision]
        for p in (p for model in nets.frozen for p in model.parameters()):
            frozen.update(p.detach().cpu().contiguous().numpy().data)
        torch.backends.cudnn.allow_tf32 = False  # fp32 is what it says, as in the published runs
        return cls(
            student=nets.student,
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
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

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
        optimizer_tensors, optimizer_meta = pack_optimizer(self.optimizer)
        tensors = {
            **_named("student", self.student.state_dict()),
            **_named("ema", self.ema.state_dict()),
            **optimizer_tensors,
            **_named("sums", self.sums.tensors()),
        }
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(f"step {self.step}: {name} is no longer finite and was not saved; try a lower rate")
        meta = {
            "optimizer": optimizer_meta,
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
                f"{saved.path}: the frozen network is not the one this stage began with, the stage before it has "
                "changed; delete this stage's folder to train it again"
            )
        for prefix, module in (("student", self.student), ("ema", self.ema)):
            _load(module, prefix, saved)
        unpack_optimizer(self.optimizer, tensors, meta["optimizer"])
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
