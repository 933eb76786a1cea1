import copy

import pytest
import torch
from torch import nn

from onejump.methods.base import boundary_count, student_and_target
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.ict import ICT
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.networks.mlp import MLPConfig
from onejump.times import Discretisation
from onejump.types import UserError

SHAPE = (1, 4, 4)


def net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    mlp = MLPConfig(shape=SHAPE, width=32, depth=2, dropout=dropout, label_dim=3).build()
    for p in mlp.parameters():
        p.data.normal_(0, 0.2)
    return mlp.train()


def x0(n: int = 16) -> torch.Tensor:
    return torch.randn(n, *SHAPE).clamp(-1, 1)


LABELS = torch.arange(16) % 3


class Spy(nn.Module):
    """A network that notes what it was asked."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, []

    def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
        self.calls.append({"t": (4 * c_noise).exp(), "key": key, "grad": torch.is_grad_enabled(), "x": x})
        return self.net(x, c_noise, c_noise_s, cond, key)


@pytest.mark.parametrize("method", [ICT(s0=40, s1=40), ECT(delta=Discretisation(2, 1)), TCM(), DSM()])
def test_the_loss_reaches_every_weight_of_the_student_and_no_other(method):
    nets = method.nets(ConsistencyModel(net()))
    loss, stats = method.loss(nets, x0(), LABELS, 5, 10)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in nets.student.parameters())
    if isinstance(method, TCM):
        assert all(p.grad is None and not p.requires_grad for p in nets.target.boundary.parameters())
    assert stats["t"].shape == stats["distance"].shape == (16,)


@pytest.mark.parametrize("method", [ICT(s0=40, s1=40), ECT(delta=Discretisation(2, 1))])
def test_the_target_is_the_student_under_stop_gradient(method):
    """With F(x) = w, constant, the target's share of the gradient would cancel most of the student's."""

    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(SHAPE))
            self.outputs = []

        def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
            out = self.w + 0 * x
            self.outputs.append(out)
            return out

    nets = method.nets(ConsistencyModel(Bias()))
    method.loss(nets, x0(), None, 5, 10)[0].backward()
    student, target = nets.student.net.outputs
    assert student.requires_grad and not target.requires_grad


@pytest.mark.parametrize("t_prime", [0.7, 1.0, 1.3, 1.4, 3.3])
def test_tcm_routes_each_sample_through_one_target_network(t_prime):
    """Also where t' is not a float32 number: the boundary samples are flagged, not found by comparison."""
    torch.manual_seed(0)
    student = ConsistencyModel(Spy(net()))
    method = TCM(t_prime=t_prime, delta=Discretisation(2, 1, 0.999, r_min=1e-6))
    nets = method.nets(student)
    loss, stats = method.loss(nets, x0(64), None, 8, 10)
    own, target = student.net.calls[0], student.net.calls[1:]
    frozen = nets.target.boundary.net.calls
    assert own["grad"] and len(own["t"]) == 64
    assert sum(len(call["t"]) for call in target + frozen) == 64
    assert all(not call["grad"] for call in target + frozen)
    n_boundary = boundary_count(64, method.rho)
    assert (stats["t"][:n_boundary] == torch.tensor(t_prime)).all() and n_boundary == 16
    assert all((call["t"] >= t_prime * (1 - 1e-5)).all() for call in target)
    assert all((call["t"] < t_prime).all() for call in frozen)
    assert sum(len(call["t"]) for call in frozen) >= n_boundary
    loss.backward()
    assert torch.cat([p.grad.flatten() for p in student.parameters()]).norm() > 0


@pytest.mark.parametrize("t_prime", [0.7, 1.0, 1.3, 1.4, 3.3])
def test_the_boundary_loss_alone_trains_the_student(t_prime):
    method = TCM(t_prime=t_prime, w_b=1.0)
    grads = []
    for w_b in (0.0, 1.0):
        torch.manual_seed(3)
        nets = TCM(t_prime=t_prime, w_b=w_b).nets(ConsistencyModel(net()))
        method = TCM(t_prime=t_prime, w_b=w_b)
        method.loss(nets, x0(), None, 8, 10)[0].backward()
        grads.append(torch.cat([p.grad.flatten() for p in nets.student.parameters()]))
    assert (grads[1] - grads[0]).norm() > 0


