"""What a run will take: its memory is counted, its time measured on a few real passes."""

import time
from dataclasses import dataclass, replace

import torch

from onejump.config import Recipe, Stage
from onejump.data.training_set import TrainingSet
from onejump.fit import images_for
from onejump.memory import ALONE, Memory, Setup, nets_for, predict, typical_step
from onejump.samplers import ODE

PROBE = 32  # images in a timed pass, unless the stage's own are fewer


@dataclass(frozen=True)
class Estimate:
    """seconds: training plus evaluation; memory: at the peak."""

    seconds: float
    memory: Memory

    @property
    def bytes(self) -> int:
        """At the peak."""
        return self.memory.peak


def estimate_stage(
    recipe: Recipe,
    stage: Stage,
    data: TrainingSet,
    device: torch.device,
    setup: Setup = ALONE,
) -> Estimate:
    """Of one process, as in `predict`. The loss of this stage runs forwards and backwards on real images a
    few times; nothing is kept."""
    data = images_for(recipe.network, data)
    memory = predict(recipe, stage, data, device, setup)
    probe = replace(stage, batch=min(PROBE, stage.micro_batch or stage.batch), micro_batch=0)
    nets = nets_for(recipe, stage, device, setup.guide)
    last_step = typical_step(stage)
    seconds = []
    for _ in range(3):
        x0, cond = data.batch(0, probe.batch, recipe.seed, device=device)
        began = time.perf_counter()
        loss, _ = stage.method.loss(nets, x0, cond, last_step, last_step)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    training = min(seconds) * stage.steps * stage.batch / probe.batch / setup.world
    forward = min(seconds) / probe.batch / (4 if not isinstance(stage.sampler, ODE) else 3)
    return Estimate(training + forward * evaluation_passes(recipe, stage), memory)


def evaluation_passes(recipe: Recipe, stage: Stage) -> int:
    """Network passes over single images, outside training."""
    n, every = recipe.evaluation.n, recipe.evaluate_every or stage.steps
    during = stage.steps // every + 1
    if isinstance(stage.sampler, ODE):
        return n * (2 * recipe.evaluation.teacher_steps - 1)
    return n * (during + 1) * sum(recipe.evaluation.steps)
