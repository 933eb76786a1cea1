import math
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch
from edm2_setup import GOLDEN_CONFIG, TINY, lively, with_golden_weights
from network_setup import GOLDEN, batch, golden, relative_error
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from onejump.model import ConsistencyModel
from onejump.networks import EDM2UNetConfig, normalize_weights
from onejump.networks.edm2_unet import Block
from onejump.networks.layers import Dropout
from onejump.networks.magnitude import MPConv
from onejump.types import UserError

Z = golden("edm2_unet.npz")
BOTH = pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
WHOSE = pytest.mark.parametrize(
    "whose, prefix, norms", [("edm2", "unet.", "after_forced_norm"), ("tcm", "model.", "flag_true")]
)


def published(whose, prefix, dtype):
    """The model with the golden weights, and its arguments."""
    model = ConsistencyModel(with_golden_weights(GOLDEN_CONFIG.build(), prefix).to(dtype))
    return model, [Z[f"{whose}/in/{name}"].to(dtype) for name in ("x_noisy", "sigma", "labels")]


def norms_of(tensors):
    return torch.stack([t.detach().double().norm() for t in tensors])


@BOTH
def test_output_equals_edm2s(dtype, tolerance):
    bits = torch.finfo(dtype).bits
    model, (x, t, cond) = published("edm2", "unet.", dtype)
    F = model.net(Z["edm2/in/x"].to(dtype), Z["edm2/in/c_noise"].to(dtype), cond=cond)
    assert relative_error(F, Z[f"edm2/out/unet_f{bits}"]) < tolerance
    assert relative_error(model(x, t, cond=cond), Z[f"edm2/out/precond_f{bits}"]) < tolerance
    assert relative_error(model(x, t), Z["edm2/out/precond_nolabel_f32"]) < 1e-5
    by_class = model(x, t, cond=cond.argmax(1))
    assert torch.equal(by_class, model(x, t, cond=cond))


@BOTH
def test_output_equals_tcms(dtype, tolerance):
    """Also in train mode: TCM's forward at r, which normalises no weights."""
    model, (x, t, cond) = published("tcm", "model.", dtype)
    assert (
        relative_error(model.eval()(x, t, cond=cond), Z[f"tcm/out/precond_eval_f{torch.finfo(dtype).bits}"]) < tolerance
    )
    before = [p.detach().clone() for p in model.parameters()]
    assert relative_error(model.train()(x, t, cond=cond), Z["tcm/out/precond_train_noinplace_f32"]) < 1e-5
    assert all(map(torch.equal, model.parameters(), before))


@WHOSE
def test_normalised_weights_and_their_output_equal_the_published(whose, prefix, norms):
    model, (x, t, cond) = published(whose, prefix, torch.float64)
    normalize_weights(model)
    after = Z[f"{whose}/train/weight_norms_{norms}"][: len(list(model.parameters()))]
    assert ((norms_of(model.parameters()) - after) / after).abs().max() < 1e-6
    out = Z["edm2/out/train_precond_f32" if whose == "edm2" else "tcm/out/precond_train_inplace_f32"]
    assert relative_error(model(x, t, cond=cond), out) < 1e-6


def test_gradients_equal_edm2s():
    """Of normalised weights, in float64, so that the float32 rounding of the golden numbers is the only error."""
    model, (x, t, cond) = published("edm2", "unet.", torch.float64)
    normalize_weights(model)
    (model(x, t, cond=cond) * Z["edm2/in/proj"]).sum().backward()
    golden_norms = Z["edm2/train/grad_norms"][:-1]  # the last is of a layer for the loss alone
    assert ((norms_of(p.grad for p in model.parameters()) - golden_norms) / golden_norms).abs().max() < 1e-5
    assert model.net.out_gain.grad.item() == pytest.approx(Z["edm2/train/grad_out_gain"].item(), rel=1e-5)


def test_passes_leave_the_weights_bit_identical():
    """Train mode with dropout, forwards and backwards, at several noise levels."""
    net, (x, c_noise, cond) = lively().train(), batch(3, TINY)
    before = {name: v.clone() for name, v in net.state_dict().items()}
    for shift in (0.0, 0.5):
        net(x, c_noise + shift, cond=cond).square().sum().backward()
    assert all(torch.equal(v, before[name]) for name, v in net.state_dict().items())


def test_outputs_are_the_same_before_and_after_normalisation():
    """Weights that a step has left, up to 40 % too large or small: only directions matter, up to the added 1e-4."""
    net, (x, c_noise, cond) = lively().eval(), batch(3, TINY)
    normalize_weights(net)
    torch.manual_seed(0)
    for p in (p for p in net.parameters() if p.ndim):
        p.data *= 0.6 + 0.8 * torch.rand(len(p), *[1] * (p.ndim - 1)).double()
    before = net(x, c_noise, cond=cond)
    normalize_weights(net)
    assert relative_error(net(x, c_noise, cond=cond), before) < 3e-4
    sizes = torch.cat([p.detach().flatten(1).square().mean(1).sqrt() for p in net.parameters() if p.ndim])
    assert (sizes - 1).abs().max() < 2e-4


