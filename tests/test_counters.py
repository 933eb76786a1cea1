"""What a training step runs and keeps, counted: rows through each network, FLOPs, bytes saved for the backward pass.

The step is train.accumulate itself; counts are the same on every machine.
"""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from onejump.config import Stage
from onejump.cost import counting_kept
from onejump.engine import Engine
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.networks import MLPConfig, SongUNetConfig
from onejump.times import Discretisation, LogNormal
from onejump.train import Drawn, accumulate

LATE = 8 * 25_000  # ECT's last stage on CIFAR-10
B = 64


def rows_of(method, step: int, micro_batch: int = 0) -> Counter:
    """Rows through (network, with gradients or not) in one step of B samples."""
    nets = method.nets(ConsistencyModel(MLPConfig((2,), width=4, depth=1).build()))
    stage, found = Stage(method, steps=1, batch=B, micro_batch=micro_batch), Counter()
    for name, model in (("student", nets.student), *(("frozen", model) for model in nets.frozen)):

        def count(module, inputs, name=name):
            found[name, torch.is_grad_enabled()] += len(inputs[0])

        model.net.register_forward_pre_hook(count)
    accumulate(stage, nets, torch.randn(B, 2), None, step, step + 1, Drawn(3), torch.ones(()))
    return found


def units(rows: Counter) -> float:
    """Passes over the whole batch: 1 forwards, 2 backwards."""
    return sum(n * (3 if with_gradients else 1) for (_, with_gradients), n in rows.items()) / B


@pytest.mark.parametrize("micro_batch", [0, 16])
def test_late_ect_and_tcm_take_4_units_a_step(micro_batch):
    ect, tcm = (rows_of(method, LATE, micro_batch) for method in (ECT(), TCM()))
    assert ect == {("student", True): B, ("student", False): B}
    assert tcm["student", True] == B == tcm["student", False] + tcm["frozen", False]
    assert tcm["frozen", False] >= B // 4 and tcm["frozen", True] == 0
    assert units(ect) == units(tcm) == 4


@pytest.mark.parametrize("k, share", [(0, 0.81), (1, 0.58)])
def test_early_ect_passes_only_the_rows_with_r_above_0(k, share):
    torch.manual_seed(3)  # as the step below: times are drawn first
    r = Discretisation().r(LogNormal(P_mean=-1.1, P_std=2.0)(B, 0.0).float(), k * 25_000)
    rows = rows_of(ECT(), k * 25_000)
    assert rows == {("student", True): B, ("student", False): int((r > 0).sum())}
    many = Discretisation().r(LogNormal(P_mean=-1.1, P_std=2.0)(100_000, 0.0).float(), k * 25_000)
    assert (many == 0).float().mean().item() == pytest.approx(share, abs=0.01)


def test_a_step_with_ddpmpp_takes_169_5_gflop_an_image():
    """ECT, by torch's counter, on tensors without data."""
    with torch.device("meta"):
        nets = ECT().nets(ConsistencyModel(SongUNetConfig().build()).train())
        x0, scale = torch.empty(1, 3, 32, 32), torch.ones(())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        accumulate(Stage(ECT(), steps=1, batch=1), nets, x0, None, LATE, LATE + 1, Drawn(3), scale)
    assert counter.get_total_flops() / 1e9 == pytest.approx(169.5, rel=2e-3)


@pytest.mark.parametrize("checkpointing, most", [(False, 118e6), (True, 25e6)])
def test_bytes_kept_by_ddpmpp(checkpointing, most):
    """An image, in float32, by the student's pass; the published code keeps 126.5 MB."""
    with FakeTensorMode():
        model = ConsistencyModel(SongUNetConfig().build()).train()
        Engine().prepare(model, checkpointing)
        kept: dict[int, int] = {}
        with counting_kept(kept, model):
            out = model(torch.empty(4, 3, 32, 32), torch.ones(4), key=torch.arange(4))
        assert sum(kept.values()) / 4 <= most
        assert out.requires_grad
