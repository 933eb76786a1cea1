"""The ways to run a network: each must be the same function, and the compiled one must not compile again and again."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from onejump.engine import Engine, blocks_of
from onejump.model import ConsistencyModel
from onejump.networks import ADMUNetConfig, EDM2UNetConfig, MLPConfig, SongUNetConfig, normalized
from onejump.networks.layers import dropout_mask, keyed_dropout, shifted_key

SONG = SongUNetConfig(8, 3, 5, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.2)
NCSN = SongUNetConfig(8, 3, model_channels=8, channel_mult=(1, 1), num_blocks=1, attn_resolutions=(), variant="ncsnpp")
ADM = ADMUNetConfig(8, 3, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.2)
EDM2 = EDM2UNetConfig(8, 3, 5, 8, (1, 2), 1, (4,), channels_per_head=8, dropout=0.2, dropout_resolution=0)
MLP = MLPConfig((3, 8, 8), 5, width=16, depth=3, dropout=0.2)


def model_of(network) -> ConsistencyModel:
    torch.manual_seed(0)
    net = network.build()
    for p in net.parameters():  # some start at zero, and would hide a difference
        nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5 if p.ndim > 1 else 0.5)
    return ConsistencyModel(net)


def step(model: ConsistencyModel, rows: int, keyed: bool = True) -> torch.Tensor:
    """A pass with gradients over 4 samples, one without over the first `rows`, and the gradient, in one vector."""
    torch.manual_seed(1)
    x, t, key = torch.randn(4, 3, 8, 8), torch.rand(4) + 0.1, torch.arange(4) << 40
    cond = torch.arange(4) if model.net.config.label_dim else None
    f = model(x, t, cond=cond, key=key if keyed else None)
    with torch.no_grad():
        target = model(x[:rows], t[:rows], cond=None if cond is None else cond[:rows], key=key[:rows])
    model.zero_grad()
    f.square().mean().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.detach().flatten() for part in (f, target, *gradients)])


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("network", [SONG, NCSN, ADM, EDM2, MLP])
def test_layout_and_checkpointing_change_nothing_beyond_rounding(network):
    model = model_of(network)
    expected, names = step(model, 3), [name for name, _ in model.named_parameters()]
    for engine, checkpointing in ((Engine(channels_last=True), False), (Engine(), True)):
        other = copy.deepcopy(model)
        engine.prepare(other, checkpointing)
        assert apart(step(other, 3), expected) < (1e-5 if engine.channels_last else 1e-12)
        assert [name for name, _ in other.named_parameters()] == names


def test_checkpointed_passes_without_keys_see_one_mask_each():
    model = model_of(MLP)
    expected = step(model, 4, keyed=False)
    Engine().prepare(model, checkpointing=True)
    assert torch.equal(step(model, 4, keyed=False), expected)


def test_compiled_blocks_are_the_same_function_in_two_graphs_a_kind(unchecked):
    """One with gradients, one without for any number of rows; no break, and no graph twice for blocks of a kind."""
    model = model_of(dataclasses.replace(SONG, channel_mult=(1,), num_blocks=2, attn_resolutions=()))
    expected = {rows: step(model, rows) for rows in (4, 3, 2)}
    counter = CompileCounterWithBackend("eager")
    Engine(compiled=True, channels_last=True).prepare(model, checkpointing=True, backend=counter)
    for rows in (4, 3, 2, 4):
        assert apart(step(model, rows), expected[rows]) < 1e-5
    assert len(blocks_of(model.net)) == 7
    assert counter.frame_count == 2 * 3  # of the encoder, of the decoder, and the one with attention


@pytest.fixture
def unchecked(monkeypatch):
    """The checks of annotations are no part of what is compiled."""
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("network", [SONG, NCSN, ADM, EDM2])
def test_maps_stay_channels_last_through_the_whole_network(network):
    model, found = model_of(network), []
    Engine(channels_last=True).prepare(model)
    for module in model.net.modules():
        if isinstance(module, nn.Conv2d) or type(module).__name__ == "MPConv":
            module.register_forward_hook(lambda module, inputs, out: found.append(out))
    model(torch.randn(2, 3, 8, 8), torch.rand(2) + 0.1)
    maps = [out for out in found if out.ndim == 4 and min(out.shape[1:]) > 1]
    assert len(maps) > 10
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in maps)


def test_weights_are_normalised_once_a_step_and_not_by_passes_without_gradients():
    net, x, t = model_of(EDM2).net, torch.randn(2, 3, 8, 8), torch.rand(2)
    with normalized(net):
        out = net(x, t, key=torch.arange(2)).detach()
        with torch.no_grad(), Norms() as within:
            target = net(x, t, key=torch.arange(2))
    with torch.no_grad(), Norms() as after:
        assert torch.equal(net(x, t, key=torch.arange(2)), out)
    assert apart(target, out) < 1e-6
    assert after.of_weights == sum(type(module).__name__ == "MPConv" for module in net.modules())
    assert within.of_weights == 0


class Norms(TorchDispatchMode):
    """Counts the norms of what is no map of this batch."""

    def __init__(self):
        super().__init__()
        self.of_weights = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.linalg_vector_norm.default:
            self.of_weights += isinstance(args[0], nn.Parameter)
        return func(*args, **(kwargs or {}))


def test_a_mask_does_not_depend_on_the_layout_and_has_it():
    x, key = torch.randn(2, 6, 4, 5), torch.tensor([5, -7])
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(keyed_dropout(x, key, 3, 0.4), keyed_dropout(last, key, 3, 0.4))
    assert dropout_mask(last, key, 3, 0.4).stride() == last.stride()


def test_a_shifted_key_gives_the_mask_of_a_later_layer():
    x, key = torch.randn(3, 100), torch.tensor([5, -7, 2**63 - 1])
    assert torch.equal(keyed_dropout(x, shifted_key(key, 30), 1, 0.4), keyed_dropout(x, key, 31, 0.4))


def test_derivatives_of_dropout_are_its_mask():
    x, key = torch.randn(3, 50, dtype=torch.float64, requires_grad=True), torch.arange(3)
    mask = dropout_mask(x, key, 2, 0.3)
    (gradient,) = torch.autograd.grad(keyed_dropout(x, key, 2, 0.3).sum(), x)
    _, slope = torch.func.jvp(lambda x: keyed_dropout(x, key, 2, 0.3), (x.detach(),), (torch.ones_like(x),))
    assert torch.equal(gradient, mask) and torch.equal(slope, mask)
