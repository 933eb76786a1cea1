"""A residual MLP: the network for points in the plane, problems whose exact answer is known, and tiny images."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from onejump.networks.layers import (
    Dropout,
    SecondTime,
    check_second_time,
    embeds_second_time,
    label_vectors,
    sinusoidal,
)
from onejump.types import Cond, DropoutKey, Samples, Times, UserError

FREQUENCIES = tuple(2 ** (k / 4) for k in range(17))  # angular, 1 to 16: c_noise = ln(t) / 4 spans about 2.5


MAX_WIDTH, MAX_DEPTH = 65536, 1000  # that a file may ask for


@dataclass(frozen=True)
class MLPConfig:
    """A residual MLP on the flattened sample. `shape` is one sample's: (2,) for points, (1, 8, 8) for images."""

    shape: tuple[int, ...] = (2,)
    label_dim: int = 0  # number of classes, 0 = unconditional
    width: int = 128
    depth: int = 3  # residual blocks
    dropout: float = 0.0
    second_time: SecondTime = "off"  # whether F also reads c_noise_s, and how that embedding starts

    def __post_init__(self) -> None:
        for name, value, most in (("width", self.width, MAX_WIDTH), ("depth", self.depth, MAX_DEPTH)):
            if not 1 <= value <= most:
                raise UserError(f"{name}={value}: 1 to {most} are possible")

    def build(self) -> "MLP":
        """A freshly initialised network, equal to zero everywhere; it draws from torch's generator."""
        return MLP(self)


class MLPBlock(nn.Module):
    """h + W1 dropout(silu(W0 norm(h) + W emb))."""

    def __init__(self, width: int, dropout: Dropout):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear0 = nn.Linear(width, width)
        self.affine = nn.Linear(width, width)
        self.dropout = dropout
        self.linear1 = nn.Linear(width, width)

    def forward(self, h: Float[Tensor, "b n"], emb: Float[Tensor, "b n"], key: DropoutKey) -> Float[Tensor, "b n"]:
        a = silu(self.linear0(self.norm(h)) + self.affine(emb))
        return h + self.linear1(self.dropout(a, key))


class MLP(nn.Module):
    """Build it with MLPConfig(...).build(). Its last layer starts at zero, so the denoiser starts at c_skip x."""

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.config = config
        n, width = math.prod(config.shape), config.width
        self.map_noise = nn.Linear(2 * len(FREQUENCIES), width)
        self.map_label = nn.Linear(config.label_dim, width, bias=False) if config.label_dim else None
        self.first = nn.Linear(n, width)
        self.blocks = nn.ModuleList(MLPBlock(width, Dropout(config.dropout, i)) for i in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, n)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.map_noise_s = nn.Linear(2 * len(FREQUENCIES), width) if embeds_second_time(config.second_time) else None
        if self.map_noise_s is not None and config.second_time == "zero":
            nn.init.zeros_(self.map_noise_s.weight)
            nn.init.zeros_(self.map_noise_s.bias)

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight of the last layer."""
        return self.get_parameter("last.weight")

    def forward(
        self, x: Samples, c_noise: Times, c_noise_s: Times | None = None, cond: Cond = None, key: DropoutKey = None
    ) -> Samples:
        """F(x; c_noise, c_noise_s, cond). cond: int64 [b] classes or float [b, label_dim]; key: see keyed_dropout.

        Raises UserError if the samples, the labels or the number of times do not fit the configuration.
        """
        check_second_time(c_noise_s, self.config.second_time, "MLP")
        if x.shape[1:] != self.config.shape:
            raise UserError(f"samples of shape {tuple(x.shape[1:])}: this network has shape={self.config.shape}")
        labels = label_vectors(cond, self.config.label_dim, x)
        w = torch.tensor(FREQUENCIES, dtype=c_noise.dtype, device=c_noise.device)
        emb = self.map_noise(sinusoidal(c_noise, w).to(x.dtype))
        if self.map_label is not None:
            emb = emb + self.map_label(labels)
        if self.map_noise_s is not None and c_noise_s is not None:
            emb = emb + self.map_noise_s(sinusoidal(c_noise_s, w).to(x.dtype))
        emb, h = silu(emb), self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h, emb, key)
        return self.last(silu(self.norm(h))).view(x.shape)
