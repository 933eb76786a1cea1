"""Recipes: the configuration is the object. Frozen dataclasses hold the numbers and the code that uses them."""

from dataclasses import dataclass, field
from typing import Literal

from onejump.ema import EMA, ConstantEMA
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.ict import ICT
from onejump.methods.tcm import TCM
from onejump.networks.mlp import MLPConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.optim import ConstantRate, Optimizer, RAdam, Rate
from onejump.precond import EDM, ToData
from onejump.samplers import Multistep, Sampler

Network = SongUNetConfig | MLPConfig


@dataclass(frozen=True)
class Stage:
    """One training run: a method, how long, and how. Published numbers belong to recipes, not here."""

    method: DSM | ICT | ECT | TCM
    steps: int
    batch: int = 64  # images an optimiser step
    micro_batch: int = 0  # images a pass, their gradients averaged; 0: the whole batch
    optimizer: Optimizer = RAdam()
    rate: Rate = ConstantRate()
    clip: float = 1e6  # gradient norm
    ema: EMA = ConstantEMA()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    precond: EDM = EDM()
    jump: ToData = ToData()
    sampler: Sampler = Multistep()


@dataclass(frozen=True)
class Evaluation:
    """How samples are judged: n images for each number of steps, from the per-image seeds of `seed`."""

    n: int = 2000
    steps: tuple[int, ...] = (1, 2)
    teacher_steps: int = 18
    seed: int = 1234


@dataclass(frozen=True)
class Recipe:
    """A chain of stages: each starts from the EMA of the one before it, and goes on counting its steps."""

    name: str
    network: Network
    stages: dict[str, Stage] = field(default_factory=dict)
    seed: int = 0
    log_every: int = 25
    save_every: int = 200
    sample_every: int = 200
    evaluate_every: int = 200
    evaluation: Evaluation = Evaluation()
