import math

import jaxtyping
import numpy as np
import pytest
import torch
from network_setup import DIGITS, GOLDEN, batch, golden, lively, relative_error, with_recipe_weights

from onejump.networks import SongUNetConfig
from onejump.networks.unet_parts import group_norm
from onejump.types import UserError

GOLDEN_CONFIG = {"img_resolution": 16, "model_channels": 16, "channel_mult": (2, 2), "num_blocks": 2, "dropout": 0.0}


def test_output_equals_edms():
    z = golden("songunet_uncond.npz")
    net = with_recipe_weights(SongUNetConfig(attn_resolutions=(8,), **GOLDEN_CONFIG).build())
    assert relative_error(net(z["in/x"], z["in/c_noise"]), z["out/net_f32"]) < 1e-5
    net, x, c_noise = net.double(), z["in/x"].double(), z["in/c_noise"].double()
    assert relative_error(net(x, c_noise), z["out/net_f64"]) < 1e-10


def test_gradients_equal_edms():
    """In float64, so that the float32 rounding of the golden numbers is the only error."""
    z = golden("songunet_uncond.npz")
    net = with_recipe_weights(SongUNetConfig(attn_resolutions=(8,), **GOLDEN_CONFIG).build()).double()
    x = z["in/x"].double().requires_grad_()
    (net(x, z["in/c_noise"].double()) * z["in/proj"]).sum().backward()
    grad = {name: p.grad for name, p in net.named_parameters()} | {"x": x.grad}
    for name in (k.removeprefix("grad/") for k in z if k.startswith("grad/") and k != "grad/_all_norm"):
        assert relative_error(grad[name], z["grad/" + name]) < 1e-5, name
    norms = torch.stack([p.grad.norm() for p in net.parameters()])
    assert ((norms - z["grad/_all_norm"]) / norms).abs().max() < 1e-5


def test_state_dict_of_the_cifar10_network_is_edms():
    with torch.device("meta"):
        net = SongUNetConfig().build()
    z = np.load(GOLDEN / "songunet_cifar10_keys.npz")
    ours = {name: "x".join(map(str, v.shape)) for name, v in net.state_dict().items()}
    assert ours == dict(zip(z["names"].tolist(), z["shapes"].tolist(), strict=True))
    assert sum(p.numel() for p in net.parameters()) == 55_732_739


@pytest.mark.parametrize("channels, groups", [(16, 4), (48, 12), (128, 32), (256, 32), (144, 24)])
def test_norm_has_edms_groups_where_they_divide_the_channels(channels, groups):
    assert group_norm(channels, 1e-6).num_groups == groups


@pytest.mark.parametrize("variant", ["ddpmpp", "ncsnpp"])
def test_initial_weights_are_xavier_uniform_with_edms_gains(variant):
    net = SongUNetConfig(8, 1, 10, 64, (2, 2), 1, (8, 4), variant=variant, augment_dim=9).build()
    gains = {"conv1": 1e-5, "proj": 1e-5, "dec.8x8_aux_conv": 1e-5, "qkv": 0.2**0.5}
    for name, p in net.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if leaf == "bias":
            assert torch.all(p == 0), name
        elif p.ndim >= 2:
            gain = next((g for end, g in gains.items() if layer.endswith(end)), 1.0)
            bound = gain * math.sqrt(6 / (p[0].numel() + p[:, 0].numel()))
            assert 0.98 * bound < p.abs().max() <= bound, name
            assert abs(p.std() / (bound / math.sqrt(3)) - 1) < 0.1, name


def test_gradient_with_dropout_is_the_slope_of_the_loss():
    net, (x, c_noise, cond) = lively(), batch(3)
    proj, key = torch.randn_like(x), torch.arange(3)
    step = [torch.randn_like(p) for p in net.parameters()]

    def loss_at(h):
        moved = {name: p + h * d for (name, p), d in zip(net.named_parameters(), step, strict=True)}
        return (torch.func.functional_call(net, moved, (x, c_noise), {"cond": cond, "key": key}) * proj).sum()

    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss_at(0.0), net.parameters()), step, strict=True))
    measured = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    assert abs(measured / slope - 1) < 1e-5


def test_two_networks_of_one_config_share_masks_also_when_rows_are_split():
    student, target = lively(), DIGITS.build().double()
    target.load_state_dict(student.state_dict())
    (x, c_noise, cond), key = batch(6), torch.randint(2**63 - 1, (6,))
    whole = student(x, c_noise, cond=cond, key=key)
    for rows in (torch.tensor([4, 1]), torch.tensor([0, 2, 3, 5]), torch.tensor([], dtype=torch.int64)):
        part = target(x[rows], c_noise[rows], cond=cond[rows], key=key[rows])
        assert torch.allclose(part, whole[rows], rtol=1e-12, atol=1e-12)
    assert (student(x, c_noise, cond=cond, key=key + 1) - whole).abs().amax((1, 2, 3)).min() > 1e-3


def test_dropout_layers_have_distinct_numbers():
    numbers = [m.layer for m in SongUNetConfig().build().modules() if m.__class__.__name__ == "Dropout"]
    assert numbers == list(range(12 + 2 + 2 + 15 + 2))


def test_dropout_acts_in_train_mode_only():
    net, (x, c_noise, cond) = lively(), batch(2)
    net.eval()
    assert torch.equal(net(x, c_noise, cond=cond, key=torch.arange(2)), net(x, c_noise, cond=cond))
    net.train()
    assert not torch.equal(net(x, c_noise, cond=cond), net(x, c_noise, cond=cond))


def test_classes_equal_their_one_hot_vectors_and_none_equals_zeros():
    net, (x, c_noise, cond) = lively().eval(), batch(4)
    by_class = net(x, c_noise, cond=cond)
    assert torch.equal(by_class, net(x, c_noise, cond=torch.nn.functional.one_hot(cond, 10).double()))
    assert torch.equal(net(x, c_noise), net(x, c_noise, cond=torch.zeros(4, 10)))
    assert not torch.allclose(by_class, net(x, c_noise))


def test_compiled_network_is_one_graph_and_equals_eager(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    net, (x, c_noise, cond), key = lively(), batch(2), torch.arange(2)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x, c_noise, cond=cond, key=key), net(x, c_noise, cond=cond, key=key)) < 1e-12


@pytest.mark.parametrize(
    "change, message",
    [
        ({"img_resolution": 30}, "img_resolution=30.*multiple of 4"),
        ({"attn_resolutions": (7,)}, "attn_resolutions"),
        ({"model_channels": 30}, "model_channels=30"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_impossible_configuration_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        SongUNetConfig(**change).build()


def test_arguments_that_do_not_fit_are_refused():
    net, (x, c_noise, cond) = lively(), batch(2)
    with pytest.raises(UserError, match="c_noise_s"):
        net(x, c_noise, c_noise, cond)
    with pytest.raises(UserError, match="img_resolution=8"):
        net(x[..., :4], c_noise)
    with pytest.raises(UserError, match="label_dim=0"):
        lively(SongUNetConfig(8, 1, 0, 32, (1, 2), 1, (4,)))(x, c_noise, cond=cond)
