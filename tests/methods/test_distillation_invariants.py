"""What holds for CT, CD, CTM and continuous time, whatever the networks: gradients, passes, dropout masks."""

from dataclasses import replace

import pytest
import torch
from distillation_setup import EPS, Replay
from torch import nn

from onejump.losses import mean_l2
from onejump.methods.base import Nets, gradient_ratio, student_and_target
from onejump.methods.cd import CD
from onejump.methods.continuous import ContinuousCD, ContinuousCT
from onejump.methods.ct import CT
from onejump.methods.ctm import CTM
from onejump.methods.dsm import DSM
from onejump.methods.ict import ICT
from onejump.model import ConsistencyModel
from onejump.networks.mlp import MLPConfig
from onejump.precond import CM, Euler, ToData
from onejump.times import karras_grid

SHAPE = (1, 4, 4)
LABELS = torch.arange(16) % 3


class Spy(nn.Module):
    """A network that notes what it was asked."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, []

    @property
    def last_weight(self):
        return self.net.last_weight

    def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
        call = {"t": (4 * c_noise).exp(), "key": key, "cond": cond, "grad": torch.is_grad_enabled(), "x": x}
        self.calls.append(call | {"s": None if c_noise_s is None else (4 * c_noise_s).exp()})
        return self.net(x, c_noise, c_noise_s, cond, key)


def net(dropout=0.0, second_time="off", seed=1):
    torch.manual_seed(seed)
    mlp = MLPConfig(shape=SHAPE, width=32, depth=2, dropout=dropout, label_dim=3, second_time=second_time).build()
    for p in mlp.parameters():
        p.data.normal_(0, 0.2)
    return Spy(mlp.train())


def teacher():
    return ConsistencyModel(net(seed=2)).eval()


def nets_of(method, dropout=0.0, seed=1):
    """The method's networks; the average, where there is one, has other weights than the student."""
    if isinstance(method, CTM):
        student = ConsistencyModel(net(dropout, "random", seed), jump=Euler(), second_time=True)
    else:
        student = ConsistencyModel(net(dropout, seed=seed), jump=CM())
    distilled = isinstance(method, CD | CTM | ContinuousCD)
    nets = method.nets(student, teacher()) if distilled else method.nets(student)
    if nets.average:
        for p in nets.average.model.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return nets


def x0(n=16):
    return torch.randn(n, *SHAPE).clamp(-1, 1)


def flat_gradient(nets):
    return torch.cat([p.grad.flatten() for p in nets.student.parameters()])


METHODS = {
    "CT": CT(s0=40, s1=40),
    "CD": CD(),
    "CD with an average": CD(mu=0.95),
    "CTM": CTM(max_steps=3),
    "continuous CT": ContinuousCT(),
    "continuous CD": ContinuousCD(),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_loss_reaches_every_weight_of_the_student_and_no_other(method):
    torch.manual_seed(0)
    nets = nets_of(method)
    loss, stats = method.loss(nets, x0(), LABELS, 5, 10)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in nets.student.parameters())
    assert all(p.grad.abs().sum() > 0 for p in nets.student.parameters())
    if nets.teacher:
        assert all(p.grad is None for p in nets.teacher.parameters())
        assert not any(call["grad"] for call in nets.teacher.net.calls)
        assert all((call["cond"] == LABELS).all() for call in nets.teacher.net.calls)
    if nets.average:
        assert nets.target is nets.average.model and nets.target is not nets.student
        assert all(p.grad is None and not p.requires_grad for p in nets.target.parameters())
    assert stats["t"].shape == stats["distance"].shape == (16,) and loss.shape == ()


@pytest.mark.parametrize("method", [CT(s0=3, s1=3), CD(n=4), CD(n=4, mu=0.9), ICT(s0=3, s1=3)])
@pytest.mark.parametrize("jump", [CM(), ToData()])
def test_a_target_at_the_last_time_is_x_itself_and_costs_no_pass(method, jump):
    """With the boundary at eps; a model that jumps to 0 still has to be asked at eps."""
    torch.manual_seed(0)
    nets = nets_of(method)
    nets.student.jump = jump
    target = nets.average.model if nets.average else nets.student
    _, stats = method.loss(nets, x0(64), None, 5, 10)
    calls = (target.net.calls if nets.average else []) + nets.student.net.calls[1:]
    second = stats["t"] > karras_grid(4)[1] * 1.001  # r > eps
    assert 5 < second.sum() < 60 and len(nets.student.net.calls[0]["t"]) == 64
    assert sum(len(call["t"]) for call in calls) == (64 if isinstance(jump, ToData) else second.sum())
    assert not any(call["grad"] for call in calls)


