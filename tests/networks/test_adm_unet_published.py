"""ADMUNet is OpenAI's UNetModel and CTM's, after a renaming of the weights."""

import math
from dataclasses import replace

import pytest
import torch
from network_setup import batch, golden, lively, relative_error
from published_names import interleaved, openai_to_ours
from published_setup import parameters_of, recipe_of, shapes_of

from onejump.networks import ADMUNetConfig
from onejump.networks.adm_unet import Resampling, attention_heads
from onejump.networks.layers import Dropout, check_choice
from onejump.networks.unet_parts import group_norm, self_attention
from onejump.types import UserError

SMALL = ADMUNetConfig(16, 3, 10, 32, (1, 2), 1, (8,), dropout=0.0, head_channels=32, min_group=1, noise_scale=1000.0)
PUBLISHED = {
    "imagenet64": SMALL,
    "ctm": replace(SMALL, second_time="random", label_at_s=False),
    "lsun": replace(SMALL, label_dim=0, channel_mult=(1, 1), head_channels=16, scale_shift=False, resample="conv"),
}
IMAGENET64 = ADMUNetConfig(label_dim=1000, min_group=1, noise_scale=1000.0)
LSUN256 = replace(IMAGENET64, img_resolution=256, label_dim=0, model_channels=256, channel_mult=(1, 1, 2, 2, 4, 4))
LSUN256 = replace(LSUN256, num_blocks=2, scale_shift=False)
TINY = ADMUNetConfig(8, 1, 10, 32, (1, 2), 1, (4,), dropout=0.3, augment_dim=3)


def published(name):
    """(network with the golden weights, its arguments, all golden numbers of this name)"""
    z = {k.removeprefix(f"{name}/"): v for k, v in golden("openai_unet.npz").items() if k.startswith(f"{name}/")}
    net = PUBLISHED[name].build().eval()
    weights = {key: recipe_of(key, shape) for key, shape in shapes_of(z).items()}
    net.load_state_dict(openai_to_ours(weights, PUBLISHED[name]))
    times = [z[k].double() / 1000 if k in z else None for k in ("in/timesteps", "in/s")]  # our c_noise
    return net, (z["in/x"], *times, torch.as_tensor(z["in/y"]) if "in/y" in z else None), z


@pytest.mark.parametrize("name", PUBLISHED)
def test_output_equals_openais(name):
    """Every key of theirs has its place, and no parameter of ours is left without one."""
    net, (x, *times, cond), z = published(name)
    times = [None if t is None else t.float() for t in times]
    assert relative_error(net(x, *times, cond), z["out/f32"]) < 1e-5


@pytest.mark.parametrize("name", PUBLISHED)
def test_output_in_float64_equals_openais_with_their_rounded_frequencies(name, monkeypatch):
    """Their frequencies exp(-ln(1e4) j / n) are float32 numbers, some 5e-7 off, in every precision."""
    net, (x, *args), z = published(name)
    w = torch.exp(-math.log(10000) * torch.arange(16, dtype=torch.float32) / 16).double()

    def features(c_noise, labels):
        angle = 1000 * c_noise[:, None] * w
        return torch.cat([angle.cos(), angle.sin()], 1)

    net, x, theirs = net.double(), x.double(), z["out/f64"]
    assert relative_error(net(x, *args), theirs) < 1e-5
    monkeypatch.setattr(net, "features", features)
    assert relative_error(net(x, *args), theirs) < 1e-10


@pytest.mark.parametrize(
    "config, count, theirs",
    [
        (IMAGENET64, 295_899_267, 541),
        (LSUN256, 526_304_771, 566),
        (replace(LSUN256, resample="conv"), 480_721_923, 486),
        (replace(IMAGENET64, second_time="random", label_at_s=False), 324_100_611, 617),
        (replace(IMAGENET64, num_blocks=6), 495_357_699, 913),
    ],
    ids=["imagenet64", "lsun256", "lsun256-conv", "ctm-imagenet64", "deep"],
)
def test_networks_have_their_published_sizes_and_numbers_of_entries(config, count, theirs):
    net, n = parameters_of(config)
    assert n == count and sum("resample_filter" not in name for name in net.state_dict()) == theirs


