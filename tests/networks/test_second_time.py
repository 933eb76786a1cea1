"""CTM's second time: the networks read the time at which the jump ends."""

from dataclasses import replace

import jaxtyping
import pytest
import torch
from network_setup import DIGITS, batch, golden, lively, recipe, relative_error

from onejump.networks import MLPConfig, SongUNetConfig
from onejump.networks.layers import check_second_time
from onejump.types import UserError

POINTS = MLPConfig(shape=(2,), label_dim=3, width=16)
BOTH = pytest.mark.parametrize("config", [DIGITS, POINTS], ids=["unet", "mlp"])


def inputs(config, n=3):
    """x, c_noise, c_noise_s, cond."""
    if isinstance(config, MLPConfig):
        return torch.randn(n, 2).double(), torch.randn(n).double(), torch.randn(n).double(), torch.arange(n) % 3
    x, c_noise, cond = batch(n)
    return x, c_noise, torch.randn(n).double(), cond


def randomised(net):
    """Every parameter a random number: no layer is zero."""
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.double()


def test_output_equals_ctms():
    """The file holds CTM's rescaled times 250 ln t; our c_noise is ln(t) / 4, a thousandth of them."""
    z = golden("songunet_ctm.npz")
    for t, rescaled in ((z["in/t"], z["in/rescaled_t"]), (z["in/s"], z["in/rescaled_s"])):
        assert torch.allclose(t.log() / 4, rescaled / 1000, rtol=1e-6)
    assert torch.allclose(z["unrescaled_t"], (z["in/rescaled_t"] / 250).exp(), rtol=1e-6)
    net = SongUNetConfig(16, 3, 0, 16, (2, 2), 1, (8,), dropout=0.0, second_time="random").build()
    for name, p in net.named_parameters():
        p.data.copy_(recipe("model." + name, p.shape))
    x, c_noise, c_noise_s = z["in/x"], z["in/t"].log() / 4, z["in/s"].log() / 4
    assert relative_error(net(x, c_noise, c_noise_s), z["out/F_t_s"]) < 5e-6
    x, c_noise, c_noise_s = x.double(), z["in/rescaled_t"].double() / 1000, z["in/rescaled_s"].double() / 1000
    assert relative_error(net.double()(x, c_noise, c_noise_s), z["out/F_t_s_f64"]) < 1e-12


def test_state_dict_of_the_cifar10_network_is_ctms():
    with torch.device("meta"):
        one, two = SongUNetConfig().build(), SongUNetConfig(second_time="random").build()
    added = two.state_dict().keys() - one.state_dict().keys()
    blocks = {name.removesuffix(".affine.weight") for name in one.state_dict() if name.endswith(".affine.weight")}
    layers = {f"{name}.affine_s" for name in blocks} | {"map_layer0_s", "map_layer1_s"}
    assert added == {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    assert one.state_dict().keys() < two.state_dict().keys() and len(two.state_dict()) == 494
    assert f"{sum(p.numel() for p in two.parameters()) / 1e6:.2f}" == "60.40"  # million


def test_random_start_is_xavier_uniform_in_every_second_layer():
    net = SongUNetConfig(8, 1, 0, 64, (2, 2), 1, (8, 4), second_time="random").build()
    layers = [(name, m) for name, m in net.named_modules() if name.endswith("_s")]
    assert len(layers) == 2 + 2 + 1 + 2 + 5
    for name, layer in layers:
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.98 * bound < layer.weight.abs().max() <= bound and torch.all(layer.bias == 0), name


@BOTH
def test_starts_as_its_one_time_twin_for_any_s(config):
    twin, net = randomised(config.build()), replace(config, second_time="zero").build().double()
    net.load_state_dict(net.state_dict() | twin.state_dict())
    x, c_noise, c_noise_s, cond = inputs(config)
    key = torch.arange(len(x))
    for s in (c_noise_s, c_noise, torch.full_like(c_noise, -1.5)):
        assert torch.equal(net(x, c_noise, s, cond, key), twin(x, c_noise, cond=cond, key=key))


@BOTH
def test_random_start_reads_s_at_once(config):
    twin, net = randomised(config.build()), replace(config, second_time="random").build().double()
    net.load_state_dict(net.state_dict() | twin.state_dict())
    x, c_noise, c_noise_s, cond = inputs(config)
    first, second = net.eval()(x, c_noise, c_noise_s, cond), net(x, c_noise, c_noise_s + 0.5, cond)
    assert (first - second).abs().amax(tuple(range(1, x.ndim))).min() > 1e-6


@BOTH
def test_a_zero_start_learns_s_from_the_first_step(config):
    twin, net = randomised(config.build()), replace(config, second_time="zero").build().double()
    net.load_state_dict(net.state_dict() | twin.state_dict())
    x, c_noise, c_noise_s, cond = inputs(config)
    net(x, c_noise, c_noise_s, cond).square().sum().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if "affine_s" in name or "map_noise_s" in name}
    assert len(grads) >= 2 and all(g.abs().max() > 0 for g in grads.values())