def test_state_dict_of_the_imagenet_network_is_tcms():
    with torch.device("meta"):
        net = EDM2UNetConfig().build()
    z = np.load(GOLDEN / "edm2_s_imagenet64_keys.npz")
    ours = [(name, "x".join(map(str, v.shape))) for name, v in net.state_dict().items()]
    assert len(ours) == 200 and ours == list(zip(z["names"].tolist(), z["shapes"].tolist(), strict=True))


CIFAR = EDM2UNetConfig(32, 3, 0, 128, attn_resolutions=(16,))


@pytest.mark.parametrize(
    "config, count",
    [
        (EDM2UNetConfig(model_channels=128), 124_710_821),  # XS
        (EDM2UNetConfig(), 280_209_253),  # S
        (EDM2UNetConfig(model_channels=256), 497_803_045),  # M
        (EDM2UNetConfig(model_channels=320), 777_492_197),  # L
        (EDM2UNetConfig(model_channels=384), 1_119_276_709),  # XL
        (EDM2UNetConfig(model_channels=448), 1_523_156_581),  # XXL
        (replace(CIFAR, channel_mult=(1, 2, 2, 2), num_blocks=3), 48_865_189),  # TCM's cifar-s
        (replace(CIFAR, channel_mult=(2, 2, 2), num_blocks=4), 54_607_650),  # and cifar-m
    ],
)
def test_sizes_are_the_published_ones(config, count):
    with torch.device("meta"):
        net = config.build()
    assert sum(p.numel() for p in net.parameters()) == count


def test_a_fresh_network_is_zero_and_learns_its_gain_first():
    net, (x, c_noise, cond) = TINY.build(), batch(3, TINY, torch.float32)
    out = net(x, c_noise, cond=cond)
    assert out.abs().max() == 0
    (out - x).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad.abs().max() > 0] == ["out_gain"]
    nn.init.ones_(net.out_gain)
    assert 0.5 < net.eval()(x, c_noise, cond=cond).std() < 2
    weights = torch.cat([m.weight.flatten() for m in net.modules() if isinstance(m, MPConv)])
    assert abs(weights.std() - 1) < 0.01 and abs(weights.mean()) < 0.03
    assert all(p.item() == 0 for name, p in net.named_parameters() if name.endswith("emb_gain"))


def test_fourier_features_are_drawn_anew_for_each_network():
    a, b = (EDM2UNetConfig(model_channels=128, num_blocks=0, channel_mult=(1, 1, 1, 1)).build() for _ in range(2))
    assert not torch.equal(a.emb_fourier.freqs, b.emb_fourier.freqs)
    assert 0.8 < a.emb_fourier.freqs.std() / (2 * math.pi) < 1.2
    assert 0 <= a.emb_fourier.phases.min() and 6 < a.emb_fourier.phases.max() <= 2 * math.pi
    assert "emb_fourier.freqs" not in dict(a.named_parameters())


def test_attention_is_where_asked_and_at_the_bottom():
    net = EDM2UNetConfig(16, 1, 0, 16, (1, 2, 2), 2, (8,), channels_per_head=16).build()
    assert {name: m.head for name, m in net.named_modules() if isinstance(m, Block) and m.head} == dict.fromkeys(
        [
            *("enc.8x8_block0", "enc.8x8_block1"),
            *("dec.4x4_in0", "dec.8x8_block0", "dec.8x8_block1", "dec.8x8_block2"),
        ],
        16,
    )


def test_maps_are_clipped_where_they_leave_a_block():
    """Skip paths add up over a deep decoder; half precision ends at 65,504."""
    block = Block(8, 8, 4, Dropout(0.0, 0))
    x = torch.linspace(-1000, 1000, 2 * 8 * 4 * 4).view(2, 8, 4, 4)
    assert block(x, torch.zeros(2, 4), None).abs().max() == 256


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_stays_near_float32(dtype, tolerance):
    net, (x, c_noise, cond) = lively(dtype=torch.float32).eval(), batch(3, TINY, torch.float32)
    with torch.autocast("cpu", dtype):
        out = net(100 * x, c_noise, cond=cond)
    assert out.dtype == dtype and relative_error(out.float(), net(100 * x, c_noise, cond=cond)) < tolerance
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    in_half = lively(dtype=dtype).eval()(100 * x.to(dtype), c_noise, cond=cond)  # weights in half precision too
    assert in_half.dtype == dtype and relative_error(in_half.float(), net(100 * x, c_noise, cond=cond)) < 2 * tolerance


