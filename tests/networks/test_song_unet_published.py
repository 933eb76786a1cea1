"""SongUNet is EDM's NCSN++, CTM's, and that of the JAX code of consistency models on CIFAR-10."""

from dataclasses import replace

import jaxtyping
import pytest
import torch
from network_setup import batch, golden, lively, relative_error
from published_names import jax_to_ours
from published_setup import (
    assert_equal_in_both_precisions,
    assert_gradients_equal,
    parameters_of,
    recipe_of_jax,
    shapes_of,
    with_golden_weights,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from onejump.model import ConsistencyModel
from onejump.networks import SongUNetConfig
from onejump.networks.layers import check_choice
from onejump.networks.song_unet import Variant
from onejump.networks.unet_parts import Downsample, double, halve, smoothing
from onejump.precond import CM
from onejump.types import UserError

SMALL = SongUNetConfig(16, 3, 0, 16, (2, 2), 1, (8,), dropout=0.0, variant="ncsnpp")
DIGITS = SongUNetConfig(8, 1, 10, 16, (1, 2), 1, (4,), dropout=0.3, variant="ncsnpp", augment_dim=3)
CIFAR10, NCSNPP = SongUNetConfig(), SongUNetConfig(variant="ncsnpp")


@pytest.mark.parametrize("file, variant", [("songunet_cond.npz", "ddpmpp"), ("songunet_ncsnpp.npz", "ncsnpp")])
def test_output_and_gradients_with_augmentation_labels_equal_edms(file, variant):
    z = golden(file)
    config = replace(SMALL, label_dim=10, augment_dim=9, num_blocks=2, variant=variant)
    net = with_golden_weights(config.build())
    args = (z["in/x"], z["in/c_noise"], None, torch.cat([z["in/labels"], z["in/augment_labels"]], 1))
    assert_equal_in_both_precisions(net, args, z["out/net_f32"], z["out/net_f64"])
    assert_gradients_equal(net, args, z)


def test_output_of_ncsnpp_with_a_second_time_equals_ctms():
    """CTM's rescaled times are 250 ln t; our c_noise is ln(t) / 4, a thousandth of them."""
    z = golden("songunet_ctm_ncsnpp.npz")
    net = with_golden_weights(replace(SMALL, second_time="random").build(), "model.")
    args = (z["in/x"], z["in/rescaled_t"].double() / 1000, z["in/rescaled_s"].double() / 1000)
    assert relative_error(net(z["in/x"], z["in/t"].log() / 4, z["in/s"].log() / 4), z["out/F_t_s"]) < 1e-5
    assert relative_error(net.double()(args[0].double(), *args[1:]), z["out/F_t_s_f64"]) < 1e-10


def nhwc(x):
    return x.permute(0, 3, 1, 2)


def test_network_denoiser_and_consistency_function_equal_those_in_jax():
    """All in float32: the reference has no other precision."""
    z = golden("ncsnpp_jax.npz")
    net = SMALL.build().eval()
    weights = {path: recipe_of_jax(path, shape) for path, shape in shapes_of(z).items()}
    net.load_state_dict(jax_to_ours(weights, SMALL))
    x, t = nhwc(z["in/x_noisy_nhwc"]), z["in/t"]
    assert relative_error(net(nhwc(z["in/x_nhwc"]), z["in/cond_t"]), nhwc(z["out/net_f32"])) < 1e-5
    assert relative_error(ConsistencyModel(net).denoise(x, t), nhwc(z["out/denoiser(EDM scalings)"])) < 1e-5
    assert relative_error(ConsistencyModel(net, jump=CM())(x, t), nhwc(z["out/distiller(CM scalings)"])) < 1e-5


def test_every_parameter_of_the_cifar10_network_in_jax_has_its_place():
    shapes = shapes_of(golden("ncsnpp_jax.npz"), "cifar10/")
    net, n = parameters_of(NCSNPP)
    ours = jax_to_ours({path: torch.empty(shape, device="meta") for path, shape in shapes.items()}, NCSNPP)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert n == 56_395_523


@pytest.mark.parametrize(
    "config, count, entries",
    [
        (replace(CIFAR10, label_dim=10), 55_734_147, 426),
        (replace(CIFAR10, augment_dim=9), 55_733_891, 425),
        (replace(NCSNPP, augment_dim=9), 56_397_827, 432),
        (SongUNetConfig(64, channel_mult=(1, 2, 2, 2), augment_dim=9), 61_805_571, 553),
        (replace(CIFAR10, second_time="random"), 60_395_267, 494),
        (replace(CIFAR10, num_blocks=8), 96_947_715, 712),
        (replace(NCSNPP, num_blocks=8, fourier_scale=0.02), 97_610_499, 719),
    ],
    ids=["classes", "augmented", "ncsnpp", "ffhq64", "ctm", "ddpmpp-deep", "ict-deep"],
)
def test_variants_have_their_papers_sizes(config, count, entries):
    net, n = parameters_of(config)
    assert (n, len(net.state_dict())) == (count, entries)


@pytest.mark.parametrize(
    "name, config",
    [
        ("ddpmpp_cond_aug", replace(CIFAR10, label_dim=10, augment_dim=9)),
        ("ncsnpp_aug", replace(NCSNPP, augment_dim=9)),
    ],
)
def test_state_dicts_of_the_cifar10_networks_are_edms(name, config):
    ours = [(k, tuple(v.shape)) for k, v in parameters_of(config)[0].state_dict().items()]
    assert ours == list(shapes_of(golden("songunet_published_keys.npz"), f"{name}/").items())


def test_resampling_equals_that_in_jax():
    z, f = golden("ncsnpp_jax.npz"), smoothing(1, 3, 3, 1)
    x = nhwc(z["fir/in_nhwc"])
    assert relative_error(halve(x, f), nhwc(z["fir/downsample_2d_1331"])) < 1e-6
    assert relative_error(double(x, f), nhwc(z["fir/upsample_2d_1331"])) < 1e-6


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_doubling_is_four_times_the_transpose_of_halving_and_keeps_constants_inside(taps):
    f, x, y = smoothing(*taps).double(), torch.randn(2, 3, 8, 8).double(), torch.randn(2, 3, 4, 4).double()
    assert torch.allclose((halve(x, f) * y).sum(), (x * double(y, f)).sum() / 4, rtol=1e-12)
    flat = torch.ones(1, 2, 8, 8).double()
    for out in (halve(flat, f), double(flat, f)):
        assert torch.allclose(out[..., 1:-1, 1:-1], torch.ones(()).double(), rtol=1e-12)


def test_downsampling_convolution_is_the_filter_after_the_convolution():
    """Of the maps and zeros around them: two operations that commute, done in the cheaper order."""
    layer, x = Downsample(2, 3, smoothing(1, 3, 3, 1)).double(), torch.randn(2, 2, 8, 8).double()
    wide = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=2)
    f = layer.resample_filter.expand(3, 1, 4, 4)
    assert torch.allclose(layer(x), torch.nn.functional.conv2d(wide, f, stride=2, groups=3), rtol=1e-10)


