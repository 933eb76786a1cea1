"""ADM (Dhariwal & Nichol 2021): the U-Net of EDM, CM, iCT and CTM on ImageNet 64x64, and of CM on LSUN 256x256.

    embedding  of c_noise and cond; in every block it scales and shifts the normalised maps, or is added before
    encoder    conv, then for each level: halve the resolution (not at the first), num_blocks blocks; all maps are kept
    decoder    two blocks at the lowest level, then for each level, lowest first: double the resolution (not at the
               first), num_blocks + 1 blocks, each of which also reads the newest map still kept

With a second time (CTM, Kim et al. 2024) a twin of the embedding, of c_noise_s and cond, is added in every block.

The names of parameters and buffers are those of EDM's state dicts, and CTM's where there is a second time. OpenAI's
network is this one with other names, another order of the rows of qkv, and the options that say OpenAI.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import silu

from onejump.networks.layers import (
    Dropout,
    SecondTime,
    check_choice,
    check_second_time,
    embeds_second_time,
    label_vectors,
    sinusoidal,
)
from onejump.networks.unet_parts import (
    ConvResample,
    Embedding,
    L,
    Maps,
    Resample,
    check_channels,
    check_dropout,
    check_images,
    check_levels,
    check_size,
    decode,
    double,
    group_norm,
    halve,
    levels,
    resolutions,
    self_attention,
    smoothing,
)
from onejump.types import Cond, DropoutKey, Times, UserError

EPS = 1e-5  # of the normalisation
# block: a block whose maps are resampled after its first silu; conv: a convolution alone
Resampling = Literal["block", "conv"]


@dataclass(frozen=True)
class ADMUNetConfig:
    """EDM's ADM. With label_dim=1000 it is its ImageNet network: 295.9 M parameters, 219 GFLOP an image and pass."""

    img_resolution: int = 64
    img_channels: int = 3
    label_dim: int = 0  # number of classes, 0 = unconditional
    model_channels: int = 192  # channels of level i: model_channels * channel_mult[i]
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.1
    dropout_resolution: int = 0  # the highest resolution with dropout, 0 = all; iCT and ECT: 16
    scale_shift: bool = True  # the embedding scales and shifts the normalised maps; iCT: False, it is added before
    second_time: SecondTime = "off"  # whether F also reads c_noise_s, and how that embedding starts
    augment_dim: int = 0  # number of EDM's augmentation labels
    head_channels: int = 64  # channels of an attention head
    min_group: int = 4  # at most 32 normalisation groups, of at least so many channels; OpenAI: 1
    noise_scale: float = 1.0  # c_noise is multiplied by it; OpenAI: 1000
    label_at_s: bool = True  # the label is embedded beside s too; CTM on OpenAI's network: False
    resample: Resampling = "block"  # OpenAI without resblock_updown: "conv"

    def __post_init__(self) -> None:
        check_size(self.model_channels, self.channel_mult, self.num_blocks)
        check_levels(self.img_resolution, self.channel_mult, self.attn_resolutions)
        check_channels(self.model_channels)
        check_choice("resample", self.resample, Resampling)
        check_dropout(self.dropout_resolution, self.resolutions)
        for field, value in (("head_channels", self.head_channels), ("min_group", self.min_group)):
            if value < 1:
                raise UserError(f"{field}={value}: a number of channels is needed, 1 or more")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Side of the feature maps at each level, the image's own first."""
        return resolutions(self.img_resolution, self.channel_mult)

    @property
    def levels(self) -> tuple[tuple[int, int, bool], ...]:
        """(resolution, channels, has attention) of each level, the image's own first."""
        return levels(self.img_resolution, self.model_channels, self.channel_mult, self.attn_resolutions)

    def dropout_at(self, res: int) -> float:
        """The probability of dropout in blocks whose maps have side res."""
        return self.dropout if res <= (self.dropout_resolution or res) else 0.0

    def build(self) -> "ADMUNet":
        """A freshly initialised network, equal to zero everywhere; it draws from torch's generator."""
        return ADMUNet(self)