@pytest.mark.parametrize("method", [CT(s0=5, s1=5), CD(n=6)])
def test_all_neighbours_of_the_grid_are_equally_likely(method):
    torch.manual_seed(0)
    n = 4000
    nets = nets_of(method)
    _, stats = method.loss(nets, x0(n), None, 1, 1)
    share = torch.tensor([torch.isclose(stats["t"], t).float().mean() for t in karras_grid(6).float()])
    assert share[0] == 0 and ((share[1:] - 0.2).abs() < 4 * (0.16 / n) ** 0.5).all()


def ctm_passes(monkeypatch, t, s, k, n=8):
    """One pass of CTM at these indices; what each network was asked."""
    replay = Replay(monkeypatch)
    replay.ctm_times(torch.tensor(t), torch.tensor(s), k)
    nets = nets_of(CTM(), dropout=0.3)
    data = x0(len(t))
    found = CTM(n=n, max_steps=n - 1).at_the_data(nets, data, LABELS[: len(t)], 0)
    return nets, found, karras_grid(n).float()


def test_ctm_asks_no_network_for_a_jump_of_no_length(monkeypatch):
    t, s, k = [7, 7, 5, 5, 4, 2], [0, 5, 3, 0, 1, 0], 2
    nets, _, grid = ctm_passes(monkeypatch, t, s, k)
    (inner, inner_target), outer = nets.student.net.calls, nets.target.net.calls
    assert inner["grad"] and not inner_target["grad"] and len(inner["t"]) == 6
    rows = [i for i in range(6) if t[i] - k > s[i]]
    torch.testing.assert_close(inner_target["t"], grid[[t[i] - k for i in rows]], rtol=1e-5, atol=0)
    torch.testing.assert_close(inner_target["s"], grid[[s[i] for i in rows]], rtol=1e-5, atol=0)
    assert (inner_target["cond"] == LABELS[rows]).all()
    rows = [i for i in range(6) if s[i] > 0]
    assert [call["grad"] for call in outer] == [True, False]
    for call in outer:
        torch.testing.assert_close(call["t"], grid[[s[i] for i in rows]], rtol=1e-5, atol=0)
        torch.testing.assert_close(call["s"], torch.full((len(rows),), EPS), rtol=1e-5, atol=0)
        assert (call["cond"] == LABELS[rows]).all()
    assert len(nets.teacher.net.calls) == 2 * k and all(len(call["t"]) == 6 for call in nets.teacher.net.calls)


def test_all_passes_of_ctm_share_the_dropout_masks_of_a_sample(monkeypatch):
    t, s, k = [7, 7, 5, 5, 4, 2], [0, 5, 1, 0, 1, 0], 1
    nets, _, _ = ctm_passes(monkeypatch, t, s, k)
    inner, inner_target = nets.student.net.calls
    assert len(set(inner["key"].tolist())) == 6
    rows = torch.tensor([t[i] - k > s[i] for i in range(6)])
    assert torch.equal(inner_target["key"], inner["key"][rows])
    for call in nets.target.net.calls:
        assert torch.equal(call["key"], inner["key"][torch.tensor(s) > 0])


def test_student_and_average_drop_the_same_elements():
    """At t = r and equal weights the two passes agree only if their masks do."""
    torch.manual_seed(0)
    student = ConsistencyModel(net(dropout=0.5), jump=CM())
    nets = CT().nets(student)
    x, t = x0(), torch.full((16,), 0.5)
    ft, fr = student_and_target(nets, x, t, x, t, LABELS)
    torch.testing.assert_close(ft.detach(), fr, rtol=0, atol=0)
    assert nets.average.model.training and (student(x, t, cond=LABELS) - fr).abs().max() > 1e-3


def detached(nets: Nets) -> Nets:
    """The mistake to make: an outer pass that lets no gradient through."""
    return replace(nets, target=lambda x, *times, cond, key: nets.target(x, *times, cond=cond, key=key).detach())


