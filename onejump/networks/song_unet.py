"""DDPM++ (Song et al. 2021) as built by EDM (Karras et al. 2022): the U-Net of EDM, ECT, TCM and CTM on CIFAR-10.

    embedding  of c_noise and cond; every block adds it to its maps
    encoder    conv, then for each level: halve the resolution (not at the first), num_blocks blocks; all maps are kept
    decoder    two blocks at the lowest level, then for each level, lowest first: double the resolution (not at the
               first), num_blocks + 1 blocks, each of which also reads the newest map still kept

With a second time (CTM, Kim et al. 2024) a twin of the embedding, of c_noise_s and cond, is added in every block.

The names of parameters and buffers are those of EDM's state dicts, and CTM's where there is a second time.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention, silu

from onejump.networks.layers import (
    Dropout,
    SecondTime,
    check_second_time,
    embeds_second_time,
    label_vectors,
    sinusoidal,
)
from onejump.types import Cond, DropoutKey, Times, UserError

Maps = Float[Tensor, "b _ _ _"]  # [batch, channels, height, width]
Embedding = Float[Tensor, "b _"]
L = TypeVar("L", nn.Linear, nn.Conv2d)
SQRT_HALF = 0.5**0.5  # keeps the variance of a sum of two branches


@dataclass(frozen=True)
class SongUNetConfig:
    """EDM's DDPM++. The defaults are its CIFAR-10 network: 55.7 M parameters, 42 GFLOP an image and pass."""

    img_resolution: int = 32
    img_channels: int = 3
    label_dim: int = 0  # number of classes, 0 = unconditional
    model_channels: int = 128  # channels of level i: model_channels * channel_mult[i]
    channel_mult: tuple[int, ...] = (2, 2, 2)
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.13
    second_time: SecondTime = "off"  # whether F also reads c_noise_s, and how that embedding starts

    def __post_init__(self) -> None:
        step = 2 ** (len(self.channel_mult) - 1)
        if self.img_resolution % step:
            raise UserError(
                f"img_resolution={self.img_resolution}: channel_mult={self.channel_mult} has {len(self.channel_mult)} "
                f"levels and needs a multiple of {step}; resize the images or use fewer levels"
            )
        if not set(self.attn_resolutions) <= set(self.resolutions):
            raise UserError(f"attn_resolutions={self.attn_resolutions}: pick from this network's {self.resolutions}")
        if self.model_channels % 4:
            raise UserError(f"model_channels={self.model_channels}: a multiple of 4 is needed")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Side of the feature maps at each level, the image's own first."""
        return tuple(self.img_resolution >> level for level in range(len(self.channel_mult)))

    @property
    def levels(self) -> tuple[tuple[int, int, bool], ...]:
        """(resolution, channels, has attention) of each level, the image's own first."""
        return tuple(
            (res, self.model_channels * mult, res in self.attn_resolutions)
            for res, mult in zip(self.resolutions, self.channel_mult, strict=True)
        )

    def build(self) -> "SongUNet":
        """A freshly initialised network; it draws from torch's generator."""
        return SongUNet(self)


def linear(c_in: int, c_out: int) -> nn.Linear:
    return xavier(nn.Linear(c_in, c_out))


def conv(c_in: int, c_out: int, kernel: int, gain: float = 1.0) -> nn.Conv2d:
    return xavier(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2), gain)


