"""What the training of a model that is to be compared has cost, and a call of its network, counted in operations."""

from dataclasses import replace
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from onejump.config import Network, Recipe, Stage
from onejump.cost import flops_of
from onejump.estimate import nets_for, typical_step
from onejump.fit import network_of
from onejump.lpips import LPIPS
from onejump.methods.ctm_gan import CTMGAN
from onejump.networks.mlp import MLPConfig
from onejump.precond import EDM

STAND_IN, PROBE = MLPConfig((1, 8, 8), label_dim=2, width=512), 64  # whose passes are counted, and images in them


@cache
def flops_of_call(network: Network) -> int:
    """For one image."""
    with FakeTensorMode():
        return flops_of(network.build().eval(), network)


def passes_of(recipe: Recipe, stage: Stage) -> int | None:
    """Network passes an image in a step of this stage's loss, counted on a small network; None where that is not all.

    A backward pass counts as two forward passes, a pass of a guided teacher as two.
    """
    if isinstance(stage.method, CTMGAN) or isinstance(getattr(stage.method, "distance", None), LPIPS):
        return None
    small = replace(recipe, network=STAND_IN, stages={})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = nets_for(small, replace(stage, precond=EDM()), torch.device("cpu"))
        x0, step = torch.randn(PROBE, *STAND_IN.shape), typical_step(stage)
        with FlopCounterMode(display=False) as counter:
            stage.method.loss(nets, x0, torch.zeros(PROBE, dtype=torch.int64), step, step)[0].backward()
    return round(counter.get_total_flops() / PROBE / flops_of(nets.student.net, network_of(small, stage)))
