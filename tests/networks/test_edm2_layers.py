"""EDM2's layers against its numbers, and what they promise: magnitudes are kept."""

import math

import pytest
import torch
from edm2_setup import with_golden_weights
from network_setup import golden, relative_error
from torch import nn

from onejump.networks.edm2_unet import Block
from onejump.networks.layers import Dropout
from onejump.networks.magnitude import MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize, normalize_weights

Z = golden("edm2_layers.npz")
BOTH = pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
CONVS = pytest.mark.parametrize("name, kernel", [("conv3", 3), ("conv1", 1), ("linear", 0)])


def given(name, dtype=torch.float64):
    return Z[f"in/{name}"].to(dtype)


def conv(name, kernel, dtype=torch.float64):
    layer = MPConv(8, 6, kernel).to(dtype)
    layer.load_state_dict({"weight": Z[f"in/MPConv_{name}_w"]})
    x = given("x", dtype)
    return layer, x if kernel else x[:, :, 0, 0]


@BOTH
def test_operations_equal_edm2s(dtype, tolerance):
    x, y, z = (given(name, dtype) for name in "xyz")
    fourier = MPFourier(16).to(dtype)
    fourier.load_state_dict({"freqs": given("fourier_freqs"), "phases": given("fourier_phases")})
    found = {
        "normalize_all": normalize(x),
        "normalize_dim1": normalize(x, dim=1),
        "mp_silu": mp_silu(x),
        "mp_sum_t0.3": mp_sum(x, y, 0.3),
        "mp_sum_t0.5": mp_sum(x, y, 0.5),
        "mp_cat_t0.3": mp_cat(x, z, 0.3),
        "mp_cat_t0.5": mp_cat(x, z),
        "MPFourier": fourier(given("fourier_t", dtype)),
    }
    for name, value in found.items():
        assert relative_error(value, Z[f"f{torch.finfo(dtype).bits}/{name}"]) < tolerance, name


@CONVS
@BOTH
def test_convolutions_equal_edm2s(name, kernel, dtype, tolerance):
    layer, x = conv(name, kernel, dtype)
    assert relative_error(layer(x, 0.7), Z[f"f{torch.finfo(dtype).bits}/MPConv_{name}_eval_gain0.7"]) < tolerance


@CONVS
def test_forced_normalisation_and_its_gradient_equal_edm2s(name, kernel):
    """EDM2 normalises within a forward in train mode, of which there were two; here it is a step of its own."""
    layer, x = conv(name, kernel)
    normalize_weights(layer)
    normalize_weights(layer)
    forced = layer.weight.detach().clone()
    assert relative_error(forced, Z[f"f32/MPConv_{name}_weight_after_train_fwd"]) < 1e-6
    out = layer(x)
    assert relative_error(out, Z[f"f32/MPConv_{name}_train_out"]) < 1e-6
    (out * Z[f"in/MPConv_{name}_proj"]).sum().backward()
    assert relative_error(layer.weight.grad, Z[f"f32/MPConv_{name}_grad_w"]) < 1e-5
    assert torch.equal(layer.weight, forced)


@pytest.mark.parametrize(
    "name, c_in, c_out, options",
    [
        ("dec_keep_attn", 96, 64, {"head": 64}),
        ("enc_down", 32, 32, {"resample": "down", "encoder": True}),
        ("enc_keep_attn", 64, 128, {"head": 64, "encoder": True}),
    ],
)
def test_blocks_equal_edm2s(name, c_in, c_out, options):
    block = with_golden_weights(Block(c_in, c_out, 24, Dropout(0.0, 0), **options))
    x, emb = Z[f"block/{name}/in/x"], Z[f"block/{name}/in/emb"]
    assert relative_error(block(x, emb, None), Z[f"block/{name}/out/f32"]) < 1e-5
    assert relative_error(block.double()(x.double(), emb.double(), None), Z[f"block/{name}/out/f64"]) < 1e-12


def test_resampling_equals_edm2s():
    """What the residual branch adds is proportional to its last gain; without it a decoder's block only resamples."""
    for resample in ("down", "up"):
        block = Block(8, 8, 4, Dropout(0.0, 0), resample=resample).double()
        nn.init.zeros_(block.conv_res1.weight)
        out = block(given("x"), torch.zeros(3, 4).double(), None)
        assert relative_error(out * math.hypot(0.7, 0.3) / 0.7, Z[f"f64/resample_{resample}_11"]) < 1e-12


def test_magnitudes_are_kept():
    """Of independent standard normal inputs, all outputs have mean square one: that is what each constant is for."""
    torch.manual_seed(0)
    a, b = torch.randn(50, 400, 8, 8), torch.randn(50, 100, 8, 8)
    found = {
        "silu": mp_silu(a),
        "sum": mp_sum(a[:, :100], b, 0.3),
        "cat": mp_cat(a, b),
        "conv": MPConv(100, 50, 3)(b)[..., 2:-2, 2:-2],  # zeros are padded
        "linear": MPConv(400, 300)(a[:, :, 0, 0]),
        "fourier": MPFourier(2000)(torch.randn(50)),
        "normalised": normalize(7 * a, dim=1),
    }
    for name, value in found.items():
        assert value.square().mean().item() == pytest.approx(1, abs=0.02), name


def test_both_parts_of_mp_cat_weigh_the_same():
    a, b = torch.randn(20, 300, 8, 8), torch.randn(20, 100, 8, 8)
    both = mp_cat(a, b).square().sum((0, 2, 3))
    assert (both[:300].sum() / both[300:].sum()).item() == pytest.approx(1, abs=0.05)


def test_the_size_of_weights_does_not_matter():
    """Only their direction does, so the gradient stands at right angles to them."""
    layer, x = conv("conv3", 3)
    normalize_weights(layer)
    out = layer(x)
    (out * given("MPConv_conv3_proj")).sum().backward()
    w, grad = layer.weight.detach(), layer.weight.grad
    angles = (w * grad).flatten(1).sum(1) / (w.flatten(1).norm(dim=1) * grad.flatten(1).norm(dim=1))
    assert angles.abs().max() < 2e-4  # of the 1e-4 that is added to the magnitude
    with torch.no_grad():
        layer.weight *= torch.linspace(2, 50, 6).double()[:, None, None, None]
    assert relative_error(layer(x), out) < 2e-4


def test_normalisation_is_float32_in_half_precision():
    x = torch.full((2, 65, 3, 3), 200.0, dtype=torch.float16)  # whose squares are infinite
    assert torch.allclose(normalize(x, dim=1), torch.ones_like(x), rtol=1e-3)


def test_normalize_weights_is_for_mpconv_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), MPConv(4, 5, 3), nn.Linear(5, 5), nn.ModuleDict({"in": MPConv(5, 6)}))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    normalize_weights(net)
    for name, p in net.named_parameters():
        ours = name in ("1.weight", "3.in.weight")
        rms = p.flatten(1).square().mean(1).sqrt() if p.ndim > 1 else None
        assert torch.equal(p, before[name]) is not ours
        assert not ours or (rms - 1).abs().max() < 5e-4
