"""What a run will take: a few real passes are timed and their memory counted."""

import itertools
import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from onejump.analytic import AnalyticPrecond
from onejump.config import Distilling, Recipe, Stage
from onejump.cost import TRAINED_COPIES, bytes_of, counting_kept
from onejump.data.training_set import TrainingSet
from onejump.fit import images_for, network_of
from onejump.methods.base import Nets
from onejump.methods.ctm import CTM
from onejump.methods.ctm_gan import CTMGAN
from onejump.model import ConsistencyModel
from onejump.precond import Euler
from onejump.samplers import ODE
from onejump.times import random_steps

PROBE = 32  # images in a timed pass, unless the stage's own are fewer


@dataclass(frozen=True)
class Estimate:
    """seconds: training plus evaluation; bytes: weights, gradients, optimiser, EMA, frozen net, activations."""

    seconds: float
    bytes: int


def estimate_stage(recipe: Recipe, stage: Stage, data: TrainingSet, device: torch.device) -> Estimate:
    """Runs the loss of this stage forwards and backwards on real images a few times; nothing is kept."""
    at_once = stage.micro_batch or stage.batch
    probe = replace(stage, batch=min(PROBE, at_once))
    nets = nets_for(recipe, stage, device)
    images = images_for(recipe.network, data)
    last_step = typical_step(stage)
    seconds = []
    for _ in range(3):
        x0, cond = images.batch(0, probe.batch, recipe.seed, device=device)
        kept: dict[int, int] = {}
        began = time.perf_counter()
        with counting_kept(kept, *networks(nets)):
            loss, _ = stage.method.loss(nets, x0, cond, last_step, last_step)
        activations = sum(kept.values())
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    training = min(seconds) * stage.steps * stage.batch / probe.batch
    forward = min(seconds) / probe.batch / (4 if not isinstance(stage.sampler, ODE) else 3)
    return Estimate(
        seconds=training + forward * evaluation_passes(recipe, stage),
        bytes=held_bytes(nets) + activations * at_once // probe.batch,
    )


def networks(nets: Nets) -> list[nn.Module]:
    """All that a step runs."""
    found: list[nn.Module] = [nets.student, *nets.frozen]
    found += [nets.teacher] if nets.teacher else []
    found += [nets.average.model] if nets.average else []
    return found + ([nets.critic.net] if nets.critic else [])


def held_bytes(nets: Nets) -> int:
    """Weights; with gradients and Adam's moments of what is trained, and the student's EMA."""
    trained = (TRAINED_COPIES - 1) * bytes_of(nets.student)
    trained += (TRAINED_COPIES - 2) * bytes_of(nets.critic.net) if nets.critic else 0
    return trained + sum(bytes_of(net) for net in networks(nets))


def typical_step(stage: Stage) -> int:
    """A step at the end of any curriculum, where no target is skipped; CTM's has the mean number of solver steps."""
    step, method = 10**9, stage.method.ctm if isinstance(stage.method, CTMGAN) else stage.method
    if isinstance(method, CTM):
        mean = round((2 * method.max_steps + 1) / 3)
        step = next(n for n in itertools.count(step, 2) if random_steps(n, method.max_steps) == mean)
    return step


def nets_for(recipe: Recipe, stage: Stage, device: torch.device) -> Nets:
    """The networks of this stage with random weights; a teacher of the student's size."""
    jump = Euler() if isinstance(stage.jump, AnalyticPrecond) else stage.jump
    net = network_of(recipe, stage).build()
    student = ConsistencyModel(net, stage.precond, jump, second_time=stage.second_time != "off").to(device).train()
    if not isinstance(stage.method, Distilling):
        return stage.method.nets(student)
    critic = (stage.critic.build().to(device),) if stage.critic else ()
    return stage.method.nets(student, ConsistencyModel(recipe.network.build()).to(device).eval(), *critic)


def evaluation_passes(recipe: Recipe, stage: Stage) -> int:
    """Network passes over single images, outside training."""
    n, every = recipe.evaluation.n, recipe.evaluate_every or stage.steps
    during = stage.steps // every + 1
    if isinstance(stage.sampler, ODE):
        return n * (2 * recipe.evaluation.teacher_steps - 1)
    return n * (during + 1) * sum(recipe.evaluation.steps)
