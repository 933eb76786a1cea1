"""DDPM++ and NCSN++ (Song et al. 2021) as built by EDM (Karras et al. 2022): the U-Nets of EDM, iCT, ECT, TCM and CTM
on CIFAR-10, FFHQ and AFHQ, and after renaming its weights that of the consistency models on CIFAR-10 in JAX.

    embedding  of c_noise and cond; every block adds it to its maps
    encoder    conv, then for each level: halve the resolution (not at the first), num_blocks blocks; all maps are kept
    decoder    two blocks at the lowest level, then for each level, lowest first: double the resolution (not at the
               first), num_blocks + 1 blocks, each of which also reads the newest map still kept

In NCSN++ each level's first maps also hear from the first maps of the level above, through one convolution: the
residual encoder. With a second time (CTM, Kim et al. 2024) a twin of the embedding, of c_noise_s and cond, is added in
every block.

The names of parameters and buffers are those of EDM's state dicts, and CTM's where there is a second time.
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
    Downsample,
    Embedding,
    Filter,
    FourierFeatures,
    L,
    Maps,
    Resample,
    check_channels,
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
from onejump.types import Cond, DropoutKey, Times

SQRT_HALF = 0.5**0.5  # keeps the variance of a sum of two branches
EPS = 1e-6  # of the normalisation
# ncsnpp has Fourier features of c_noise (twice as many), a residual encoder, and resamples with the filter [1, 3, 3, 1]
Variant = Literal["ddpmpp", "ncsnpp"]


@dataclass(frozen=True)
class SongUNetConfig:
    """EDM's DDPM++ and NCSN++. The defaults are its CIFAR-10 network: 55.7 M parameters, 42 GFLOP an image and pass."""

    img_resolution: int = 32
    img_channels: int = 3
    label_dim: int = 0  # number of classes, 0 = unconditional
    model_channels: int = 128  # channels of level i: model_channels * channel_mult[i]
    channel_mult: tuple[int, ...] = (2, 2, 2)
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.13
    second_time: SecondTime = "off"  # whether F also reads c_noise_s, and how that embedding starts
    variant: Variant = "ddpmpp"
    fourier_scale: float = 16.0  # standard deviation of ncsnpp's frequencies; iCT: 0.02
    augment_dim: int = 0  # number of EDM's augmentation labels

    def __post_init__(self) -> None:
        check_size(self.model_channels, self.channel_mult, self.num_blocks)
        check_levels(self.img_resolution, self.channel_mult, self.attn_resolutions)
        check_channels(self.model_channels)
        check_choice("variant", self.variant, Variant)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Side of the feature maps at each level, the image's own first."""
        return resolutions(self.img_resolution, self.channel_mult)

    @property
    def levels(self) -> tuple[tuple[int, int, bool], ...]:
        """(resolution, channels, has attention) of each level, the image's own first."""
        return levels(self.img_resolution, self.model_channels, self.channel_mult, self.attn_resolutions)

    @property
    def filter(self) -> Filter:
        """What the maps are resampled with."""
        return smoothing(1, 1) if self.variant == "ddpmpp" else smoothing(1, 3, 3, 1)

    def build(self) -> "SongUNet":
        """A freshly initialised network; it draws from torch's generator."""
        return SongUNet(self)


def linear(c_in: int, c_out: int) -> nn.Linear:
    return xavier(nn.Linear(c_in, c_out))


def conv(c_in: int, c_out: int, kernel: int, gain: float = 1.0) -> nn.Conv2d:
    return xavier(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2), gain)