def test_a_small_batch_never_loses_the_boundary_silently():
    assert [boundary_count(n, 0.25) for n in (2, 3, 4, 8, 12)] == [1, 1, 1, 2, 3]
    with pytest.raises(UserError, match="TCM needs 2 or more"):
        boundary_count(1, 0.25)


def test_tcm_loss_is_the_mean_inside_plus_the_weighted_mean_at_the_boundary():
    torch.manual_seed(0)
    method = TCM(w_b=0.37)
    nets = method.nets(ConsistencyModel(net()))
    loss, stats = method.loss(nets, x0(), None, 10**6, 10)
    r = method.delta.r(stats["t"], 10**6)
    weighted = method.weight(stats["t"], r) * stats["distance"]
    torch.testing.assert_close(loss, weighted[4:].mean() + 0.37 * weighted[:4].mean())


def test_tcm_stage_2_at_its_start_equals_stage_1():
    """The student is its boundary network: with equal nets, f_trunc is f."""
    torch.manual_seed(0)
    nets = TCM().nets(ConsistencyModel(net()).eval())
    x, t = torch.randn(16, *SHAPE), torch.linspace(0.1, 3, 16)
    with torch.no_grad():
        routed = nets.target(x, t, t < 1.0, LABELS, None)
        torch.testing.assert_close(routed, nets.student(x, t, cond=LABELS), rtol=1e-5, atol=1e-6)


def test_student_and_target_drop_the_same_elements():
    """At t = r the two passes agree only if their masks do; other keys would differ."""
    torch.manual_seed(0)
    student = ConsistencyModel(net(dropout=0.5))
    nets = ICT().nets(student)
    x, t = torch.randn(16, *SHAPE), torch.full((16,), 0.5)
    ft, fr = student_and_target(nets, x, t, x, t, LABELS)
    torch.testing.assert_close(ft.detach(), fr, rtol=0, atol=0)
    again = student(x, t, cond=LABELS)
    assert (again - fr).abs().max() > 1e-3


def test_dropout_masks_stay_shared_when_the_batch_is_split_between_two_networks():
    torch.manual_seed(0)
    student = ConsistencyModel(Spy(net(dropout=0.5)))
    nets = TCM().nets(student)
    x, t = torch.randn(16, *SHAPE), torch.linspace(0.5, 2, 16)
    key = torch.arange(16) + 77
    below = t < 1.0
    with torch.no_grad():
        whole = student(x, t, cond=LABELS, key=key)
        routed = nets.target(x, t, below, LABELS, key)
    torch.testing.assert_close(routed, whole, rtol=1e-5, atol=1e-6)
    assert len(nets.target.boundary.net.calls[0]["t"]) == int(below.sum())


def test_the_frozen_network_keeps_its_dropout_and_its_weights():
    student = ConsistencyModel(net(dropout=0.3)).train()
    nets = TCM().nets(student)
    before = copy.deepcopy(nets.target.boundary.state_dict())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    method = TCM()
    for _ in range(3):
        method.loss(nets, x0(), LABELS, 10, 10)[0].backward()
        optimizer.step()
    assert nets.target.boundary.training
    for name, value in nets.target.boundary.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_target_at_r_0_is_the_data_and_costs_no_pass():
    torch.manual_seed(0)
    student = ConsistencyModel(Spy(net()))
    method = ECT(delta=Discretisation(q=2, double_every=10))
    loss, stats = method.loss(method.nets(student), x0(256), None, 0, 10)
    r = method.delta.r(stats["t"], 0)
    assert abs((r == 0).float().mean() - 0.81) < 0.1  # t <= ln 7 = 1.946: 81 % of the lognormal
    assert len(student.net.calls) == 2 and len(student.net.calls[1]["t"]) == int((r > 0).sum())
    assert loss.isfinite()


def test_tcm_refuses_to_sample_below_t_prime_after_training_set_up():
    nets = TCM(t_prime=1.2).nets(ConsistencyModel(net()))
    assert nets.student.t_min == 1.2