@BOTH
def test_slope_in_s_is_the_gradients(config):
    net = randomised(replace(config, second_time="random").build()).eval()
    x, c_noise, c_noise_s, cond = inputs(config)
    assert torch.autograd.gradcheck(
        lambda t, s: net(x, t, s, cond).square().flatten(1).sum(1),
        (c_noise.requires_grad_(), c_noise_s.requires_grad_()),
    )


def test_label_reaches_both_embeddings():
    net = lively(replace(DIGITS, second_time="random")).eval()
    x, c_noise, c_noise_s, cond = inputs(DIGITS)
    labels = torch.nn.functional.one_hot(cond, 10).double()
    for embed, time in ((net.embed, c_noise), (net.embed_s, c_noise_s)):
        assert (embed(time, labels) - embed(time, 0 * labels)).abs().max() > 1e-2
    assert not torch.allclose(net.embed(c_noise, labels), net.embed_s(c_noise, labels))


@BOTH
@pytest.mark.parametrize("second_time", ["off", "zero"])
def test_last_weight_is_the_last_layers(config, second_time):
    """F is linear in it, and it is the last weight that F meets: halving it and the bias halves F."""
    net = randomised(replace(config, second_time=second_time).build()).eval()
    x, c_noise, c_noise_s, cond = inputs(config)
    s = None if second_time == "off" else c_noise_s
    before, names = net(x, c_noise, s, cond), {id(p): name for name, p in net.named_parameters()}
    bias = net.get_parameter(names[id(net.last_weight)].removesuffix("weight") + "bias")
    with torch.no_grad():
        net.last_weight.mul_(0.5)
        bias.mul_(0.5)
    assert torch.allclose(net(x, c_noise, s, cond), before / 2, rtol=1e-12)


@BOTH
def test_compiled_network_is_one_graph_and_equals_eager(config, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    net, (x, c_noise, c_noise_s, cond) = randomised(replace(config, second_time="random").build()), inputs(config)
    compiled, key = torch.compile(net, backend="aot_eager", fullgraph=True), torch.arange(3)
    assert relative_error(compiled(x, c_noise, c_noise_s, cond, key), net(x, c_noise, c_noise_s, cond, key)) < 1e-12


@BOTH
def test_a_missing_or_an_unread_second_time_is_refused(config):
    x, c_noise, c_noise_s, cond = inputs(config)
    with pytest.raises(UserError, match='^c_noise_s: .*second_time="zero".*second_time=True[^\n]*$'):
        replace(config, second_time="zero").build()(x, c_noise, None, cond)
    with pytest.raises(UserError, match="^c_noise_s: .* embeds one time only[^\n]*$"):
        config.build()(x, c_noise, c_noise_s, cond)
    check_second_time(None, "off", "net")
    check_second_time(c_noise_s, "random", "net")
