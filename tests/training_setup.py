"""A training run small enough for tests: 4x4 images, a tiny MLP with dropout, 2 ms a step."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from onejump.config import Stage
from onejump.data.image_set import ImageSet
from onejump.distributed import Team
from onejump.ema import PowerEMA
from onejump.methods.base import Nets
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.networks.mlp import MLPConfig
from onejump.optim import CosineRate
from onejump.train import Every, TrainResult, train

OFTEN = Every(log=4, save=3, sample=5, evaluate=6)


class Recorder:
    """A progress display that remembers, and calls `at_step(steps done)` after every step."""

    def __init__(self, at_step: Callable[[int], None] = lambda done: None):
        self.at_step, self.messages, self.lines = at_step, [], []

    def start(self, total: int, done: int) -> None:
        self.started = (total, done)

    def update(self, done: int, metrics: Any) -> None:
        self.lines += [metrics] if metrics is not None else []
        self.at_step(done)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None:
        self.closed = True


def images(n: int = 50) -> ImageSet:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return ImageSet("noise", pixels, torch.arange(n) % 2, ("even", "odd"))


def student(dropout: float = 0.2, seed: int = 0) -> ConsistencyModel:
    torch.manual_seed(seed)
    net = MLPConfig(shape=(1, 4, 4), label_dim=2, width=16, depth=2, dropout=dropout).build()
    torch.nn.init.normal_(net.last.weight, std=0.1)
    return ConsistencyModel(net)


def stage_of(method: Any = None, **changes: Any) -> Stage:
    """A stage of TCM, or of a method that a test defines."""
    method = TCM() if method is None else method
    micro_batch = 4 if isinstance(method, TCM) else 5  # of 12: TCM's passes are equal, others end in a smaller one
    stage = Stage(ECT(), steps=20, batch=12, micro_batch=micro_batch, rate=CosineRate(1e-2), ema=PowerEMA(6.94))
    stage = dataclasses.replace(stage, **changes)
    if isinstance(method, TCM):
        return dataclasses.replace(stage, method=method)
    object.__setattr__(stage, "method", method)
    return stage


def run(
    stage: Stage,
    out: Path,
    *,
    nets: Nets | None = None,
    progress: Recorder | None = None,
    every: Every = OFTEN,
    on_evaluate: Callable[[ConsistencyModel, int], dict[str, Any]] = lambda ema, step: {"frechet": {"1": 1.0 / step}},
    on_sample: Callable[[ConsistencyModel, int], None] = lambda ema, step: None,
    first_step: int = 0,
    seed: int = 1,
    rank: int = 0,
    data: ImageSet | None = None,
) -> TrainResult:
    return train(
        stage,
        nets or stage.method.nets(student()),
        data or images(),
        out,
        seed=seed,
        first_step=first_step,
        every=every,
        device="cpu",
        progress=progress or Recorder(),
        on_sample=on_sample,
        on_evaluate=on_evaluate,
        team=Team(rank),
    )
