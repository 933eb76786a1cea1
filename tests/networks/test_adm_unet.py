import math
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch
from network_setup import GOLDEN, batch, golden, lively, recipe, relative_error
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from onejump.networks import ADMUNetConfig
from onejump.networks.adm_unet import Block, attention_heads
from onejump.networks.layers import Dropout
from onejump.networks.unet_parts import group_norm
from onejump.types import UserError

TINY = ADMUNetConfig(8, 1, 10, 32, (1, 2), 1, (4,), dropout=0.3)
GOLDEN_CONFIG = ADMUNetConfig(16, 3, 10, 32, (1, 2), 1, (8,), dropout=0.0)
CTM = replace(TINY, second_time="random")


def with_golden_weights(net, prefix=""):
    """The golden networks' embedding has half our width: the other half is zero, and stays zero through each silu."""
    for name, p in net.named_parameters():
        shape = list(p.shape)
        if name.startswith("map_"):
            shape[0] = 64
        if p.ndim == 2 and ("map_layer1" in name or ".affine" in name):
            shape[1] = 64
        nn.init.zeros_(p).data[tuple(map(slice, shape))] = recipe(prefix + name, shape)
    return net


def randomised(config):
    """Every parameter a random number: no layer is zero."""
    torch.manual_seed(0)
    net = config.build().double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net


def with_weights_of(net, twin):
    net.double().load_state_dict(net.state_dict() | twin.state_dict())
    return net


def test_output_equals_edms():
    z = golden("adm.npz")
    net = with_golden_weights(GOLDEN_CONFIG.build())
    x, c_noise, labels = z["in/x"], z["in/c_noise"], z["in/labels"]
    assert relative_error(net(x, c_noise, cond=labels), z["out/net_f32"]) < 1e-5
    out = net.double()(x.double(), c_noise.double(), cond=labels.double())
    assert relative_error(out, z["out/net_f64"]) < 1e-12


def test_gradients_equal_edms():
    """In float64, so that the float32 rounding of the golden numbers is the only error."""
    z = golden("adm.npz")
    net, x = with_golden_weights(GOLDEN_CONFIG.build()).double(), z["in/x"].double().requires_grad_()
    (net(x, z["in/c_noise"].double(), cond=z["in/labels"]) * z["in/proj"]).sum().backward()
    assert relative_error(x.grad, z["grad/x"]) < 1e-5
    norms = torch.stack([p.grad.norm() for p in net.parameters()])
    assert ((norms - z["grad/_all_norm"]) / norms).abs().max() < 1e-5


def test_output_with_a_second_time_equals_ctms():
    """CTM's rescaled times are 250 ln t; our c_noise is ln(t) / 4, a thousandth of them."""
    z = golden("adm_ctm.npz")
    net = with_golden_weights(replace(GOLDEN_CONFIG, second_time="random").build(), "model.")
    x, cond = z["in/x"], torch.as_tensor(z["in/y"])
    assert relative_error(net(x, z["in/t"].log() / 4, z["in/s"].log() / 4, cond), z["out/F_t_s"]) < 1e-5
    c_noise, c_noise_s = z["in/rescaled_t"].double() / 1000, z["in/rescaled_s"].double() / 1000
    assert relative_error(net.double()(x.double(), c_noise, c_noise_s, cond), z["out/F_t_s_f64"]) < 1e-12


def test_state_dict_of_the_imagenet_network_is_edms():
    with torch.device("meta"):
        net = ADMUNetConfig(label_dim=1000).build()
    z = np.load(GOLDEN / "adm_imagenet64_keys.npz")
    ours = [(name, "x".join(map(str, v.shape))) for name, v in net.state_dict().items()]
    assert ours == list(zip(z["names"].tolist(), z["shapes"].tolist(), strict=True))
    assert sum(p.numel() for p in net.parameters()) == 295_899_267


@pytest.mark.parametrize(
    "change, count",
    [
        ({"second_time": "random"}, 324_100_611),  # CTM
        ({"scale_shift": False}, 282_168_003),  # iCT
        ({"scale_shift": False, "num_blocks": 6}, 472_767_555),  # iCT-deep
    ],
)
def test_variants_have_their_papers_sizes(change, count):
    with torch.device("meta"):
        net = ADMUNetConfig(label_dim=1000, **change).build()
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize(
    "channels, groups, heads",
    [(16, 4, 1), (32, 8, 1), (96, 24, 1), (144, 24, 2), (192, 32, 3), (200, 25, 2), (384, 32, 6), (768, 32, 12)],
)
def test_norms_and_heads_are_edms_where_they_divide_the_channels(channels, groups, heads):
    assert group_norm(channels, 1e-5).num_groups == groups and attention_heads(channels, 64) == heads