def zero(layer: L) -> L:
    """Initialise a layer to zero. All others start as torch's: uniform on +-1 / sqrt(fan_in), biases too."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def conv3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def attention_heads(channels: int, head_channels: int) -> int:
    """One head for every head_channels, at least one, or the next smaller number that divides the channels."""
    return next(n for n in range(max(channels // head_channels, 1), 0, -1) if channels % n == 0)


class Block(nn.Module):
    """(norm, silu, resample, conv), (norm, scale and shift, silu, dropout, conv), + skip; then, if asked, attention.

    Its maps leave with side res; layer numbers its dropout.
    """

    def __init__(
        self,
        config: ADMUNetConfig,
        layer: int,
        res: int,
        c_in: int,
        c_out: int,
        attention: bool = False,
        resample: Resample | None = None,
    ):
        super().__init__()
        emb, modulation = 4 * config.model_channels, 2 * c_out if config.scale_shift else c_out
        self.resample, self.scale_shift = resample, config.scale_shift
        self.norm0 = group_norm(c_in, EPS, config.min_group)
        self.conv0 = conv3(c_in, c_out)
        self.affine = nn.Linear(emb, modulation)
        self.affine_s = nn.Linear(emb, modulation) if embeds_second_time(config.second_time) else None
        if self.affine_s is not None and config.second_time == "zero":
            zero(self.affine_s)
        self.norm1 = group_norm(c_out, EPS, config.min_group)
        self.dropout = Dropout(config.dropout_at(res), layer)
        self.conv1 = zero(conv3(c_out, c_out))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        if resample is not None:  # two of them, since EDM's state dicts hold two and load strictly
            for module in (self.conv0, self.skip):
                module.register_buffer("resample_filter", smoothing(1, 1))
        self.heads = attention_heads(c_out, config.head_channels) if attention else 0
        if attention:
            self.norm2 = group_norm(c_out, EPS, config.min_group)
            self.qkv = nn.Conv2d(c_out, 3 * c_out, 1)
            self.proj = zero(nn.Conv2d(c_out, c_out, 1))

    def forward(self, x: Maps, emb: Embedding, emb_s: Embedding | None, key: DropoutKey) -> Maps:
        h = self.conv0(self.resampled(silu(self.norm0(x))))
        modulation = self.affine(emb)
        if self.affine_s is not None:
            modulation = modulation + self.affine_s(emb_s)
        modulation = modulation[:, :, None, None]
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + modulation)
        h = self.conv1(self.dropout(silu(h), key))
        x = self.skip(self.resampled(x)) + h
        return x + self.attend(x) if self.heads else x

    def resampled(self, x: Maps) -> Maps:
        return x if self.resample is None else self.resample(x, self.conv0.get_buffer("resample_filter"))

    def attend(self, x: Maps) -> Maps:
        """Each head over all pixels."""
        return self.proj(self_attention(self.qkv(self.norm2(x)), self.heads))


class ADMUNet(nn.Module):
    """The network F of ADM. Build it with ADMUNetConfig(...).build()."""

    def __init__(self, config: ADMUNetConfig):
        super().__init__()
        self.config = config
        c, emb = config.model_channels, 4 * config.model_channels
        self.map_augment = zero(nn.Linear(config.augment_dim, c, bias=False)) if config.augment_dim else None
        self.map_layer0 = nn.Linear(c, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        self.map_label = nn.Linear(config.label_dim, emb, bias=False) if config.label_dim else None
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)
        second_time = embeds_second_time(config.second_time)
        self.map_layer0_s = nn.Linear(c, emb) if second_time else None
        self.map_layer1_s = nn.Linear(emb, emb) if second_time else None
        layers = itertools.count()  # numbers the dropout layers

        def block(
            res: int, c_in: int, c_out: int, attention: bool = False, resample: Resample | None = None
        ) -> Block | ConvResample:
            if resample is not None and config.resample == "conv":
                return ConvResample(c_in, up=resample is double)
            return Block(config, next(layers), res, c_in, c_out, attention, resample)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        last = self._fill_decoder(block, self._fill_encoder(block))
        self.out_norm = group_norm(last, EPS, config.min_group)
        self.out_conv = zero(conv3(last, config.img_channels))

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight of the last layer."""
        return self.get_parameter("out_conv.weight")

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts, in the order of their calls."""
        return [part for part in (*self.enc.values(), *self.dec.values()) if isinstance(part, Block | ConvResample)]

    def _fill_encoder(self, block: Callable[..., Block | ConvResample]) -> list[int]:
        """Returns the channels of the maps that the decoder will read, oldest first."""
        kept: list[int] = []
        for res, width, attention in self.config.levels:
            if res == self.config.img_resolution:
                self.enc[f"{res}x{res}_conv"] = conv3(self.config.img_channels, width)
                kept.append(width)
            else:
                self.enc[f"{res}x{res}_down"] = block(res, kept[-1], kept[-1], resample=halve)
                kept.append(kept[-1])
            for i in range(self.config.num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(res, kept[-1], width, attention)
                kept.append(width)
        return kept

    def _fill_decoder(self, block: Callable[..., Block | ConvResample], kept: list[int]) -> int:
        """Returns the channels of the last maps."""
        last = kept[-1]
        for res, width, attention in reversed(self.config.levels):
            if res == self.config.resolutions[-1]:
                self.dec[f"{res}x{res}_in0"] = block(res, last, last, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(res, last, last)
            else:
                self.dec[f"{res}x{res}_up"] = block(res, last, last, resample=double)
            for i in range(self.config.num_blocks + 1):
                self.dec[f"{res}x{res}_block{i}"] = block(res, last + kept.pop(), width, attention)
                last = width
        return last

    def forward(
        self, x: Maps, c_noise: Times, c_noise_s: Times | None = None, cond: Cond = None, key: DropoutKey = None
    ) -> Maps:
        """F(x; c_noise, c_noise_s, cond). key: see keyed_dropout.

        cond: int64 [b] classes or float [b, label_dim + augment_dim]; classes mean augmentation labels 0.
        Raises UserError if the images, the labels or the number of times do not fit the configuration.
        """
        config = self.config
        check_second_time(c_noise_s, config.second_time, "ADMUNet")
        check_images(x, config.img_channels, config.img_resolution)
        labels = label_vectors(cond, config.label_dim, x, config.augment_dim)
        emb = self.embed(c_noise, labels)
        emb_s = None if c_noise_s is None else self.embed_s(c_noise_s, labels)
        first, *blocks = self.enc.values()
        kept = [first(x)]
        for block in blocks:
            kept.append(block(kept[-1], emb, emb_s, key))
        return self.out_conv(silu(self.out_norm(decode(self.dec.items(), kept, emb, emb_s, key))))

    def embed(self, c_noise: Times, labels: Embedding) -> Embedding:
        """Embedding of noise level and label: a two-layer MLP of the one, plus a linear map of the other."""
        return silu(self.with_label(self.map_layer1(silu(self.map_layer0(self.features(c_noise, labels)))), labels))

    def embed_s(self, c_noise_s: Times, labels: Embedding) -> Embedding:
        """Embedding of the second time, by an MLP of its own, and of the label, by the same map, if label_at_s."""
        assert self.map_layer0_s is not None and self.map_layer1_s is not None
        emb = self.map_layer1_s(silu(self.map_layer0_s(self.features(c_noise_s, labels))))
        return silu(self.with_label(emb, labels) if self.config.label_at_s else emb)

    def with_label(self, emb: Embedding, labels: Embedding) -> Embedding:
        return emb if self.map_label is None else emb + self.map_label(labels[:, : self.config.label_dim])

    def features(self, c_noise: Times, labels: Embedding) -> Embedding:
        """[cos(w c_noise), sin(w c_noise)], plus a linear map of the augmentation labels.

        The angular frequencies w go from noise_scale down by a factor 1e4, which is left out.
        """
        n = self.config.model_channels // 2
        w = torch.logspace(0, -4, n + 1, dtype=c_noise.dtype, device=c_noise.device)[:n]
        features = sinusoidal(self.config.noise_scale * c_noise, w).to(labels.dtype).roll(n, dims=1)
        if self.map_augment is not None:
            features = features + self.map_augment(labels[:, self.config.label_dim :])
        return features