def test_gradient_with_dropout_is_the_slope_of_the_loss():
    net, (x, c_noise, cond) = lively().train(), batch(3, TINY)
    proj, key = torch.randn_like(x), torch.arange(3)
    step = [torch.randn_like(p) for p in net.parameters()]

    def loss_at(h):
        moved = {name: p + h * d for (name, p), d in zip(net.named_parameters(), step, strict=True)}
        return (torch.func.functional_call(net, moved, (x, c_noise, None, cond, key)) * proj).sum()

    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss_at(0.0), net.parameters()), step, strict=True))
    measured = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    assert abs(measured / slope - 1) < 1e-5


def test_forward_mode_slope_in_images_and_times_is_the_measured_one():
    net, (x, c_noise, cond) = lively().train(), batch(3, TINY)
    key, tangent = torch.arange(3), (torch.randn_like(x), torch.randn_like(c_noise))

    def f(x, c_noise):
        return net(x, c_noise, None, cond, key)

    with sdpa_kernel(SDPBackend.MATH):
        out, slope = torch.func.jvp(f, (x, c_noise), tangent)
    plus, minus = (f(x + h * tangent[0], c_noise + h * tangent[1]) for h in (1e-6, -1e-6))
    assert relative_error(out, f(x, c_noise)) < 1e-12
    assert relative_error((plus - minus) / 2e-6, slope) < 1e-6


def test_dropout_acts_up_to_its_resolution_only():
    """By the maps that leave a block: the first below the limit has it."""

    def layers(config):
        return {name: m for name, m in config.build().named_modules() if isinstance(m, Dropout)}

    everywhere, low = layers(TINY), layers(replace(TINY, dropout_resolution=4))
    assert {m.p for m in everywhere.values()} == {0.3}
    assert {name: m.p for name, m in low.items()} == {name: 0.3 * (".4x4_" in name) for name in everywhere}
    assert [m.layer for m in low.values()] == [m.layer for m in everywhere.values()] == list(range(3 + 2 + 2 + 3))
    assert {m.p for m in layers(replace(TINY, dropout_resolution=16)).values()} == {0.3}


def test_two_networks_of_one_config_share_masks_also_when_rows_are_split():
    student, target = lively().train(), lively().train()
    (x, c_noise, cond), key = batch(6, TINY), torch.randint(2**63 - 1, (6,))
    whole = student(x, c_noise, cond=cond, key=key)
    for rows in (torch.tensor([4, 1]), torch.tensor([0, 2, 3, 5]), torch.tensor([], dtype=torch.int64)):
        part = target(x[rows], c_noise[rows], cond=cond[rows], key=key[rows])
        assert torch.allclose(part, whole[rows], rtol=1e-12, atol=1e-12)
    assert (student(x, c_noise, cond=cond, key=key + 1) - whole).abs().amax((1, 2, 3)).min() > 1e-3
    assert torch.equal(student.eval()(x, c_noise, cond=cond, key=key), student(x, c_noise, cond=cond))


def test_last_weight_is_the_last_layers():
    """F turns with it, and nothing else of the network does when it is turned."""
    net, (x, c_noise, cond) = lively().eval(), batch(2, TINY)
    before = net(x, c_noise, cond=cond)
    with torch.no_grad():
        net.last_weight.neg_()
    assert torch.equal(net(x, c_noise, cond=cond), -before)


def test_compiled_network_is_one_graph_and_equals_eager(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    config = replace(TINY, channel_mult=(1,), attn_resolutions=())
    net, (x, c_noise, cond), key = lively(config).train(), batch(2, TINY), torch.arange(2)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    args = (x, c_noise, None, cond, key)
    assert relative_error(compiled(*args), net(*args)) < 1e-12


@pytest.mark.parametrize(
    "change, message",
    [
        ({"img_resolution": 60}, "img_resolution=60.*multiple of 8"),
        ({"attn_resolutions": (7,)}, "attn_resolutions"),
        ({"dropout_resolution": 4}, "dropout_resolution=4.*pick 0"),
        ({"dropout_resolution": 20}, "dropout_resolution=20.*pick 0"),
        ({"channels_per_head": 100}, "channels_per_head=100: levels with attention have 576 and 768 channels"),
        ({"channels_per_head": 0}, "channels_per_head=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"second_time": "zero"}, "second_time=zero: EDM2's U-Net reads one time only"),
    ],
)
def test_impossible_configuration_is_refused(change, message):
    with torch.device("meta"), pytest.raises(UserError, match=f"^{message}[^\n]*$"):
        EDM2UNetConfig(**change).build()


def test_arguments_that_do_not_fit_are_refused():
    net, (x, c_noise, cond) = lively(), batch(2, TINY)
    with pytest.raises(UserError, match="^c_noise_s: EDM2UNet reads one time only"):
        net(x, c_noise, c_noise, cond)
    with pytest.raises(UserError, match="img_resolution=8"):
        net(x[..., :4], c_noise)
    with pytest.raises(UserError, match="^cond: .* does not fit"):
        net(x, c_noise, cond=torch.zeros(2, 3))
    with pytest.raises(UserError, match="label_dim=0"):
        lively(replace(TINY, label_dim=0))(x, c_noise, cond=cond)