def test_rows_of_qkv_change_their_order_and_nothing_else():
    """Theirs: all queries, all keys, all values, each head after head."""
    theirs = torch.randn(2, 3 * 64, 4, 4).double()
    q, k, v = (part.view(2, 4, 16, 16) for part in theirs.chunk(3, 1))  # [b, head, channel, pixel]
    weight = (torch.einsum("bhci,bhcj->bhij", q, k) / 4).softmax(3)
    expected = torch.einsum("bhij,bhcj->bhci", weight, v).reshape(2, 64, 4, 4)
    ours = interleaved(theirs.transpose(0, 1)).transpose(0, 1)
    assert relative_error(self_attention(ours, 4), expected) < 1e-12


@pytest.mark.parametrize("channels, groups", [(32, 32), (64, 32), (192, 32), (48, 24), (8, 8)])
def test_norms_have_openais_groups_where_they_divide_the_channels(channels, groups):
    assert group_norm(channels, 1e-5, min_group=1).num_groups == groups


def test_heads_follow_their_channels():
    assert [attention_heads(192, c) for c in (16, 32, 64, 128, 256)] == [12, 6, 3, 1, 1]


def test_noise_scale_multiplies_both_times():
    config = replace(TINY, second_time="random", augment_dim=0)
    net, (x, c_noise, cond) = lively(replace(config, noise_scale=4.0)).eval(), batch(2)
    twin = lively(config).eval()
    assert torch.equal(net(x, c_noise, c_noise - 1, cond), twin(x, 4 * c_noise, 4 * (c_noise - 1), cond))
    assert not torch.allclose(net(x, c_noise, c_noise - 1, cond), twin(x, 4 * c_noise, c_noise - 1, cond))


@pytest.mark.parametrize("label_at_s", [True, False])
def test_label_is_beside_s_where_asked(label_at_s):
    net, t = lively(replace(TINY, second_time="random", label_at_s=label_at_s)), torch.randn(2).double()
    labels, none = torch.eye(13).double()[:2], torch.zeros(2, 13).double()
    assert (net.embed(t, labels) - net.embed(t, none)).abs().max() > 1e-2
    assert torch.equal(net.embed_s(t, labels), net.embed_s(t, none)) is not label_at_s


def test_augmentation_labels_are_added_to_the_features_of_both_times_and_start_without_effect():
    config = replace(TINY, second_time="random")
    net, (x, c_noise, cond) = config.build().double().eval(), batch(2)
    augmented = torch.cat([torch.nn.functional.one_hot(cond, 10), torch.rand(2, 3)], 1).double()
    net.out_conv.weight.data.normal_()
    assert torch.equal(net(x, c_noise, c_noise, augmented), net(x, c_noise, c_noise, cond))
    net, plain = lively(config), augmented * (torch.arange(13) < 10)
    difference = net.features(c_noise, augmented) - net.features(c_noise, plain)
    assert torch.allclose(difference, augmented[:, 10:] @ net.map_augment.weight.T, rtol=1e-10, atol=1e-12)
    for embed in (net.embed, net.embed_s):
        assert (embed(c_noise, augmented) - embed(c_noise, plain)).abs().max() > 0.01


def test_convolutions_that_resample_have_no_dropout_of_their_own():
    layers = [m.layer for m in replace(TINY, resample="conv").build().modules() if isinstance(m, Dropout)]
    assert layers == list(range(2 + 2 + 4))


@pytest.mark.parametrize("field, value", [("head_channels", 0), ("min_group", -1)])
def test_impossible_configuration_is_refused(field, value):
    with pytest.raises(UserError, match=f"^{field}={value}: [^\n]*1 or more$"):
        replace(TINY, **{field: value})
    with pytest.raises(UserError, match="^resample='blocks': pick from block, conv$"):
        check_choice("resample", "blocks", Resampling)