def test_each_head_attends_with_its_own_rows_of_qkv():
    """Row 3 (64 h + c) + j of qkv is channel c of head h, of its queries (j = 0), keys (1) or values (2)."""
    net = randomised(ADMUNetConfig(4, 1, 0, 192, (1,), 1, (4,)))
    block, x = net.enc["4x4_block0"], torch.randn(2, 192, 4, 4).double()
    rows, heads = block.qkv(block.norm2(x)).flatten(2), []
    for h in range(3):
        q, k, v = (rows[:, 3 * 64 * h + j : 3 * 64 * (h + 1) : 3] for j in range(3))  # [b, 64, pixel]
        weight = (torch.einsum("bci,bcj->bij", q, k) / 8).softmax(2)
        heads.append(torch.einsum("bij,bcj->bci", weight, v))
    expected = block.proj(torch.cat(heads, 1).view(x.shape))
    assert relative_error(block.attend(x), expected) < 1e-12


def test_attention_is_where_asked_and_at_the_bottom():
    net = ADMUNetConfig(16, 1, 0, 16, (1, 2, 2), 2, (8,)).build()
    assert [name for name, m in net.named_modules() if isinstance(m, Block) and m.heads] == [
        *("enc.8x8_block0", "enc.8x8_block1"),
        *("dec.4x4_in0", "dec.8x8_block0", "dec.8x8_block1", "dec.8x8_block2"),
    ]


def test_without_scale_and_shift_the_embedding_is_added_before_the_norm():
    """There a bias of `affine` is a bias of `conv0`; with them it is not."""
    for scale_shift in (False, True):
        net, (x, c_noise, cond) = randomised(replace(TINY, scale_shift=scale_shift)).eval(), batch(2)
        before = net(x, c_noise, cond=cond)
        for name, block in net.named_modules():
            if name.endswith(("_up", "block0")):
                n = len(block.conv0.bias)
                block.conv0.bias.data += block.affine.bias.data[-n:]
                block.affine.bias.data[-n:] = 0
        assert torch.allclose(net(x, c_noise, cond=cond), before, rtol=1e-10) is not scale_shift


def test_initial_weights_are_edms():
    """Uniform on +-1/sqrt(fan_in), biases too; zero where a branch ends; standard normal for labels."""
    for second_time in ("random", "zero"):
        net, checked = ADMUNetConfig(8, 1, 50, 64, (1, 2), 1, (4,), second_time=second_time).build(), 0
        ends = ("conv1", "proj", "out_conv", *(("affine_s",) if second_time == "zero" else ()))
        for name, layer in net.named_modules():
            if name == "map_label":
                assert layer.bias is None and abs(layer.weight.std() - 1) < 0.03
            elif isinstance(layer, nn.Linear | nn.Conv2d):
                bound, checked = 0.0 if name.endswith(ends) else layer.weight[0].numel() ** -0.5, checked + 1
                assert 0.98 * bound <= layer.weight.abs().max() <= bound, name
                assert 0.5 * bound <= layer.bias.abs().max() <= bound, name
                assert abs(layer.weight.std() - bound / math.sqrt(3)) <= 0.1 * bound, name
        assert checked > 40


def test_gradient_with_dropout_is_the_slope_of_the_loss():
    net, (x, c_noise, cond) = lively(CTM), batch(3)
    proj, key, c_noise_s = torch.randn_like(x), torch.arange(3), c_noise - 0.3
    step = [torch.randn_like(p) for p in net.parameters()]

    def loss_at(h):
        moved = {name: p + h * d for (name, p), d in zip(net.named_parameters(), step, strict=True)}
        return (torch.func.functional_call(net, moved, (x, c_noise, c_noise_s, cond, key)) * proj).sum()

    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss_at(0.0), net.parameters()), step, strict=True))
    measured = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    assert abs(measured / slope - 1) < 1e-5


def test_forward_mode_slope_in_images_and_times_is_the_measured_one():
    net, (x, c_noise, cond) = randomised(CTM), batch(3)
    key, at = torch.arange(3), (x, c_noise, c_noise - 0.3)
    tangent = tuple(torch.randn_like(v) for v in at)

    def f(x, c_noise, c_noise_s):
        return net(x, c_noise, c_noise_s, cond, key)

    with sdpa_kernel(SDPBackend.MATH):
        out, slope = torch.func.jvp(f, at, tangent)
    plus, minus = (f(*(v + h * d for v, d in zip(at, tangent, strict=True))) for h in (1e-6, -1e-6))
    assert relative_error(out, f(*at)) < 1e-12
    assert relative_error((plus - minus) / 2e-6, slope) < 1e-6


def test_dropout_acts_up_to_its_resolution_only():
    def layers(config):
        return {name: m for name, m in config.build().named_modules() if isinstance(m, Dropout)}

    everywhere, low = layers(TINY), layers(replace(TINY, dropout_resolution=4))
    assert {m.p for m in everywhere.values()} == {0.3}
    assert {name: m.p for name, m in low.items()} == {name: 0.3 * (".4x4_" in name) for name in everywhere}
    assert [m.layer for m in low.values()] == [m.layer for m in everywhere.values()] == list(range(3 + 2 + 2 + 3))
    full = layers(replace(TINY, dropout_resolution=8))
    assert {name: m.p for name, m in full.items()} == {name: m.p for name, m in everywhere.items()}