def test_classes_mean_no_augmentation():
    net, (x, c_noise, cond) = lively(DIGITS).eval(), batch(4, DIGITS)
    one_hot, zeros = torch.nn.functional.one_hot(cond, 10).double(), torch.zeros(4, 3).double()
    by_class = net(x, c_noise, cond=cond)
    assert torch.equal(by_class, net(x, c_noise, cond=one_hot))
    assert torch.equal(by_class, net(x, c_noise, cond=torch.cat([one_hot, zeros], 1)))
    assert torch.equal(net(x, c_noise), net(x, c_noise, cond=torch.zeros(4, 13)))
    beyond = net(x, c_noise, cond=torch.full((4,), 11))  # no class, and no augmentation label either
    assert torch.equal(beyond, net(x, c_noise))
    augmented = net(x, c_noise, cond=torch.cat([one_hot, zeros + 1], 1))
    assert (by_class - augmented).abs().amax((1, 2, 3)).min() > 1e-3


def test_augmentation_labels_reach_both_embeddings():
    config = replace(DIGITS, second_time="random", label_dim=0)
    net, labels = lively(config), torch.rand(2, 3).double()
    for embed in (net.embed, net.embed_s):
        assert (embed(torch.ones(2).double(), labels) - embed(torch.ones(2).double(), 0 * labels)).abs().max() > 1e-2


def test_frequencies_are_normal_numbers_times_the_scale_and_are_kept_with_the_weights():
    for scale in (16.0, 0.02):
        torch.manual_seed(0)
        net = replace(SMALL, fourier_scale=scale).build()
        torch.manual_seed(0)
        assert torch.equal(net.state_dict()["map_noise.freqs"], scale * torch.randn(16))


def test_compiled_ncsnpp_is_one_graph_and_equals_eager(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    net, (x, c_noise, cond), key = lively(replace(DIGITS, num_blocks=0)), batch(2, DIGITS), torch.arange(2)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x, c_noise, cond=cond, key=key), net(x, c_noise, cond=cond, key=key)) < 1e-12


def test_forward_mode_slope_in_images_and_times_is_the_measured_one():
    net, (x, c_noise, cond) = lively(DIGITS), batch(2, DIGITS)
    key, tangent = torch.arange(2), (torch.randn_like(x), torch.randn_like(c_noise))

    def f(x, c_noise):
        return net(x, c_noise, cond=cond, key=key)

    with sdpa_kernel(SDPBackend.MATH):
        _, slope = torch.func.jvp(f, (x, c_noise), tangent)
    plus, minus = (f(x + h * tangent[0], c_noise + h * tangent[1]) for h in (1e-7, -1e-7))
    assert relative_error((plus - minus) / 2e-7, slope) < 1e-4


def test_labels_and_choices_that_do_not_fit_are_refused():
    net, (x, c_noise, cond) = lively(replace(DIGITS, label_dim=0)), batch(2, DIGITS)
    with pytest.raises(UserError, match=r"^cond: .*int64.*; pass float \[2, 3\] vectors$"):
        net(x, c_noise, cond=cond)
    with pytest.raises(UserError, match=r"^cond: .*; pass int64 \[2\] class labels or float \[2, 13\] vectors$"):
        lively(DIGITS)(x, c_noise, cond=torch.zeros(2, 12))
    with pytest.raises(UserError, match="^variant='ncsn': pick from ddpmpp, ncsnpp$"):
        check_choice("variant", "ncsn", Variant)
