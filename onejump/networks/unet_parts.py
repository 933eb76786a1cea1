"""What the U-Nets of EDM, OpenAI and CTM share: levels, normalisation, attention, resampling, Fourier features."""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, conv_transpose2d, interpolate, scaled_dot_product_attention

from onejump.networks.layers import sinusoidal
from onejump.types import DropoutKey, Times, UserError

Maps = Float[Tensor, "b _ _ _"]  # [batch, channels, height, width]
Embedding = Float[Tensor, "b _"]
Filter = Float[Tensor, "1 1 k k"]
Resample = Callable[[Maps, Filter], Maps]
MAX_CHANNELS, MAX_BLOCKS, MAX_LEVELS = 65536, 64, 12  # that a file may ask for; no published network has a tenth of it
L = TypeVar("L", nn.Linear, nn.Conv2d)


def resolutions(img_resolution: int, channel_mult: tuple[int, ...]) -> tuple[int, ...]:
    """Side of the feature maps at each level, the image's own first."""
    return tuple(img_resolution >> level for level in range(len(channel_mult)))


def check_size(model_channels: int, channel_mult: tuple[int, ...], num_blocks: int) -> None:
    """Raise UserError for a U-Net that is empty, or so large that a damaged file must have asked for it."""
    if not 1 <= len(channel_mult) <= MAX_LEVELS:
        raise UserError(f"channel_mult={channel_mult}: 1 to {MAX_LEVELS} levels are possible")
    if not 0 <= num_blocks <= MAX_BLOCKS:
        raise UserError(f"num_blocks={num_blocks}: 0 to {MAX_BLOCKS} are possible")
    if not all(1 <= model_channels * mult <= MAX_CHANNELS for mult in channel_mult):
        raise UserError(
            f"model_channels={model_channels}, channel_mult={channel_mult}: 1 to {MAX_CHANNELS} channels are possible"
        )


def check_levels(img_resolution: int, channel_mult: tuple[int, ...], attn_resolutions: tuple[int, ...]) -> None:
    """Raise UserError if no U-Net can have these levels."""
    step = 2 ** (len(channel_mult) - 1)
    if img_resolution % step:
        raise UserError(
            f"img_resolution={img_resolution}: channel_mult={channel_mult} has {len(channel_mult)} "
            f"levels and needs a multiple of {step}; resize the images or use fewer levels"
        )
    sides = resolutions(img_resolution, channel_mult)
    if not set(attn_resolutions) <= set(sides):
        raise UserError(f"attn_resolutions={attn_resolutions}: pick from this network's {sides}")


def check_channels(model_channels: int) -> None:
    """Raise UserError if there cannot be as many features of c_noise."""
    if model_channels % 4:
        raise UserError(f"model_channels={model_channels}: a multiple of 4 is needed")


def check_dropout(dropout_resolution: int, sides: tuple[int, ...]) -> None:
    """Raise UserError if this is no resolution at which dropout can begin."""
    if dropout_resolution not in (0, *sides):
        raise UserError(
            f"dropout_resolution={dropout_resolution}: pick 0 (dropout everywhere) or one of this network's {sides}"
        )


def levels(
    img_resolution: int, model_channels: int, channel_mult: tuple[int, ...], attn_resolutions: tuple[int, ...]
) -> tuple[tuple[int, int, bool], ...]:
    """(resolution, channels, has attention) of each level, the image's own first."""
    sides = resolutions(img_resolution, channel_mult)
    return tuple(
        (res, model_channels * mult, res in attn_resolutions) for res, mult in zip(sides, channel_mult, strict=True)
    )


def check_images(x: Maps, img_channels: int, img_resolution: int) -> None:
    """Raise UserError if the images are not of the network's shape."""
    if x.shape[1:] != (img_channels, img_resolution, img_resolution):
        raise UserError(
            f"images of shape {tuple(x.shape[1:])}: this network has img_channels={img_channels}, "
            f"img_resolution={img_resolution}; give images of {img_channels}x{img_resolution}x{img_resolution}, or "
            "another network"
        )


