"""The one-pass update against torch's optimisers, the papers' equations, and the same steps without the bad ones."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from onejump.optim import Adam, RAdam
from onejump.types import UserError
from onejump.update import GROWTH_INTERVAL, Updater

OPTIMIZERS = [RAdam(), RAdam(betas=(0.5, 0.9)), Adam(), Adam(betas=(0.9, 0.99), eps=1e-4)]
DEVICE_SIDE = pytest.mark.parametrize("on_host", [True, False], ids=["host", "device"])


def network(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(36, 2)).to(dtype)


def parameters(net):
    return list(net.parameters())


def updater_of(net, optimizer=None, averages=0, on_host=True, **options):
    """With on_host False it does what it does on a GPU: all verdicts are reached by the device, in the kernels."""
    copies = [copy.deepcopy(net).requires_grad_(False) for _ in range(averages)]
    updater = Updater(optimizer or RAdam(), parameters(net), [parameters(of) for of in copies], **options)
    updater.on_host = on_host
    return updater


def backward(net, step, scale=1.0):
    """The loss of a step, from data that only the step decides; gradients of scale times it."""
    generator = torch.Generator().manual_seed(step)
    x = 3 * torch.randn(4, 3, 5, 5, dtype=parameters(net)[0].dtype, generator=generator)
    loss = net(x).square().mean()
    (scale * loss).backward()
    return loss.detach()


def state(net, updater):
    averages = {f"{j}/{i}": a for j, of in enumerate(updater.averages) for i, a in enumerate(of)}
    weights = dict(net.named_parameters())
    return {name: t.detach().clone() for name, t in (weights | averages | updater.tensors()).items()}


def assert_equal(a, b, apart_from=()):
    assert a.keys() == b.keys()
    assert all(a[name].equal(b[name]) for name in a if name not in apart_from)


def assert_close(ours, theirs, rtol, atol):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@DEVICE_SIDE
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("clip", [1e6, 0.3])
def test_equals_torchs_optimizers_clipping_and_interpolation(optimizer, clip, on_host):
    net, theirs = network(), network()
    updater = updater_of(net, optimizer, 2, on_host)
    averages = [[p.detach().clone() for p in theirs.parameters()] for _ in range(2)]
    kind = torch.optim.RAdam if isinstance(optimizer, RAdam) else torch.optim.Adam
    reference = kind(theirs.parameters(), betas=optimizer.betas, eps=optimizer.eps)
    for step in range(16):
        rate, decays = 1e-2 / (1 + step), (0.9, 1 - 1 / (1 + step))
        norm = updater.step(backward(net, step), rate, decays, clip)
        assert all(p.grad is None for p in net.parameters())
        backward(theirs, step)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        with torch.no_grad():
            for average, decay in zip(averages, decays, strict=True):
                torch._foreach_lerp_(average, parameters(theirs), 1 - decay)
        if step in (0, 4, 5, 15):  # RAdam rectifies from the sixth step on
            assert_close(net.parameters(), theirs.parameters(), rtol=1e-5, atol=1e-7)
    for ours, average in zip(updater.averages, averages, strict=True):
        assert_close(ours, average, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rectified", [True, False])
def test_follows_the_papers_algorithm(rectified):
    """Adam: Kingma & Ba, algorithm 1. RAdam: Liu et al. 2020, algorithm 2, with torch's place of eps."""
    optimizer = (RAdam if rectified else Adam)(betas=(0.8, 0.99), eps=1e-3)
    net = network(torch.float64)
    updater, theta = updater_of(net, optimizer), [p.detach().clone() for p in net.parameters()]
    m, v = [torch.zeros_like(p) for p in theta], [torch.zeros_like(p) for p in theta]
    b1, b2 = optimizer.betas
    rho_inf = 2 / (1 - b2) - 1
    for n in range(1, 20):
        loss = backward(net, n)
        for i, p in enumerate(net.parameters()):
            m[i] = b1 * m[i] + (1 - b1) * p.grad
            v[i] = b2 * v[i] + (1 - b2) * p.grad**2
            m_hat = m[i] / (1 - b1**n)
            rho = rho_inf - 2 * n * b2**n / (1 - b2**n)
            if not rectified:
                theta[i] -= 0.01 * m_hat / ((v[i] / (1 - b2**n)).sqrt() + 1e-3)
            elif rho <= 5:
                theta[i] -= 0.01 * m_hat
            else:
                r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
                theta[i] -= 0.01 * r * m_hat * math.sqrt(1 - b2**n) / (v[i].sqrt() + 1e-3)
        updater.step(loss, 0.01, (), math.inf)
        assert_close(net.parameters(), theta, rtol=1e-12, atol=1e-14)


