"""How fast a training step is on this machine, phase by phase, against its peak and against the plain way.

The step is the one of train.py. All cases run in turn in one process, round by round, with
a large matmul and a large convolution between them as the speed of the machine; ratios are taken within a round.
"""

import copy
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from onejump.config import Recipe, Stage
from onejump.cost import Live, flops_of, shape_of
from onejump.data.image_set import ImageSet
from onejump.data.noise_texts import NoiseTexts
from onejump.data.training_set import TrainingSet
from onejump.distributed import Team
from onejump.engine import Engine
from onejump.fit import network_of
from onejump.memory import held_bytes, nets_for, typical_step
from onejump.methods.base import Nets
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.networks.magnitude import normalize_weights, normalized
from onejump.networks.song_unet import SongUNetConfig
from onejump.networks.text_unet import TextUNetConfig
from onejump.phases import Phases, watched
from onejump.plain import PlainStep, has_plain_form
from onejump.run_record import device_name, versions
from onejump.run_state import PRECISIONS, Run
from onejump.samplers import Multistep
from onejump.saver import Saver
from onejump.times import Discretisation
from onejump.train import PASSES, Drawn, accumulate, mix, samples_of

OURS, PLAIN = "ours", "plain"
UNTIMED = 6  # steps of the optimiser without gradients: RAdam's first five are cheaper than the rest


def cifar10() -> Recipe:
    """What is timed unless a recipe is given: DDPM++ on CIFAR-10's shape, ECT as published, then TCM's stage 2."""
    last = Discretisation(ratio_limit=1 - 2.0**-9)  # of the eighth doubling, with which 200,000 steps end
    stages = {
        "stage1": Stage(ECT(delta=last), steps=200_000, batch=128),
        "stage2": Stage(TCM(), steps=200_000, batch=128, count_on=True, sampler=Multistep(mid=(1.0,))),
    }
    return Recipe("ect-tcm", SongUNetConfig(), stages)


def noise_images(recipe: Recipe, batch: int) -> ImageSet | NoiseTexts:
    """What the recipe's network is trained on."""
    network = recipe.network
    if isinstance(network, TextUNetConfig):
        text = torch.randn(batch, network.tokens, network.text_width)
        return NoiseTexts(torch.randn(batch, *shape_of(network)), text)
    classes = recipe.network.label_dim
    pixels = torch.randint(0, 256, (4 * batch, *shape_of(recipe.network)), dtype=torch.uint8)
    labels = torch.arange(4 * batch) % classes if classes else None
    return ImageSet("noise", pixels, labels, tuple(map(str, range(classes))))


class Ours:
    """Trains as `train` does, without checkpoints, logs and evaluation."""

    def __init__(self, stage: Stage, nets: Nets, data: TrainingSet, seed: int, device: torch.device):
        self.name, self.stage, self.nets, self.data, self.seed, self.device = OURS, stage, nets, data, seed, device
        self.run = Run.start(stage, nets, 0, device)
        self.saver = Saver(Path(), Team(device=device))
        nothing, averages = torch.zeros((), device=device), self.run.updater.averages
        for _ in range(UNTIMED):
            self.run.updater.step(nothing, 0.0, [1.0] * len(averages), stage.clip)

    def step(self, at: int, phases: Phases) -> Tensor:
        run, self.run.step = self.run, at
        phases.enter("data")
        x0, cond = samples_of(self.data, self.stage, run, self.saver, self.seed, self.device)
        phases.enter("other")
        drawn = Drawn(mix(self.seed, at, PASSES))
        with normalized(self.nets.student):
            loss, stats = accumulate(self.stage, self.nets, x0, cond, at, at + 1, drawn, run.at_turn.scale)
        phases.enter("optimiser")
        run.update(loss, stats, 0.5, at + 1)
        phases.enter("other")
        return loss


class Plain:
    """The same step the plain way, in float32 or under autocast."""

    def __init__(self, stage: Stage, nets: Nets, data: TrainingSet, seed: int, device: torch.device):
        half = PRECISIONS[stage.precision]
        self.name = PLAIN if half is None else f"{PLAIN} {stage.precision}"
        self.stage, self.nets, self.data, self.seed, self.device = stage, nets, data, seed, device
        for model in nets.models:
            model.autocast = half
        self.plain = PlainStep.of(stage, nets, copy.deepcopy(nets.student).requires_grad_(False))
        for p in nets.student.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(UNTIMED):
            self.plain.optimizer.step()

    def step(self, at: int, phases: Phases) -> float:
        phases.enter("data")
        x0, cond = self.data.batch(at, self.stage.batch, self.seed, device=self.device)
        phases.enter("other")
        normalize_weights(self.nets.student)
        after = {"backward": "optimiser", "optimiser": "EMA"}
        with Drawn(mix(self.seed, at, PASSES)).passes(0, 1, len(x0)):
            loss = self.plain(x0, cond, at, lambda done: phases.enter(after[done]))
        phases.enter("other")
        return loss


Trainer = Ours | Plain


