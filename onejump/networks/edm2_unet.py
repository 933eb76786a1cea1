"""EDM2's U-Net, magnitude-preserving (Karras et al. 2024, configuration G): of ECT and TCM on ImageNet 64x64.

    embedding  of c_noise and cond; in every block it scales the maps
    encoder    conv of the image and a map of ones, then for each level: halve the resolution (not at the first),
               num_blocks blocks; all maps are kept
    decoder    two blocks at the lowest level, then for each level, lowest first: double the resolution (not at the
               first), num_blocks + 1 blocks, each of which also reads the newest map still kept

There are no biases and no group norms: weights are normalised where they are used, and so are the pixels at the start
of each block of the encoder. Training calls `normalize_weights` at the start of each optimiser step.

The names of parameters and buffers are those of EDM2's state dicts without their prefix `unet.`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention

from onejump.networks.layers import Dropout, SecondTime, label_vectors
from onejump.networks.magnitude import MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize
from onejump.networks.unet_parts import (
    Embedding,
    Maps,
    check_dropout,
    check_images,
    check_levels,
    check_size,
    levels,
    resolutions,
)
from onejump.types import Cond, DropoutKey, Times, UserError

Resample = Literal["keep", "down", "up"]
RESIDUAL, ATTENTION, LABEL = 0.3, 0.3, 0.5  # the branch's weight in mp_sum
CLIP = 256.0  # of the maps that leave a block


@dataclass(frozen=True)
class EDM2UNetConfig:
    """EDM2's U-Net. The defaults are its ImageNet 64x64 network of size S: 280.2 M parameters, 202 GFLOP an image and
    pass.

    Sizes of EDM2, by model_channels (M parameters): XS 128 (125), S 192 (280), M 256 (498), L 320 (777), XL 384
    (1,119), XXL 448 (1,523). TCM's for CIFAR-10, 32x32 without classes, attention at 16: cifar-s has model_channels
    128, channel_mult (1, 2, 2, 2), num_blocks 3 (48.9), cifar-m 128, (2, 2, 2), 4 (54.6).
    """

    img_resolution: int = 64
    img_channels: int = 3
    label_dim: int = 1000  # number of classes, 0 = unconditional
    model_channels: int = 192  # channels of level i: model_channels * channel_mult[i]
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    channels_per_head: int = 64
    dropout: float = 0.0
    dropout_resolution: int = 16  # the highest resolution with dropout, 0 = all
    second_time: SecondTime = "off"  # this network reads one time only

    def __post_init__(self) -> None:
        check_size(self.model_channels, self.channel_mult, self.num_blocks)
        check_levels(self.img_resolution, self.channel_mult, self.attn_resolutions)
        if self.dropout_resolution < self.img_resolution:  # more is everywhere, so that the default fits small images
            check_dropout(self.dropout_resolution, self.resolutions)
        attending = [width for res, width, attention in self.levels if attention or res == self.resolutions[-1]]
        if self.channels_per_head < 1 or any(width % self.channels_per_head for width in attending):
            raise UserError(
                f"channels_per_head={self.channels_per_head}: levels with attention have "
                f"{' and '.join(map(str, attending))} channels; give a number that divides them"
            )
        if self.second_time != "off":
            raise UserError(
                f"second_time={self.second_time}: EDM2's U-Net reads one time only; use off, or, for jumps that end "
                "anywhere, SongUNetConfig or ADMUNetConfig"
            )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Side of the feature maps at each level, the image's own first."""
        return resolutions(self.img_resolution, self.channel_mult)

    @property
    def levels(self) -> tuple[tuple[int, int, bool], ...]:
        """(resolution, channels, has attention) of each level, the image's own first."""
        return levels(self.img_resolution, self.model_channels, self.channel_mult, self.attn_resolutions)

    @property
    def emb_channels(self) -> int:
        """Numbers that the embedding holds: as many as the widest level has channels."""
        return self.model_channels * max(self.channel_mult)

    def dropout_at(self, res: int) -> float:
        """The probability of dropout in blocks whose maps leave with side res."""
        return self.dropout if res <= (self.dropout_resolution or res) else 0.0

    def build(self) -> "EDM2UNet":
        """A freshly initialised network, equal to zero everywhere; it draws from torch's generator."""
        return EDM2UNet(self)


