"""Critics for CTM's adversarial stage (Kim et al. 2024): images in, real-or-fake logits out.

    SmallCriticConfig      a convolutional network trained from scratch, for small images and tests
    ProjectedCriticConfig  CTM's: frozen networks that were trained on ImageNet see the image, frozen random layers mix
                           their maps, and one small critic a scale judges the mixtures (Sauer et al. 2021, "Projected
                           GANs converge faster"; 2022, "StyleGAN-XL")

A built critic is called as critic(x), x in [-1, 1], and returns logits [b, k], one a patch and scale: high means real.
With augment=True it sees randomly augmented images, also in eval mode: a critic that overfits is of no use.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.parametrizations import spectral_norm

from onejump.networks.diff_augment import diff_augment
from onejump.networks.timm_features import SIDE, TimmFeatures
from onejump.types import UserError

Maps = Float[Tensor, "b _ _ _"]  # [batch, channels, height, width]
Logits = Float[Tensor, "b _"]


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True) -> nn.Module:
    """A convolution whose weight matrix [c_out, everything else] has spectral norm 1 (Miyato et al. 2018)."""
    return spectral_norm(nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=bias))


@dataclass(frozen=True)
class SmallCriticConfig:
    """A critic of four convolutions for images of 8x8 pixels or more. It judges patches of 20x20 pixels."""

    img_channels: int = 3
    width: int = 32  # channels of the first layer; the deeper ones have 2 and 4 times as many
    augment: bool = True  # see the images through diff_augment

    def build(self) -> "SmallCritic":
        """A freshly initialised critic; it draws from torch's generator."""
        return SmallCritic(self)


class SmallCritic(nn.Module):
    """Build it with SmallCriticConfig(...).build()."""

    def __init__(self, config: SmallCriticConfig):
        super().__init__()
        self.config = config
        c = config.width
        self.layers = nn.Sequential(
            *(conv(config.img_channels, c, 3, padding=1), nn.LeakyReLU(0.2)),
            *(conv(c, 2 * c, 4, stride=2, padding=1), nn.LeakyReLU(0.2)),
            *(conv(2 * c, 4 * c, 4, stride=2, padding=1), nn.LeakyReLU(0.2)),
            conv(4 * c, 1, 3, padding=1),
        )

    def forward(self, x: Maps) -> Logits:
        """The logits of each quarter-resolution pixel. Raises UserError if x has other channels, or is too small."""
        if x.shape[1] != self.config.img_channels or min(x.shape[2:]) < 8:
            raise UserError(
                f"images of shape {tuple(x.shape[1:])}: this critic has img_channels={self.config.img_channels} and "
                "needs 8x8 pixels or more"
            )
        return self.layers(diff_augment(x) if self.config.augment else x).flatten(1)


@dataclass(frozen=True)
class ProjectedCriticConfig:
    """CTM's critic: with its two feature networks (see TimmFeatures) it returns 128 logits an image."""

    features: tuple[TimmFeatures, ...]
    width: int = 64  # channels of the largest mixture
    augment: bool = True  # see the images through diff_augment

    def build(self) -> "ProjectedCritic":
        """A critic whose trained part is fresh. Raises UserError if a feature network cannot be built."""
        return ProjectedCritic([f.build() for f in self.features], self.width, self.augment)