@pytest.mark.parametrize("s", [0, 2])
def test_gradient_of_ctm_flows_through_the_outer_jump(monkeypatch, s):
    """Where s = eps there is no outer jump, and detaching it changes nothing; else nothing would be left."""
    Replay(monkeypatch).ctm_times(torch.full((16,), 6), torch.full((16,), s), 2)
    nets, data, found = nets_of(CTM()), x0(), []
    for used in (nets, detached(nets)):
        torch.manual_seed(3)
        estimate, target, _ = CTM().at_the_data(used, data, LABELS, 0)
        assert not target.requires_grad
        nets.student.zero_grad()
        if estimate.requires_grad:
            mean_l2(estimate, target).mean().backward()
            found.append(flat_gradient(nets))
    assert len(found) == (2 if s == 0 else 1) and found[0].norm() > 1e-4
    if s == 0:
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_detaching_the_outer_jump_would_change_the_gradient_of_a_mixed_batch(monkeypatch):
    t, s = torch.tensor([6, 7] * 8), torch.tensor([0, 3] * 8)
    Replay(monkeypatch).ctm_times(t, s, 2)
    nets, data, found = nets_of(CTM()), x0(), []
    for used in (nets, detached(nets)):
        torch.manual_seed(3)
        nets.student.zero_grad()
        estimate, target, _ = CTM().at_the_data(used, data, LABELS, 0)
        inner = torch.autograd.grad(mean_l2(estimate, target).mean(), nets.student.net.net.last.weight)[0]
        found.append(inner)
    assert (found[0] - found[1]).norm() > 0.01 * found[0].norm()


def test_gradient_of_ctm_is_the_derivative_with_target_and_average_held(monkeypatch):
    """A central difference along a random direction of the student's weights, in float64."""
    t, s = torch.tensor([6, 7, 4, 5] * 4), torch.tensor([0, 3, 2, 1] * 4)
    Replay(monkeypatch).ctm_times(t, s, 2)
    nets, data = nets_of(CTM()), x0().double()
    for model in (nets.student, nets.target, nets.teacher):
        model.double()
    direction = [torch.randn_like(p) for p in nets.student.parameters()]

    def pair(shift):
        for p, d in zip(nets.student.parameters(), direction, strict=True):
            p.data += shift * d
        torch.manual_seed(3)
        out = CTM().at_the_data(nets, data, LABELS, 0)
        for p, d in zip(nets.student.parameters(), direction, strict=True):
            p.data -= shift * d
        return out

    estimate, target, _ = pair(0.0)
    mean_l2(estimate, target).mean().backward()
    found = sum((p.grad * d).sum() for p, d in zip(nets.student.parameters(), direction, strict=True))
    h = 1e-5
    up, down = (mean_l2(pair(shift)[0].detach(), target).mean() for shift in (h, -h))
    torch.testing.assert_close(found, (up - down) / (2 * h), rtol=1e-6, atol=0)


def test_gradient_ratio_is_that_of_the_norms_at_the_last_layer():
    torch.manual_seed(0)
    student = ConsistencyModel(net())
    x, t = x0(), torch.ones(16)
    out = student(x, t, cond=LABELS)
    of, to = out.square().mean(), (out - 1).square().mean()
    a, b = (torch.autograd.grad(v, student.net.last_weight, retain_graph=True)[0].norm() for v in (of, to))
    ratio = gradient_ratio(of, to, student)
    torch.testing.assert_close(ratio, a / (b + 1e-4))
    assert not ratio.requires_grad and all(p.grad is None for p in student.parameters())
    torch.testing.assert_close(gradient_ratio(of, 1e3 * to, student), ratio / 1e3, rtol=1e-3, atol=0)
    assert gradient_ratio(of, to, student, low=2 * ratio.item()) == 2 * ratio
    assert gradient_ratio(of, to, student, high=ratio.item() / 2) == ratio / 2
    assert gradient_ratio(of, 0 * to, student) == min((a / 1e-4).item(), 1e4)


class LouderDSM(DSM):
    def loss(self, nets, x0, cond, step, steps):
        loss, stats = super().loss(nets, x0, cond, step, steps)
        return 1000 * loss, stats


def test_the_scale_of_the_denoising_loss_cancels_in_ctm():
    """And the two gradients weigh the same at the last layer."""
    method, data, found = CTM(max_steps=3), x0(), []
    for dsm in (method.dsm, LouderDSM(method.dsm.times)):
        nets = nets_of(method)
        torch.manual_seed(3)
        replace(method, dsm=dsm).loss(nets, data, LABELS, 4, 10)[0].backward()
        found.append(flat_gradient(nets))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4 * found[0].abs().max().item())
    nets = nets_of(method)
    torch.manual_seed(3)
    estimate, target, _ = method.at_the_data(nets, data, LABELS, 4)
    mean_l2(estimate, target).mean().backward()
    ctm = nets.student.net.last_weight.grad.clone()
    nets = nets_of(method)
    torch.manual_seed(3)
    method.loss(nets, data, LABELS, 4, 10)[0].backward()
    dsm = nets.student.net.last_weight.grad - ctm
    torch.testing.assert_close(dsm.norm(), ctm.norm(), rtol=1e-3, atol=0)
