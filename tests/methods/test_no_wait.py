"""Between two log lines a step waits for no device. The meta device, whose tensors hold no numbers, stands for a GPU:

whatever looked at one of them, or mixed it with a tensor of the CPU, would raise.
"""

import pytest
import torch
from torch import nn

from onejump.methods.base import frozen_copy
from onejump.methods.cd import CD
from onejump.methods.continuous import ContinuousCT
from onejump.methods.ct import CT
from onejump.methods.ctm import CTM
from onejump.methods.ctm_gan import CTMGAN
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.ict import ICT
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.networks.critic import SmallCriticConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.precond import CM, Euler
from onejump.running_sums import RunningSums
from onejump.times import HalfLogNormal

UNET = SongUNetConfig(8, 1, 2, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
META = torch.device("meta")


def model(jump=None, second_time="off") -> ConsistencyModel:
    net = SongUNetConfig(**{**vars(UNET), "second_time": second_time}).build().to(META)
    return ConsistencyModel(net, jump=jump, second_time=second_time != "off")


def nets_of(method):
    if isinstance(method, CD):
        return method.nets(model(CM()), frozen_copy(model()).eval())
    if isinstance(method, CTM):
        return method.nets(model(Euler(), "zero"), frozen_copy(model()).eval())
    if isinstance(method, CTMGAN):
        critic: nn.Module = SmallCriticConfig(img_channels=1, width=8).build().to(META)
        return method.nets(model(Euler(), "zero"), frozen_copy(model()).eval(), critic)
    return method.nets(model(CM() if isinstance(method, CT | ICT) else None))


@pytest.mark.parametrize(
    "method",
    [
        *(DSM(), DSM(HalfLogNormal()), CT(), ICT(), ECT(), TCM(), ContinuousCT()),
        *(CD(), CTM(n=4, max_steps=2), CTMGAN(CTM(n=4, max_steps=2))),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_step_waits_for_no_device(method):
    nets, sums = nets_of(method), RunningSums.zero(META)
    x0, cond = torch.empty(8, 1, 8, 8, device=META), torch.zeros(8, dtype=torch.int64, device=META)
    for step in (0, 1, 60_000):
        loss, stats = method.loss(nets, x0, cond, step, 100_000)
        loss.backward()
        sums.add(loss.detach(), loss.detach(), stats, good=torch.ones((), dtype=torch.bool, device=META))
        assert loss.device == stats["distance"].device == META