class Projection(nn.Module):
    """Random mixtures of a network's maps: a U-Net's decoder of 1x1 convolutions, read at every scale."""

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        mixed = [width * 2**i for i in range(len(channels))]
        self.across_channels = nn.ModuleList(nn.Conv2d(c, m, 1) for c, m in zip(channels, mixed, strict=True))
        self.across_scales = nn.ModuleList(nn.Conv2d(m, max(m // 2, width), 1) for m in mixed)

    def forward(self, maps: list[Maps]) -> list[Maps]:
        """Mixtures of maps (largest first), each of twice the side of its map and of all smaller maps' content."""
        maps = [mix(m) for mix, m in zip(self.across_channels, maps, strict=True)]
        sides = [[2 * side for side in maps[0].shape[2:]], *(list(m.shape[2:]) for m in maps)]
        out: list[Maps] = []
        for m, mix, side in zip(reversed(maps), reversed(self.across_scales), reversed(sides[:-1]), strict=True):
            m = m + out[-1] if out else m
            out.append(mix(interpolate(m, side, mode="bilinear", align_corners=True)))
        return out[::-1]


def mini_critic(channels: int, side: int, width: int) -> nn.Sequential:
    """Halves maps of this side until they have 8x8 pixels or less, then one logit for each 4x4 of them."""
    halvings = next(n for n in itertools.count() if side >> n <= 8)
    widths = [channels, *(max(width, 8 * width >> n) for n in reversed(range(halvings)))]
    layers: list[nn.Module] = []
    for c_in, c_out in itertools.pairwise(widths):
        norm = nn.BatchNorm2d(c_out, track_running_stats=False)  # they are never read, and one bad image would stay in
        layers += [conv(c_in, c_out, 4, stride=2, padding=1), norm, nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, conv(widths[-1], 1, min(4, side >> halvings), bias=False))


class Branch(nn.Module):
    """One feature network, the projection of its maps, and a mini-critic for each scale. Only the last are trained."""

    def __init__(self, network: nn.Module, width: int, side: int):
        super().__init__()
        self.network = network.eval()
        with torch.no_grad():
            maps = network(torch.zeros(1, 3, side, side))
            self.projection = Projection([m.shape[1] for m in maps], width)
            mixtures = self.projection(maps)
        self.critics = nn.ModuleList(mini_critic(m.shape[1], m.shape[2], width) for m in mixtures)
        self.requires_grad_(True)

    def requires_grad_(self, requires_grad: bool = True) -> "Branch":
        self.network.requires_grad_(False)
        self.projection.requires_grad_(False)
        self.critics.requires_grad_(requires_grad)
        return self

    def train(self, mode: bool = True) -> "Branch":
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, x: Maps) -> Logits:
        mixtures = self.projection(self.network(x))
        return torch.cat([critic(m).flatten(1) for critic, m in zip(self.critics, mixtures, strict=True)], dim=1)


class ProjectedCritic(nn.Module):
    """Judges what frozen feature networks see: one mini-critic for each of their maps.

    features: modules called on images in [0, 1] of `side` pixels; each returns a list of maps, the largest first, each
    half as wide as the one before.

    Train and query it in train mode, with real and generated images in separate calls: as in the published critics, the
    mini-critics' BatchNorm then uses each call's own statistics.

    The feature networks and the random projections are frozen: their weights get no gradient, also after
    requires_grad_(True), and the networks stay in eval mode. Gradients do flow through them to the images. They are
    part of state_dict: the projections are random and must survive a restart, and the feature networks come along
    (about 400 MB for CTM's two). An optimiser given parameters() skips all of them, for want of gradients.
    """

    def __init__(self, features: Sequence[nn.Module], width: int = 64, augment: bool = True, side: int = SIDE):
        super().__init__()
        if not features:
            raise UserError("features: a ProjectedCritic needs one feature network or more")
        self.augment, self.side = augment, side
        self.branches = nn.ModuleList(Branch(network, width, side) for network in features)

    def requires_grad_(self, requires_grad: bool = True) -> "ProjectedCritic":
        for branch in self.branches:
            branch.requires_grad_(requires_grad)
        return self

    def forward(self, x: Maps) -> Logits:
        """The logits of all feature networks, scales and patches. Each feature network sees its own augmentation.

        Raises UserError if the images do not have three channels.
        """
        if x.shape[1] != 3:
            raise UserError(f"images of {x.shape[1]} channels: the feature networks need 3; use SmallCriticConfig")
        return torch.cat([branch(self.seen(x)) for branch in self.branches], dim=1)

    def seen(self, x: Maps) -> Maps:
        """x in [-1, 1] as a feature network sees it: augmented, in [0, 1], side x side pixels."""
        x = (diff_augment(x) if self.augment else x).add(1).div(2)
        return interpolate(x, [self.side, self.side], mode="bilinear", align_corners=False)