def xavier(layer: L, gain: float = 1.0) -> L:
    """Initialise a layer: weights uniform on +-gain * sqrt(6 / (fan_in + fan_out)), biases zero."""
    assert layer.bias is not None
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    """min(32, channels / 4) groups as in EDM, or the next smaller number that divides the channels."""
    groups = next(g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


def halve(x: Maps) -> Maps:
    """2x2 means: EDM's resampling filter [1, 1]."""
    return avg_pool2d(x, 2)


def double(x: Maps) -> Maps:
    """Each pixel four times: EDM's resampling filter [1, 1]."""
    return interpolate(x, scale_factor=2.0, mode="nearest")


def unchanged(x: Maps) -> Maps:
    return x


class Block(nn.Module):
    """(norm, silu, resample, conv), + embedding, (norm, silu, dropout, conv), + skip; then, if asked, attention."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb: int,
        dropout: Dropout,
        attention: bool = False,
        resample: Callable[[Maps], Maps] = unchanged,
        second_time: bool = False,
    ):
        super().__init__()
        self.resample = resample
        self.norm0 = group_norm(c_in)
        self.conv0 = conv(c_in, c_out, 3)
        self.affine = linear(emb, c_out)
        self.affine_s = linear(emb, c_out) if second_time else None
        self.norm1 = group_norm(c_out)
        self.dropout = dropout
        self.conv1 = conv(c_out, c_out, 3, gain=1e-5)
        self.skip = nn.Identity() if c_in == c_out and resample is unchanged else conv(c_in, c_out, 1)
        if resample is not unchanged:  # never read; EDM's state dicts hold these constants, and load strictly
            for layer in (self.conv0, self.skip):
                layer.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))
        self.attention = attention
        if attention:
            self.norm2 = group_norm(c_out)
            self.qkv = conv(c_out, 3 * c_out, 1, gain=0.2**0.5)
            self.proj = conv(c_out, c_out, 1, gain=1e-5)

    def forward(self, x: Maps, emb: Embedding, emb_s: Embedding | None, key: DropoutKey) -> Maps:
        h = self.conv0(self.resample(silu(self.norm0(x))))
        shift = self.affine(emb)
        if self.affine_s is not None:
            shift = shift + self.affine_s(emb_s)
        h = silu(self.norm1(h + shift[:, :, None, None]))
        h = self.conv1(self.dropout(h, key))
        x = (self.skip(self.resample(x)) + h) * SQRT_HALF
        return (x + self.attend(x)) * SQRT_HALF if self.attention else x

    def attend(self, x: Maps) -> Maps:
        """One head over all pixels. The rows of qkv are (q, k, v) of channel 0, then of channel 1, ..."""
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).view(b, 1, c, 3, height * width)
        q, k, v = qkv.transpose(2, 4).contiguous().unbind(3)  # each [b, 1, pixel, channel]
        a = scaled_dot_product_attention(q, k, v)
        return self.proj(a.transpose(2, 3).reshape(b, c, height, width))


class SongUNet(nn.Module):
    """The network F of DDPM++. Build it with SongUNetConfig(...).build()."""

    def __init__(self, config: SongUNetConfig):
        super().__init__()
        self.config = config
        c, emb = config.model_channels, 4 * config.model_channels
        self.map_label = linear(config.label_dim, c) if config.label_dim else None
        self.map_layer0 = linear(c, emb)
        self.map_layer1 = linear(emb, emb)
        second_time = embeds_second_time(config.second_time)
        self.map_layer0_s = linear(c, emb) if second_time else None
        self.map_layer1_s = linear(emb, emb) if second_time else None
        layers = itertools.count()  # numbers the dropout layers

        def block(
            c_in: int, c_out: int, attention: bool = False, resample: Callable[[Maps], Maps] = unchanged
        ) -> Block:
            return Block(c_in, c_out, emb, Dropout(config.dropout, next(layers)), attention, resample, second_time)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self._fill_decoder(block, self._fill_encoder(block))
        if config.second_time == "zero":
            for name, p in self.named_parameters():
                if ".affine_s." in name:
                    nn.init.zeros_(p)

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight of the last layer."""
        res = self.config.img_resolution
        return self.get_parameter(f"dec.{res}x{res}_aux_conv.weight")

    def _fill_encoder(self, block: Callable[..., Block]) -> list[int]:
        """Returns the channels of the maps that the decoder will read, oldest first."""
        last = self.config.model_channels  # channels of the newest map
        kept = []
        for res, width, attention in self.config.levels:
            if res == self.config.img_resolution:
                self.enc[f"{res}x{res}_conv"] = conv(self.config.img_channels, last, 3)
            else:
                self.enc[f"{res}x{res}_down"] = block(last, last, resample=halve)
            kept.append(last)
            for i in range(self.config.num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(last, width, attention)
                last = width
                kept.append(last)
        return kept

    def _fill_decoder(self, block: Callable[..., Block], kept: list[int]) -> None:
        last = kept[-1]
        for res, width, attention in reversed(self.config.levels):
            if res == self.config.resolutions[-1]:
                self.dec[f"{res}x{res}_in0"] = block(last, last, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(last, last)
            else:
                self.dec[f"{res}x{res}_up"] = block(last, last, resample=double)
            for i in range(self.config.num_blocks + 1):
                attend = attention and i == self.config.num_blocks
                self.dec[f"{res}x{res}_block{i}"] = block(last + kept.pop(), width, attend)
                last = width
        self.dec[f"{res}x{res}_aux_norm"] = group_norm(last)
        self.dec[f"{res}x{res}_aux_conv"] = conv(last, self.config.img_channels, 3, gain=1e-5)

    def forward(
        self, x: Maps, c_noise: Times, c_noise_s: Times | None = None, cond: Cond = None, key: DropoutKey = None
    ) -> Maps:
        """F(x; c_noise, c_noise_s, cond). cond: int64 [b] classes or float [b, label_dim]; key: see keyed_dropout.

        Raises UserError if the images, the labels or the number of times do not fit the configuration.
        """
        config = self.config
        check_second_time(c_noise_s, config.second_time, "SongUNet")
        if x.shape[1:] != (config.img_channels, config.img_resolution, config.img_resolution):
            raise UserError(
                f"images of shape {tuple(x.shape[1:])}: this network has img_channels={config.img_channels}, "
                f"img_resolution={config.img_resolution}"
            )
        labels = label_vectors(cond, config.label_dim, x)
        emb, emb_s = self.embed(c_noise, labels), None
        if c_noise_s is not None:
            emb_s = self.embed_s(c_noise_s, labels)
        first, *blocks = self.enc.values()
        kept = [first(x)]
        for block in blocks:
            kept.append(block(kept[-1], emb, emb_s, key))
        x = kept[-1]
        *named_blocks, (_, norm), (_, last) = self.dec.items()
        for name, block in named_blocks:
            if "_block" in name:  # in0, in1 and up read no kept map
                x = torch.cat([x, kept.pop()], dim=1)
            x = block(x, emb, emb_s, key)
        return last(silu(norm(x)))

    def embed(self, c_noise: Times, labels: Embedding) -> Embedding:
        """Embedding of noise level and label: their features, then a two-layer MLP."""
        return silu(self.map_layer1(silu(self.map_layer0(self.features(c_noise, labels)))))

    def embed_s(self, c_noise_s: Times, labels: Embedding) -> Embedding:
        """Embedding of the second time and the label: the same features, then an MLP of its own."""
        assert self.map_layer0_s is not None and self.map_layer1_s is not None
        return silu(self.map_layer1_s(silu(self.map_layer0_s(self.features(c_noise_s, labels)))))

    def features(self, c_noise: Times, labels: Embedding) -> Embedding:
        """Sinusoids of angular frequency 1 down to 1e-4, plus a linear map of the label."""
        n = self.config.model_channels // 2
        w = torch.logspace(0, -4, n, dtype=c_noise.dtype, device=c_noise.device)
        features = sinusoidal(c_noise, w).to(labels.dtype)
        if self.map_label is not None:
            features = features + self.map_label(labels * self.config.label_dim**0.5)
        return features
