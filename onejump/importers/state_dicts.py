"""Bare state dicts of SongUNet, ADM and EDM2 under EDM's names, CTM's too: sizes are read off names and shapes."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from onejump.importers.edm import LOGVAR
from onejump.importers.imported import Imported, check_filters, first, fitting, precision, understood
from onejump.importers.published import average_of
from onejump.importers.use import Given, Known, Use, decided, open_use, use_of
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.edm2_unet import EDM2UNetConfig
from onejump.networks.layers import SecondTime
from onejump.networks.song_unet import SongUNetConfig
from onejump.networks.unet_parts import MAX_LEVELS
from onejump.precond import EDM
from onejump.types import UserError

PREFIXES = ("model.", "unet.", "")
FIRST = ("map_layer0.weight", "out_gain")  # a tensor that every one of these networks has


def is_state_dict(names: Mapping[str, object]) -> bool:
    return any(prefix + name in names for prefix in PREFIXES for name in FIRST)


def read_state_dict(path: Path, tensors: Mapping[str, Tensor], given: Given) -> Imported:
    """Raises UserError if it is no whole state dict of one of our networks."""
    prefix = next(prefix for prefix in PREFIXES if any(prefix + name in tensors for name in FIRST))
    dropped = {name: LOGVAR for name in tensors if name.startswith("logvar_")}
    strangers = [name for name in tensors if not name.startswith(prefix) and name not in dropped]
    if strangers:
        raise UserError(f"{path}: {first(strangers)} beside names that begin with {prefix!r}; our network has no such")
    ours = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name not in dropped}
    network = Shapes(path, ours).network(given.head_channels or 64)
    kind = f"state dict of {type(network).__name__.removesuffix('Config')}"
    heads = () if isinstance(network, SongUNetConfig) else ("head_channels",)
    given.only(path, kind.removeprefix("state dict of "), "method", "t_min", *heads)
    check_filters(path, ours, network)
    ema, average = average_of(path)
    return understood(
        kind=kind + ", CTM's" * (network.second_time != "off"),
        network=network,
        weights=fitting(path, ours, network),
        dropped=dropped,
        use=use_in(path, network, given, bool(dropped)),
        precond=EDM(),
        ema=ema,
        facts=average | precision(tensors.values()) | assumed(network),
    )


def assumed(network: Known) -> dict[str, str]:
    """What no state dict holds."""
    if isinstance(network, SongUNetConfig):
        heads = ""
    else:
        n = network.channels_per_head if isinstance(network, EDM2UNetConfig) else network.head_channels
        heads = f", channels of an attention head ({n}: --head-channels)"
    return {"not in the file": f"dropout (set to 0), sigma_data (0.5){heads}"}


def use_in(path: Path, network: Known, given: Given, logvar: bool) -> Use:
    """A second time is CTM's, EDM2's logvar head a diffusion model's; all else must be said."""
    content, because = None, ""
    if network.second_time != "off":
        content, because = "ctm", "its network reads a second time"
    elif logvar:
        content, because = "edm", "EDM2's logvar is there"
    method, how = decided(path, given, content, because)
    if method is None:
        return open_use(path, given, "edm, ect, tcm or ict")
    return use_of(method, how, network, EDM(), given)


class Shapes:
    """What the names and shapes of a state dict say of its network."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]):
        self.path, self.tensors = path, tensors
        found = (re.fullmatch(r"enc\.(\d{1,5})x\1_\w+\..+", name) for name in tensors)
        self.sides = sorted({int(match[1]) for match in found if match}, reverse=True)
        if not 0 < len(self.sides) <= MAX_LEVELS:
            raise self.refusal("no levels such as enc.32x32_conv")
        self.top = f"enc.{self.sides[0]}x{self.sides[0]}"
        if any(side != self.sides[0] >> level for level, side in enumerate(self.sides)):
            raise self.refusal(f"levels of {self.sides}")

    def refusal(self, why: str) -> UserError:
        return UserError(f"{self.path}: not a whole state dict of SongUNet, ADM or EDM2 ({why})")

    def size(self, name: str, axis: int) -> int:
        if name not in self.tensors or self.tensors[name].ndim <= axis:
            raise self.refusal(f"{name} is missing")
        return self.tensors[name].shape[axis]

    def maybe(self, name: str) -> int:
        """The number of columns of a matrix, 0 if there is none."""
        return self.size(name, 1) if name in self.tensors else 0

    def network(self, head_channels: int) -> Known:
        blocks = {name.split(".")[1] for name in self.tensors if name.startswith(f"{self.top}_block")}
        tops = [f"enc.{side}x{side}_block0" for side in self.sides]
        if "out_gain" in self.tensors:
            return self.edm2(len(blocks), tops, head_channels)
        channels, images = (self.size(f"{self.top}_conv.weight", axis) for axis in (0, 1))
        second_time: SecondTime = "random" if "map_layer0_s.weight" in self.tensors else "off"
        mult = self.multiples([f"{block}.conv1.weight" for block in tops], channels)
        attending = self.attending(f"{block}.qkv.weight" for block in tops)
        shape = (self.sides[0], images, self.maybe("map_label.weight"), channels, mult, len(blocks), attending)
        augment = self.maybe("map_augment.weight")
        if "out_conv.weight" in self.tensors:
            scale_shift = self.size(f"{tops[0]}.affine.weight", 0) == 2 * channels * mult[0]
            return ADMUNetConfig(
                *shape,
                dropout=0.0,
                scale_shift=scale_shift,
                second_time=second_time,
                augment_dim=augment,
                head_channels=head_channels,
            )
        return SongUNetConfig(
            *shape,
            dropout=0.0,
            second_time=second_time,
            variant="ncsnpp" if "map_noise.freqs" in self.tensors else "ddpmpp",
            augment_dim=augment,
        )

    def edm2(self, blocks: int, tops: list[str], head_channels: int) -> EDM2UNetConfig:
        channels = self.size(f"{self.top}_conv.weight", 0)
        return EDM2UNetConfig(
            self.sides[0],
            self.size(f"{self.top}_conv.weight", 1) - 1,  # and a map of ones
            self.maybe("emb_label.weight"),
            channels,
            self.multiples([f"{block}.conv_res1.weight" for block in tops], channels),
            blocks,
            self.attending(f"{block}.attn_qkv.weight" for block in tops),
            head_channels,
        )

    def multiples(self, weights: list[str], channels: int) -> tuple[int, ...]:
        widths = [self.size(weight, 0) for weight in weights]
        if not channels or any(width % channels or not width for width in widths):
            raise self.refusal(f"levels of {widths} channels, no multiples of {channels}")
        return tuple(width // channels for width in widths)

    def attending(self, weights: Iterable[str]) -> tuple[int, ...]:
        return tuple(side for side, weight in zip(self.sides, weights, strict=True) if weight in self.tensors)
