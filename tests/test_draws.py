"""Each sample is given its own times, noise and dropout mask, however a batch is shared out among passes."""

import dataclasses

import pytest
import torch
from training_setup import images, stage_of, student

from onejump.methods.continuous import ContinuousCT
from onejump.methods.ct import CT
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.ict import ICT
from onejump.methods.tcm import TCM
from onejump.precond import CM
from onejump.times import HalfLogNormal
from onejump.train import Drawn, accumulate

METHODS = {
    "ECT": ECT(),
    "TCM": TCM(),
    "iCT": ICT(),
    "CT": CT(),
    "DSM": DSM(),
    "DSM at CTM's times": DSM(HalfLogNormal()),
    "ContinuousCT": ContinuousCT(),
}


@pytest.mark.parametrize("name", METHODS)
def test_processes_and_micro_batches_give_each_sample_what_the_whole_batch_gives_it(name):
    """1 x 16, 2 x 8 in halves, and 4 x 4: the same gradient, noise, times, dropout and boundary samples included."""
    stage, data = stage_of(METHODS[name], batch=16, micro_batch=0, jump=CM()), images()
    gradients, losses = [], []
    for world, micro_batch in ((1, 0), (2, 4), (4, 0)):
        model = student().double()
        part, total = dataclasses.replace(stage, micro_batch=micro_batch), 0.0
        nets = part.method.nets(model)
        for rank in range(world):
            x0, cond = data.batch(3, 16 // world, 1, rank, world)
            one = torch.ones((), dtype=torch.float64)
            loss, _ = accumulate(part, nets, x0.double(), cond, 3, 9, Drawn(5, rank, world), one)
            total += loss / world
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]) / world)
        losses.append(total)
    assert gradients[0].norm() > 1e-3
    for gradient, loss in zip(gradients[1:], losses[1:], strict=True):
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-9, atol=1e-9 * gradients[0].abs().max().item())
        assert float(loss) == pytest.approx(float(losses[0]), rel=1e-6)  # summed in float32