def xavier(layer: L, gain: float = 1.0) -> L:
    """Initialise a layer: weights uniform on +-gain * sqrt(6 / (fan_in + fan_out)), biases zero."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """(norm, silu, resample, conv), + embedding, (norm, silu, dropout, conv), + skip; then, if asked, attention."""

    def __init__(
        self,
        config: SongUNetConfig,
        layer: int,
        c_in: int,
        c_out: int,
        attention: bool = False,
        resample: Resample | None = None,
    ):
        super().__init__()
        emb = 4 * config.model_channels
        self.resample = resample
        self.norm0 = group_norm(c_in, EPS)
        self.conv0 = conv(c_in, c_out, 3)
        self.affine = linear(emb, c_out)
        self.affine_s = linear(emb, c_out) if embeds_second_time(config.second_time) else None
        self.norm1 = group_norm(c_out, EPS)
        self.dropout = Dropout(config.dropout, layer)
        self.conv1 = conv(c_out, c_out, 3, gain=1e-5)
        self.skip = nn.Identity() if c_in == c_out and resample is None else conv(c_in, c_out, 1)
        if resample is not None:  # two of them, since EDM's state dicts hold two and load strictly
            for module in (self.conv0, self.skip):
                module.register_buffer("resample_filter", config.filter)
        self.attention = attention
        if attention:
            self.norm2 = group_norm(c_out, EPS)
            self.qkv = conv(c_out, 3 * c_out, 1, gain=0.2**0.5)
            self.proj = conv(c_out, c_out, 1, gain=1e-5)

    def forward(self, x: Maps, emb: Embedding, emb_s: Embedding | None, key: DropoutKey) -> Maps:
        h = self.conv0(self.resampled(silu(self.norm0(x))))
        shift = self.affine(emb)
        if self.affine_s is not None:
            shift = shift + self.affine_s(emb_s)
        h = silu(self.norm1(h + shift[:, :, None, None]))
        h = self.conv1(self.dropout(h, key))
        x = (self.skip(self.resampled(x)) + h).mul_(SQRT_HALF)  # in place: one map less to make
        return (x + self.attend(x)).mul_(SQRT_HALF) if self.attention else x

    def resampled(self, x: Maps) -> Maps:
        return x if self.resample is None else self.resample(x, self.conv0.get_buffer("resample_filter"))

    def attend(self, x: Maps) -> Maps:
        """One head over all pixels."""
        return self.proj(self_attention(self.qkv(self.norm2(x)), heads=1))


class SongUNet(nn.Module):
    """The network F of DDPM++ or NCSN++. Build it with SongUNetConfig(...).build()."""

    def __init__(self, config: SongUNetConfig):
        super().__init__()
        self.config = config
        emb, fourier = 4 * config.model_channels, config.variant == "ncsnpp"
        c = config.model_channels * (2 if fourier else 1)  # features of c_noise
        self.map_noise = FourierFeatures(c // 2, config.fourier_scale) if fourier else None
        self.map_label = linear(config.label_dim, c) if config.label_dim else None
        self.map_augment = xavier(nn.Linear(config.augment_dim, c, bias=False)) if config.augment_dim else None
        self.map_layer0 = linear(c, emb)
        self.map_layer1 = linear(emb, emb)
        second_time = embeds_second_time(config.second_time)
        self.map_layer0_s = linear(c, emb) if second_time else None
        self.map_layer1_s = linear(emb, emb) if second_time else None
        layers = itertools.count()  # numbers the dropout layers

        def block(c_in: int, c_out: int, attention: bool = False, resample: Resample | None = None) -> Block:
            return Block(config, next(layers), c_in, c_out, attention, resample)

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

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts, in the order of their calls."""
        return [part for part in (*self.enc.values(), *self.dec.values()) if isinstance(part, Block)]

    def _fill_encoder(self, block: Callable[..., Block]) -> list[int]:
        """Returns the channels of the maps that the decoder will read, oldest first."""
        last = self.config.model_channels  # channels of the newest map
        above, kept = self.config.img_channels, []  # channels of what the next Downsample reads
        for res, width, attention in self.config.levels:
            if res == self.config.img_resolution:
                self.enc[f"{res}x{res}_conv"] = conv(self.config.img_channels, last, 3)
            else:
                self.enc[f"{res}x{res}_down"] = block(last, last, resample=halve)
                if self.config.variant == "ncsnpp":
                    self.enc[f"{res}x{res}_aux_residual"] = xavier(Downsample(above, last, self.config.filter))
                    above = last
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
        self.dec[f"{res}x{res}_aux_norm"] = group_norm(last, EPS)
        self.dec[f"{res}x{res}_aux_conv"] = conv(last, self.config.img_channels, 3, gain=1e-5)

    def forward(
        self, x: Maps, c_noise: Times, c_noise_s: Times | None = None, cond: Cond = None, key: DropoutKey = None
    ) -> Maps:
        """F(x; c_noise, c_noise_s, cond). key: see keyed_dropout.

        cond: int64 [b] classes or float [b, label_dim + augment_dim]; classes mean augmentation labels 0.
        Raises UserError if the images, the labels or the number of times do not fit the configuration.
        """
        config = self.config
        check_second_time(c_noise_s, config.second_time, "SongUNet")
        check_images(x, config.img_channels, config.img_resolution)
        labels = label_vectors(cond, config.label_dim, x, config.augment_dim)
        emb = self.embed(c_noise, labels)
        emb_s = None if c_noise_s is None else self.embed_s(c_noise_s, labels)
        *decoder, (_, norm), (_, last) = self.dec.items()
        return last(silu(norm(decode(decoder, self.encode(x, emb, emb_s, key), emb, emb_s, key))))

    def encode(self, x: Maps, emb: Embedding, emb_s: Embedding | None, key: DropoutKey) -> list[Maps]:
        """The maps that the decoder reads, oldest first."""
        (_, first), *named_blocks = self.enc.items()
        kept, above = [first(x)], x
        for name, block in named_blocks:
            if name.endswith("_aux_residual"):
                kept[-1] = above = (kept[-1] + block(above)) * SQRT_HALF
            else:
                kept.append(block(kept[-1], emb, emb_s, key))
        return kept

    def embed(self, c_noise: Times, labels: Embedding) -> Embedding:
        """Embedding of noise level and label: their features, then a two-layer MLP."""
        return silu(self.map_layer1(silu(self.map_layer0(self.features(c_noise, labels)))))

    def embed_s(self, c_noise_s: Times, labels: Embedding) -> Embedding:
        """Embedding of the second time and the label: the same features, then an MLP of its own."""
        assert self.map_layer0_s is not None and self.map_layer1_s is not None
        return silu(self.map_layer1_s(silu(self.map_layer0_s(self.features(c_noise_s, labels)))))

    def features(self, c_noise: Times, labels: Embedding) -> Embedding:
        """Sinusoids (DDPM++: of angular frequency 1 down to 1e-4), plus linear maps of both kinds of label."""
        label_dim = self.config.label_dim
        if self.map_noise is None:
            n = self.config.model_channels // 2
            features = sinusoidal(c_noise, torch.logspace(0, -4, n, dtype=c_noise.dtype, device=c_noise.device))
        else:
            features = self.map_noise(c_noise)
        features = features.to(labels.dtype)
        if self.map_label is not None:
            features = features + self.map_label(labels[:, :label_dim] * label_dim**0.5)
        if self.map_augment is not None:
            features = features + self.map_augment(labels[:, label_dim:])
        return features