@DEVICE_SIDE
@pytest.mark.parametrize("optimizer", [RAdam(), Adam()], ids=str)
def test_bad_steps_change_nothing(optimizer, on_host):
    """Also at the step from which RAdam would rectify: steps that were not made do not count."""
    net, undisturbed = network(), network()
    updater, other = updater_of(net, optimizer, 1, on_host), updater_of(undisturbed, optimizer, 1, on_host)
    bad = {0: "loss", 3: "gradient", 5: "gradient", 6: "loss", 11: "gradient"}
    made = 0
    for step in range(14):
        loss = backward(net, made)
        if step in bad:
            before = state(net, updater)
            if bad[step] == "loss":
                loss = loss * math.inf
            else:
                parameters(net)[0].grad[0, 0, 0, 0] = math.nan
            updater.step(loss, 1e-2, [0.5], 1.0)
            assert_equal(state(net, updater), before, apart_from=("skipped", "skipped_in_row"))
            assert all(p.grad is None for p in net.parameters())
        else:
            updater.step(loss, 1e-2, [0.5], 1.0)
            other.step(backward(undisturbed, made), 1e-2, [0.5], 1.0)
            made += 1
        assert int(updater.skipped) == len([s for s in bad if s <= step])
        assert int(updater.skipped_in_row) == (0 if step not in bad else 1 + (step - 1 in bad))
    assert_equal(state(net, updater), state(undisturbed, other), apart_from=("skipped",))
    assert int(updater.count) == made == 9


@DEVICE_SIDE
def test_loss_scale_leaves_the_step_as_it_is_and_follows_overflows(on_host):
    net, plain = network(), network()
    updater, other = updater_of(net, Adam(), 1, on_host, scaled=True), updater_of(plain, Adam(), 1, on_host)
    updater.good_in_row.fill_(GROWTH_INTERVAL - 3)
    scales = []
    for step in range(6):
        loss = backward(net, step, updater.scale)
        scales.append(float(updater.scale))
        if step == 4:
            parameters(net)[1].grad[0] = math.inf
            updater.step(loss, 1e-2, [0.9], 1.0)
            continue
        norm = updater.step(loss, 1e-2, [0.9], 1.0)
        expected = other.step(backward(plain, step), 1e-2, [0.9], 1.0)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
    assert scales == [16, 16, 16, 32, 32, 16] and int(updater.good_in_row) == 1
    assert_close(net.parameters(), plain.parameters(), rtol=1e-5, atol=1e-7)
    assert other.scale == 1


@pytest.mark.parametrize("optimizer", [RAdam(), Adam()], ids=str)
def test_going_on_from_its_tensors_is_bit_exact(optimizer):
    net = network()
    updater = updater_of(net, optimizer, 1, scaled=True)
    for step in range(16):
        if step == 7:
            saved = {name: tensor.clone() for name, tensor in updater.tensors().items()}
            again, averages = copy.deepcopy(net), copy.deepcopy(updater.averages)
        updater.step(backward(net, step, updater.scale), 1e-2, [0.9], 1.0)
    resumed = Updater(optimizer, parameters(again), averages, scaled=True)
    resumed.load(saved)
    for step in range(7, 16):
        resumed.step(backward(again, step, resumed.scale), 1e-2, [0.9], 1.0)
    assert_equal(state(again, resumed), state(net, updater))


def test_what_is_of_another_optimizer_is_refused():
    saved = updater_of(network()).tensors()
    with pytest.raises(UserError, match="saved by RAdam for 6 parameters, this is Adam for 6 parameters; train with"):
        updater_of(network(), Adam()).load(saved)
    with pytest.raises(UserError, match="RAdam for 6 parameters, this is RAdam for 4 parameters"):
        updater_of(network()[2:]).load(saved)
    saved["2/exp_avg"] = saved["2/exp_avg"][:3]
    with pytest.raises(UserError, match=r"2/exp_avg has the shape \[3, 6, 1, 1\] in the checkpoint and \[4, 6, 1, 1\]"):
        updater_of(network()).load(saved)
    with pytest.raises(UserError, match="the checkpoint has no step"):
        updater_of(network()).load({name: t for name, t in updater_of(network()).tensors().items() if name != "step"})


