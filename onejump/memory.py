"""How much memory training takes, found out before it: one step of it is run on tensors without data."""

import itertools
import sys
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from onejump import draws
from onejump.analytic import AnalyticPrecond
from onejump.config import Distilling, Network, Recipe, Stage
from onejump.cost import Live, blank_cond, bytes_of, cost_of, follow_pieces, in_words, part_of
from onejump.data.image_set import ImageSet
from onejump.data.training_set import TrainingSet
from onejump.engine import Engine
from onejump.fit import network_of
from onejump.generate import block_on
from onejump.guidance import autoguided, guided
from onejump.methods.base import Nets
from onejump.methods.ctm import CTM
from onejump.methods.ctm_gan import CTMGAN
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.networks.layers import Buildable
from onejump.networks.text_unet import TextUNetConfig
from onejump.precond import Euler
from onejump.run_state import PRECISIONS, trained
from onejump.times import random_steps
from onejump.types import Samples, UserError

HEAP = 1.5  # what the C library's heap takes for maps that come and go, over what is in use: 1.46 to 1.67 measured
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Memory:
    """Bytes on the device where training runs.

    held: weights of all networks, moments, averages. passes: the most that is there besides within a step: maps,
    gradients, the batch. images: that lie on the device. process: what this process has without all that (CPU).
    """

    held: int
    passes: int
    images: int
    process: int

    @property
    def peak(self) -> int:
        return self.held + self.passes + self.images + self.process

    def __str__(self) -> str:
        parts = [("networks and moments", self.held), ("passes", self.passes), ("images", self.images)]
        parts += [("the program", self.process)]
        return f"{in_words(self.peak)} ({', '.join(f'{what} {in_words(size)}' for what, size in parts if size)})"


@dataclass(frozen=True)
class Setup:
    """What memory depends on besides stage and images: the processes, how many of them share one copy of the weights,
    and the network that guides the teacher, where that is a model of its own."""

    world: int = 1
    shard: int = 1
    guide: Network | None = None


ALONE = Setup()


def predict(
    recipe: Recipe,
    stage: Stage,
    data: TrainingSet,
    device: torch.device,
    setup: Setup = ALONE,
) -> Memory:
    """The peak of one of the processes that train this stage.

    On CUDA it is what torch's allocator has given out; on a CPU, the memory of the process without mapped files.
    """
    process = anonymous()
    held, passes = step_bytes(recipe, stage, data.shape, setup)
    cpu = device.type == "cpu"
    sampling = sampling_maps(recipe.network) * block_on(device) * (torch.get_num_threads() if cpu else 1)
    if setup.shard > 1:  # what samples is in one piece
        sampling += cost_of(recipe.network, 1).weights
    passes = max(passes, sampling)
    if cpu:
        return Memory(held, round(passes * heap_factor()), 0, process)
    return Memory(held, passes, data.images.numel() if isinstance(data, ImageSet) else 0, 0)


@cache
def sampling_maps(network: Network) -> int:
    """Of one image."""
    return cost_of(network, 1).maps


def heap_factor() -> float:
    return HEAP if sys.platform == "linux" else 1.0


@cache
def anonymous() -> int:
    """Bytes of this process's anonymous memory that are in RAM when it is first asked, before anything is counted.

    0 where the system does not tell.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def step_bytes(
    recipe: Recipe,
    stage: Stage,
    shape: tuple[int, int, int],
    setup: Setup = ALONE,
) -> tuple[int, int]:
    """(what is held between steps, the most that is there besides within one), counted on tensors without data."""
    fake, live = FakeTensorMode(allow_non_fake_inputs=True), Live()
    world, shard = setup.world, setup.shard
    share = stage.batch // world
    micros = -(-share // (stage.micro_batch or share))
    with fake, live, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # to copy networks
        nets = nets_for(recipe, stage, torch.device("cpu"), setup.guide)
        x0 = torch.zeros(share, *shape)
        cond = labels_for(recipe, stage, share)
    Engine().prepare(nets.student, checkpointing=stage.checkpointing)
    units = []
    for model in nets.models:
        model.autocast = PRECISIONS[stage.precision]
        model.through(Fake(model.net, fake, live))
        units += follow_pieces(model.net, shard, model is nets.student) if shard > 1 else []
    step, before = typical_step(stage), live.now
    if micros > 1:  # the gradients of the passes before are there
        with fake, live:
            for unit in units:
                unit.part = torch.zeros(sum(part_of(p, shard) for p in unit.parameters)) if unit.trained else None
            for p in trained(nets.student) if shard == 1 else ():
                p.grad = torch.zeros_like(p)
    live.peak = live.now
    with live, draws.rows(0, micros * world, share * world):
        part = None if cond is None else cond[::micros]
        loss, _ = stage.method.loss(nets, x0[::micros], part, step, step)
    with fake, live:
        loss.backward()
    averages = 1 + len(stage.snapshots.sigma_rels if stage.snapshots else ())
    return held_bytes(nets, averages, shard), live.peak - before + x0.nbytes


class Fake(nn.Module):
    """Runs a network on tensors without data, whatever it is given: its weights and the images have none."""

    def __init__(self, net: nn.Module, fake: FakeTensorMode, live: Live):
        super().__init__()
        self.within = (net, fake, live)  # in a tuple the network is no submodule

    def forward(self, *args: Any) -> Samples:
        net, fake, live = self.within
        real = [isinstance(arg, Tensor) and not isinstance(arg, FakeTensor) for arg in args]
        given = [fake.from_tensor(arg) if is_real else arg for arg, is_real in zip(args, real, strict=True)]
        with fake, live:
            return net(*given)


def labels_for(recipe: Recipe, stage: Stage, n: int) -> Tensor | None:
    """What the network is told of n images."""
    if stage.augment is not None:
        return torch.zeros(n, recipe.network.label_dim + stage.augment.width)
    return blank_cond(recipe.network, n)


def networks(nets: Nets) -> list[nn.Module]:
    """All that a step runs."""
    return [*nets.models, *([nets.critic.net] if nets.critic else [])]


def held_bytes(nets: Nets, averages: int = 1, shard: int = 1) -> int:
    """What stays between steps: all weights, Adam's moments of what is trained, and averages of the student."""
    held = sum(bytes_of(net, shard) for net in networks(nets)) + (2 + averages) * bytes_of(nets.student, shard)
    return held + (2 * bytes_of(nets.critic.net) if nets.critic else 0)