def group_norm(channels: int, eps: float, min_group: int = 4) -> nn.GroupNorm:
    """min(32, channels / min_group) groups, or the next smaller number that divides the channels."""
    groups = next(g for g in range(max(min(32, channels // min_group), 1), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=eps)


def self_attention(qkv: Maps, heads: int) -> Maps:
    """Each head over all pixels. The channels of qkv are, head by head, (q, k, v) of channel 0, of channel 1, ..."""
    b, rows, height, width = qkv.shape
    c = rows // 3
    q, k, v = qkv.view(b, heads, c // heads, 3, height * width).transpose(2, 4).contiguous().unbind(3)
    a = scaled_dot_product_attention(q, k, v)  # each [b, head, pixel, channel]
    return a.transpose(2, 3).reshape(b, c, height, width)


def smoothing(*taps: int) -> Filter:
    """The filter with these taps along both axes, of sum 1."""
    row = torch.tensor([tap / sum(taps) for tap in taps])
    return torch.outer(row, row)[None, None]


def halve(x: Maps, f: Filter) -> Maps:
    """Means under the filter, at every second pixel; what lies outside the image counts as 0."""
    if f.shape[-1] == 2:  # [1, 1]
        return avg_pool2d(x, 2)
    c = x.shape[1]
    return conv2d(x, f.expand(c, 1, -1, -1), stride=2, padding=f.shape[-1] // 2 - 1, groups=c)


def double(x: Maps, f: Filter) -> Maps:
    """Four times the transpose of `halve`: each pixel spread by the filter over the finer ones around it."""
    if f.shape[-1] == 2:  # [1, 1]: each pixel four times
        return interpolate(x, scale_factor=2.0, mode="nearest")
    c = x.shape[1]
    return conv_transpose2d(x, 4 * f.expand(c, 1, -1, -1), stride=2, padding=f.shape[-1] // 2 - 1, groups=c)


class Downsample(nn.Conv2d):
    """A 3x3 convolution of the maps under the filter, at every second pixel.

    Both together see zeros outside the image: the filtered maps reach two pixels over its edge.
    """

    def __init__(self, c_in: int, c_out: int, f: Filter):
        super().__init__(c_in, c_out, 3, stride=2)
        self.register_buffer("resample_filter", f)

    def forward(self, x: Maps) -> Maps:
        c = self.in_channels
        f = self.get_buffer("resample_filter").expand(c, 1, -1, -1)
        return super().forward(conv2d(x, f, padding=2, groups=c))


class ConvResample(nn.Module):
    """A strided 3x3 convolution, or each pixel four times and then a 3x3 convolution. It is called as a block."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1)

    def forward(self, x: Maps, emb: Embedding, emb_s: Embedding | None, key: DropoutKey) -> Maps:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


def decode(
    decoder: Iterable[tuple[str, nn.Module]],
    kept: list[Maps],
    emb: Embedding,
    emb_s: Embedding | None,
    key: DropoutKey,
) -> Maps:
    """The last maps of a decoder, whose blocks called `block` also read the newest map still kept."""
    x = kept[-1]
    for name, block in decoder:
        if "_block" in name:  # in0, in1 and up read no kept map
            x = torch.cat([x, kept.pop()], dim=1)
        x = block(x, emb, emb_s, key)
    return x


class FourierFeatures(nn.Module):
    """[sin(2 pi f c_noise), cos(2 pi f c_noise)] for n fixed frequencies f, drawn from N(0, scale^2)."""

    freqs: Tensor

    def __init__(self, n: int, scale: float):
        super().__init__()
        self.register_buffer("freqs", torch.randn(n) * scale)

    def forward(self, c_noise: Times) -> Embedding:
        return sinusoidal(c_noise, 2 * math.pi * self.freqs)