class Block(nn.Module):
    """Resample; mp_sum with (silu, conv, scale by the embedding, silu, dropout, conv); then, if asked, with attention.

    In the encoder the maps are normalised pixel by pixel before.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb: int,
        dropout: Dropout,
        head: int = 0,  # channels of an attention head, 0 = no attention
        resample: Resample = "keep",
        encoder: bool = False,
    ):
        super().__init__()
        self.resample, self.encoder, self.head = resample, encoder, head
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(c_out if encoder else c_in, c_out, 3)
        self.emb_linear = MPConv(emb, c_out)
        self.dropout = dropout
        self.conv_res1 = MPConv(c_out, c_out, 3)
        self.conv_skip = MPConv(c_in, c_out, 1) if c_in != c_out else None
        self.attn_qkv = MPConv(c_out, 3 * c_out, 1) if head else None
        self.attn_proj = MPConv(c_out, c_out, 1) if head else None

    def forward(self, x: Maps, emb: Embedding, key: DropoutKey) -> Maps:
        if self.resample == "down":
            x = avg_pool2d(x, 2)
        elif self.resample == "up":
            x = interpolate(x, scale_factor=2.0, mode="nearest")
        if self.encoder:
            x = normalize(self.skip(x), dim=1)
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, self.emb_gain) + 1
        y = mp_silu(y * scale[:, :, None, None])
        y = self.conv_res1(self.dropout(y, key))
        x = mp_sum(x if self.encoder else self.skip(x), y, RESIDUAL)
        return (mp_sum(x, self.attend(x), ATTENTION) if self.head else x).clamp(-CLIP, CLIP)

    def skip(self, x: Maps) -> Maps:
        return x if self.conv_skip is None else self.conv_skip(x)

    def attend(self, x: Maps) -> Maps:
        """Cosine attention of each head over all pixels.

        The rows of qkv are, head by head, (q, k, v) of channel 0, of channel 1, ...
        """
        assert self.attn_qkv is not None and self.attn_proj is not None
        b, c, height, width = x.shape
        qkv = self.attn_qkv(x).view(b, c // self.head, self.head, 3, height * width)
        q, k, v = normalize(qkv, dim=2).transpose(2, 4).contiguous().unbind(3)  # each [b, head, pixel, channel]
        a = scaled_dot_product_attention(q, k, v)
        return self.attn_proj(a.transpose(2, 3).reshape(b, c, height, width))


class EDM2UNet(nn.Module):
    """The network F of EDM2. Build it with EDM2UNetConfig(...).build()."""

    def __init__(self, config: EDM2UNetConfig):
        super().__init__()
        self.config = config
        c_noise, emb = config.levels[0][1], config.emb_channels
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(c_noise)
        self.emb_noise = MPConv(c_noise, emb)
        self.emb_label = MPConv(config.label_dim, emb) if config.label_dim else None
        layers = itertools.count()  # numbers the dropout layers

        def block(
            res: int, c_in: int, c_out: int, attention: bool, resample: Resample = "keep", encoder: bool = False
        ) -> Block:
            head = config.channels_per_head if attention else 0
            return Block(c_in, c_out, emb, Dropout(config.dropout_at(res), next(layers)), head, resample, encoder)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        last = self._fill_decoder(block, self._fill_encoder(block))
        self.out_conv = MPConv(last, config.img_channels, 3)

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight of the last layer."""
        return self.out_conv.weight

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts, in the order of their calls."""
        return [part for part in (*self.enc.values(), *self.dec.values()) if isinstance(part, Block)]

    def _fill_encoder(self, block: Callable[..., Block]) -> list[int]:
        """Returns the channels of the maps that the decoder will read, oldest first."""
        kept: list[int] = []
        for res, width, attention in self.config.levels:
            if res == self.config.img_resolution:
                self.enc[f"{res}x{res}_conv"] = MPConv(self.config.img_channels + 1, width, 3)
                kept.append(width)
            else:
                self.enc[f"{res}x{res}_down"] = block(res, kept[-1], kept[-1], False, "down", encoder=True)
                kept.append(kept[-1])
            for i in range(self.config.num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(res, kept[-1], width, attention, encoder=True)
                kept.append(width)
        return kept

    def _fill_decoder(self, block: Callable[..., Block], kept: list[int]) -> int:
        """Returns the channels of the last maps."""
        last = kept[-1]
        for res, width, attention in reversed(self.config.levels):
            if res == self.config.resolutions[-1]:
                self.dec[f"{res}x{res}_in0"] = block(res, last, last, True)
                self.dec[f"{res}x{res}_in1"] = block(res, last, last, False)
            else:
                self.dec[f"{res}x{res}_up"] = block(res, last, last, False, "up")
            for i in range(self.config.num_blocks + 1):
                self.dec[f"{res}x{res}_block{i}"] = block(res, last + kept.pop(), width, attention)
                last = width
        return last

    def forward(
        self, x: Maps, c_noise: Times, c_noise_s: Times | None = None, cond: Cond = None, key: DropoutKey = None
    ) -> Maps:
        """F(x; c_noise, cond). cond: int64 [b] classes or float [b, label_dim]; key: see keyed_dropout.

        Raises UserError if the images, the labels or the number of times do not fit the configuration.
        """
        config = self.config
        if c_noise_s is not None:
            raise UserError("c_noise_s: EDM2UNet reads one time only; use a jump that ends at the data (s=None)")
        check_images(x, config.img_channels, config.img_resolution)
        emb = self.embed(c_noise, label_vectors(cond, config.label_dim, x))
        first, *blocks = self.enc.values()
        kept = [first(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))]
        for block in blocks:
            kept.append(block(kept[-1], emb, key))
        x = kept[-1]
        for name, block in self.dec.items():
            if "_block" in name:  # in0, in1 and up read no kept map
                x = mp_cat(x, kept.pop())
            x = block(x, emb, key)
        return self.out_conv(x, self.out_gain)

    def embed(self, c_noise: Times, labels: Embedding) -> Embedding:
        """Embedding of noise level and label: a linear map of each, in equal parts."""
        emb = self.emb_noise(self.emb_fourier(c_noise).to(labels.dtype))
        if self.emb_label is not None:
            emb = mp_sum(emb, self.emb_label(labels * self.config.label_dim**0.5), LABEL)
        return mp_silu(emb)