def typical_step(stage: Stage) -> int:
    """A step at the end of any curriculum, where no target is skipped; CTM's has the mean number of solver steps."""
    step, method = 10**9, stage.method.ctm if isinstance(stage.method, CTMGAN) else stage.method
    if isinstance(method, CTM):
        mean = round((2 * method.max_steps + 1) / 3)
        step = next(n for n in itertools.count(step, 2) if random_steps(n, method.max_steps) == mean)
    return step


def nets_for(recipe: Recipe, stage: Stage, device: torch.device, guide: Network | None = None) -> Nets:
    """The networks of this stage with random weights; a teacher of the student's size, guided if the stage says so."""
    jump = Euler() if isinstance(stage.jump, AnalyticPrecond) else stage.jump
    net = built(network_of(recipe, stage), device)
    student = ConsistencyModel(net, stage.precond, jump, second_time=stage.second_time != "off").train()
    if not isinstance(stage.method, Distilling):
        return stage.method.nets(student)
    critic = (built(stage.critic, device),) if stage.critic else ()
    return stage.method.nets(student, teacher_for(recipe.network, stage, device, guide), *critic)


def teacher_for(network: Network, stage: Stage, device: torch.device, guide: Network | None) -> ConsistencyModel:
    """Guided by a network like `guide`; without one by its own labels, or by its like if it has none."""
    teacher, blank = ConsistencyModel(built(network, device), stage.precond).eval(), blank_cond(network, 1)
    if stage.guidance == 1:
        return teacher
    if guide is None and blank is not None:
        null = blank[0].to(device) if isinstance(network, TextUNetConfig) else None
        return guided(teacher, stage.guidance, null, network.label_dim or None)
    guide = guide or network
    by = ConsistencyModel(built(guide, device), stage.precond).eval()
    return autoguided(teacher, by, stage.guidance, (blank_cond(guide, 1) is None) == (blank is None))


def built(network: Buildable, device: torch.device) -> nn.Module:
    """On the CPU it is there already, and weights without data could not be moved."""
    net = network.build()
    return net if device.type == "cpu" else net.to(device)


def fitting(
    name: str,
    recipe: Recipe,
    data: TrainingSet,
    device: torch.device,
    limit: int,
    setup: Setup = ALONE,
) -> tuple[Stage, Memory]:
    """The stage with the largest passes that stay below `limit` bytes, and their memory; its own where those do.

    micro_batch becomes a divisor of the batch (of its share for a process), for TCM one that keeps the share of samples
    at t', so that the result is that of the whole batch. Raises UserError where not even the smallest fits.
    """
    stage = recipe.stages[name]
    share = stage.batch // setup.world
    own = stage.micro_batch or share
    sizes = sorted({n for n in range(1, own) if share % n == 0 and keeps(stage, n)} | {own})

    def memory(size: int) -> Memory:
        return predict(recipe, with_passes(stage, size, share), data, device, setup)

    if (whole := memory(own)).peak <= limit:
        return stage, whole
    low, high, smallest = 0, len(sizes) - 1, whole  # sizes[high] does not fit
    best: tuple[Stage, Memory] | None = None
    while low < high:
        middle = (low + high) // 2
        found = memory(sizes[middle])
        if found.peak <= limit:
            best, low = (with_passes(stage, sizes[middle], share), found), middle + 1
        else:
            smallest, high = found, middle
    if best is None:
        raise UserError(
            f"--max-memory {in_words(limit)}: {name} takes {in_words(smallest.peak)} even with "
            f"micro_batch={sizes[0]}; give more, a smaller network, or {name}.checkpointing=true"
        )
    return best


def keeps(stage: Stage, size: int) -> bool:
    return not isinstance(stage.core, TCM) or stage.keeps_shares(size, stage.core.rho)


def with_passes(stage: Stage, size: int, share: int) -> Stage:
    return replace(stage, micro_batch=0 if size == share == stage.batch else size)


def bytes_in(option: str, text: str) -> int:
    """8GiB, 7.5 GB, 900MiB as a number of bytes. Raises UserError."""
    number = text.strip().rstrip("KMGTiB ")
    unit = text.strip()[len(number) :].strip()
    try:
        size = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        size = 0.0
    if not 0 < size < float("inf"):
        raise UserError(f"{option} {text}: a size such as 8GiB or 900MB is needed")
    return int(size)