def test_two_networks_of_one_config_share_masks_also_when_rows_are_split():
    student = lively(TINY)
    target = with_weights_of(TINY.build(), student)
    (x, c_noise, cond), key = batch(6), torch.randint(2**63 - 1, (6,))
    whole = student(x, c_noise, cond=cond, key=key)
    for rows in (torch.tensor([4, 1]), torch.tensor([0, 2, 3, 5]), torch.tensor([], dtype=torch.int64)):
        part = target(x[rows], c_noise[rows], cond=cond[rows], key=key[rows])
        assert torch.allclose(part, whole[rows], rtol=1e-12, atol=1e-12)
    assert (student(x, c_noise, cond=cond, key=key + 1) - whole).abs().amax((1, 2, 3)).min() > 1e-3
    assert torch.equal(student.eval()(x, c_noise, cond=cond, key=key), student(x, c_noise, cond=cond))


def test_classes_equal_their_one_hot_vectors_and_none_equals_zeros():
    net, (x, c_noise, cond) = lively(TINY).eval(), batch(4)
    by_class = net(x, c_noise, cond=cond)
    assert torch.equal(by_class, net(x, c_noise, cond=nn.functional.one_hot(cond, 10).double()))
    assert torch.equal(net(x, c_noise), net(x, c_noise, cond=torch.zeros(4, 10)))
    assert (by_class - net(x, c_noise)).abs().amax((1, 2, 3)).min() > 1e-3


def test_zero_start_is_the_one_time_twin_for_any_s_and_learns_s_from_the_first_step():
    twin = randomised(TINY)
    net, (x, c_noise, cond) = with_weights_of(replace(TINY, second_time="zero").build(), twin), batch(3)
    key = torch.arange(3)
    for c_noise_s in (c_noise, c_noise - 1, torch.full_like(c_noise, -1.5)):
        assert torch.equal(net(x, c_noise, c_noise_s, cond, key), twin(x, c_noise, cond=cond, key=key))
    net(x, c_noise, c_noise_s, cond).square().sum().backward()
    grads = [p.grad for name, p in net.named_parameters() if "affine_s" in name]
    assert len(grads) == 2 * 10 and all(g.abs().max() > 0 for g in grads)


def test_random_start_reads_s_at_once():
    net, (x, c_noise, cond) = with_weights_of(CTM.build(), randomised(TINY)).eval(), batch(3)
    difference = net(x, c_noise, c_noise, cond) - net(x, c_noise, c_noise - 0.5, cond)
    assert difference.abs().amax((1, 2, 3)).min() > 1e-6


def test_last_weight_is_the_last_layers():
    """F is linear in it, and it is the last weight that F meets: halving it and the bias halves F."""
    net, (x, c_noise, cond) = randomised(TINY).eval(), batch(2)
    before = net(x, c_noise, cond=cond)
    with torch.no_grad():
        net.last_weight.mul_(0.5)
        net.out_conv.bias.mul_(0.5)
    assert torch.allclose(net(x, c_noise, cond=cond), before / 2, rtol=1e-12)


def test_compiled_network_is_one_graph_and_equals_eager(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    net, (x, c_noise, cond), key = lively(CTM), batch(2), torch.arange(2)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    args = (x, c_noise, c_noise - 0.3, cond, key)
    assert relative_error(compiled(*args), net(*args)) < 1e-12


@pytest.mark.parametrize(
    "change, message",
    [
        ({"img_resolution": 60}, "img_resolution=60.*multiple of 8"),
        ({"attn_resolutions": (7,)}, "attn_resolutions"),
        ({"dropout_resolution": 7}, "dropout_resolution=7.*pick 0"),
        ({"model_channels": 30}, "model_channels=30"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_impossible_configuration_is_refused(change, message):
    with torch.device("meta"), pytest.raises(UserError, match=f"^{message}[^\n]*$"):
        ADMUNetConfig(**change).build()


def test_arguments_that_do_not_fit_are_refused():
    net, (x, c_noise, cond) = lively(TINY), batch(2)
    with pytest.raises(UserError, match="^c_noise_s: ADMUNet embeds one time only"):
        net(x, c_noise, c_noise, cond)
    with pytest.raises(UserError, match="^c_noise_s: ADMUNet .*needs the time s"):
        lively(CTM)(x, c_noise, cond=cond)
    with pytest.raises(UserError, match="img_resolution=8"):
        net(x[..., :4], c_noise)
    with pytest.raises(UserError, match="label_dim=0"):
        lively(replace(TINY, label_dim=0))(x, c_noise, cond=cond)