@dataclass(frozen=True)
class Case:
    """A trainer at one step of its chain."""

    stage: str
    at: int
    trainer: Trainer

    @property
    def late(self) -> bool:
        return self.at >= 10**9

    @property
    def name(self) -> str:
        return f"{self.stage} {'late' if self.late else f'step {self.at}'}"


def steps_of(stage: Stage) -> list[int]:
    """Where a stage is timed: late, and before that in the first two stages of ECT's curriculum."""
    late, method = typical_step(stage), stage.method
    if isinstance(method, ECT) and isinstance(method.delta, Discretisation) and method.delta.r_min == 0:
        return [0, method.delta.double_every, late]
    return [late]


def cases_of(recipe: Recipe, data: TrainingSet, device: torch.device, plain: bool) -> list[Case]:
    """Each stage at each of its steps, ours and, if asked, plain from the same weights: in float32, and in ours' half.

    Stages without a plain form are timed alone.
    """
    found: list[Case] = []
    for name, stage in recipe.stages.items():
        torch.manual_seed(recipe.seed)
        nets = nets_for(recipe, stage, device)
        for p in nets.student.parameters():  # some start near zero, where all ways would agree
            nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
        trainers: list[Trainer] = []
        precisions = list(dict.fromkeys(("fp32", stage.precision))) if plain and has_plain_form(stage) else []
        for precision in precisions:
            if precision in ("fp32", "bf16"):
                changed = replace(stage, precision=precision, micro_batch=0)
                trainers.append(Plain(changed, copy.deepcopy(nets), data, recipe.seed, device))
        trainers.insert(0, Ours(stage, nets, data, recipe.seed, device))
        found += [Case(name, at, trainer) for at in steps_of(stage) for trainer in trainers]
    return found


def first_step(case: Case, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Its loss, and the bytes at the peak of a step, of this trainer alone; on a CPU of all tensors, or None where a
    compiler made them."""
    held, phases, trainer = held_bytes(case.trainer.nets), Phases(device), case.trainer
    if device.type == "cuda":
        loss = float(trainer.step(case.at, phases))
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        trainer.step(case.at, phases)
        return {"loss": loss, "memory": held + torch.cuda.max_memory_allocated(device) - before}
    if compiled and trainer.name == OURS:
        return {"loss": float(trainer.step(case.at, phases)), "memory": None}
    with Live() as live:
        loss = float(trainer.step(case.at, phases))
    return {"loss": loss, "memory": held + live.peak}


def large(precision: str, device: torch.device, batch: int) -> dict[str, float]:
    """FLOPs a second of a square matmul and of a wide 3x3 convolution, timed as steps are."""
    dtype, found = PRECISIONS[precision] or torch.float32, {}
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    x = torch.ones(batch, 256, 32, 32, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    k = torch.ones(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    for name, run, flops in (
        ("matmul", lambda: a @ a, 2 * n**3),
        ("convolution", lambda: conv2d(x, k, padding=1), 2 * x.numel() * 9 * 256),
    ):
        run()
        phases = Phases(device)
        phases.enter("other")
        run()
        phases.enter("other")
        found[name] = flops / max(phases.seconds()["other"], 1e-9)
    return found


def timed(case: Case, device: torch.device) -> dict[str, Any]:
    """One step: seconds, in all and of each phase; images through the networks."""
    allowed = case.trainer.stage.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    phases = Phases(device)
    with watched(case.trainer.nets, phases):
        case.trainer.step(case.at, phases)
    seconds = phases.seconds()
    return {"seconds": sum(seconds.values()), "phases": seconds, "passes": phases.passes}


def bench(recipe: Recipe, data: TrainingSet, device: torch.device, plain: bool, rounds: int) -> dict[str, Any]:
    """The record: conditions, and for each case what every round measured."""
    cases, engine = cases_of(recipe, data, device, plain), Engine.for_device(device)
    with torch.device("meta"):
        flops = {name: flops_of(network_of(recipe, s).build(), recipe.network) for name, s in recipe.stages.items()}
    first = [first_step(case, device, engine.compiled) for case in cases]
    measured: list[list[dict[str, Any]]] = [[] for _ in cases]
    batch = max(case.trainer.stage.batch for case in cases)
    precisions = list(dict.fromkeys(case.trainer.stage.precision for case in cases))
    peaks: dict[str, list[dict[str, float]]] = {precision: [] for precision in precisions}
    for k in range(rounds):
        for case, found in zip(cases, measured, strict=True):
            at = case.at if case.late else case.at + k  # other times are drawn
            found.append(timed(replace(case, at=at), device))
        for precision in precisions:
            peaks[precision].append(large(precision, device, batch))
    return {
        **conditions(device),
        "recipe": recipe.name,
        "batch": batch,
        "engine": {"compiled": engine.compiled, "channels_last": engine.channels_last},
        "large": peaks,
        "cases": [
            {"name": case.name, "way": case.trainer.name, "precision": case.trainer.stage.precision}
            | {"flops": flops[case.stage], **before, "rounds": found}
            for case, before, found in zip(cases, first, measured, strict=True)
        ],
    }


def conditions(device: torch.device) -> dict[str, Any]:
    """What figures rest on besides the code."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": versions(),
    }