def test_a_loss_scale_starts_anew_where_the_checkpoint_has_none():
    updater = updater_of(network(), scaled=True)
    updater.load(updater_of(network()).tensors())
    assert updater.scale == 16
    unscaled = updater_of(network())
    unscaled.load(updater.tensors())
    assert unscaled.scale == 1


def test_a_parameter_without_gradient_counts_as_zero_gradient():
    """It moves on by its momentum, and one that never had a gradient stays."""
    net, zeros = network(), network()
    updater, other = updater_of(net, averages=1), updater_of(zeros, averages=1)
    unused = parameters(net)[0].detach().clone()
    for step in range(8):
        loss = backward(net, step)
        backward(zeros, step)
        for i in [0, *([3] if step % 2 else [])]:
            parameters(net)[i].grad = None
            parameters(zeros)[i].grad.zero_()
        updater.step(loss, 1e-2, [0.9], 1.0)
        other.step(loss, 1e-2, [0.9], 1.0)
    assert_equal(state(net, updater), state(zeros, other))
    assert parameters(net)[0].equal(unused)


def test_weights_may_take_another_layout_at_any_time():
    """Averages and moments follow them; gradients come in any layout."""
    net, contiguous = network(), network()
    updater, other = updater_of(net, averages=1), updater_of(contiguous, averages=1)
    for step in range(9):
        if step == 3:
            net.to(memory_format=torch.channels_last)
        loss = backward(net, step)
        if step == 6:
            for p in net.parameters():
                p.grad = p.grad.contiguous()
        updater.step(loss, 1e-2, [0.9], 1.0)
        other.step(backward(contiguous, step), 1e-2, [0.9], 1.0)
    assert not parameters(net)[0].is_contiguous() and not updater.exp_avg[0].is_contiguous()
    ours, theirs = state(net, updater), state(contiguous, other)
    assert_close(ours.values(), theirs.values(), rtol=1e-5, atol=1e-7)


class Refused(TorchDispatchMode):
    """Fails where the host asks for a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", [RAdam(), Adam()], ids=str)
def test_never_waits_for_the_device(optimizer):
    net = network()
    updater = updater_of(net, optimizer, 2, on_host=False, scaled=True)
    for step in range(2):
        loss = backward(net, step, updater.scale)
        with Refused():
            updater.step(loss * (math.nan if step else 1), 1e-2, (0.5, 0.9), 1.0)


def test_the_norm_of_shards_is_that_of_the_whole():
    """Each process clips its shard by the norm that `summed` makes of all of them."""
    net, whole = network(), network()
    squares = []
    first = Updater(Adam(eps=1e-2), parameters(net)[:2], summed=lambda x: squares[0])
    rest = Updater(Adam(eps=1e-2), parameters(net)[2:], summed=lambda x: squares[0])
    other = updater_of(whole, Adam(eps=1e-2))
    for step in range(5):
        loss = backward(net, step)
        squares[:] = [sum(p.grad.square().sum() for p in net.parameters())]
        norms = [shard.step(loss, 1e-2, (), 0.1) for shard in (first, rest)]
        expected = other.step(backward(whole, step), 1e-2, (), 0.1)
        torch.testing.assert_close(torch.stack(norms), expected.expand(2), rtol=1e-5, atol=0)
    assert_close(net.parameters(), whole.parameters(), rtol=1e-5, atol=1e-7)


@pytest.fixture
def alone():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_weights_take_the_same_steps(alone):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net, average, whole = network(), network().requires_grad_(False), network()
    for model in (net, average):
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    updater, other = Updater(RAdam(), parameters(net), [parameters(average)]), updater_of(whole, averages=1)
    for step in range(9):
        updater.step(backward(net, step), 1e-2, [0.9], 1.0)
        other.step(backward(whole, step), 1e-2, [0.9], 1.0)
        if step == 4:
            updater.load(other.tensors())  # of a run in one piece
    ours = {name: t.full_tensor() if "/" in name else t for name, t in updater.tensors().items()}
    assert_equal(ours, other.tensors())
    assert all(p.full_tensor().equal(q) for p, q in zip(net.parameters(), whole.parameters(), strict=True))
    assert all(p.full_tensor().equal(q) for p, q in zip(updater.averages[0], other.averages[0], strict=True))
