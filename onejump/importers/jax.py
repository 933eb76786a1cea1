"""OpenAI's JAX consistency models of CIFAR-10: flax checkpoints of NCSN++, which is our SongUNet(variant="ncsnpp").

Flax numbers the modules of each class in the order of their construction, which is the order of our encoder and
decoder; its attention blocks are modules of their own. Convolutions are HWIO, linear maps [in, out]. Neither the
resolution nor the level with attention is in the file: they are taken as published, 8x8 at the lowest level and
attention at the second.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from onejump.importers.flax_msgpack import Array, arrays_in, read_msgpack
from onejump.importers.imported import Imported, Made, fitting, precision, understood
from onejump.importers.inert import printable
from onejump.importers.torch_file import mapped
from onejump.importers.use import Given, Use, decided, open_use, use_of
from onejump.networks.song_unet import SongUNetConfig
from onejump.networks.unet_parts import MAX_BLOCKS, MAX_LEVELS
from onejump.precond import EDM
from onejump.times import karras_grid
from onejump.types import UserError

BLOCK = {"GroupNorm_0": "norm0", "Conv_0": "conv0", "Dense_0": "affine", "GroupNorm_1": "norm1", "Conv_1": "conv1"}
LOWEST = 8  # side of the maps at the lowest level
# The published second step starts at number 11 of 18 times: editing_multistep_sampling.ipynb of this repository.
SECOND = round(float(karras_grid(18).flip(0)[11]), 4)
REASONS = {
    "params": "not the average: params_ema is",
    "target_params": "of the target network",
    "opt_state": "of the optimizer",
}


def read_jax(path: Path, given: Given) -> Imported:
    """Raises UserError if it is no checkpoint of this code, or a damaged one."""
    given.only(path, "flax", "method", "t_min")
    try:
        content = read_msgpack(mapped(path))
        arrays, dropped = arrays_and_dropped(content) if isinstance(content, dict) else ({}, {})
    except ValueError as error:
        raise UserError(f"{path}: not a readable flax checkpoint ({error}); download it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("params_ema"), dict):
        raise UserError(
            f"{path}: a flax checkpoint without params_ema; only those of consistency_models_cifar10 are known"
        )
    network = network_of(path, arrays)
    rate = number_in(content.get("ema_rate"))
    average = {} if rate is not None else {"average": "params_ema, of a length that is not in the file"}
    return understood(
        kind="flax checkpoint of NCSN++ (consistency_models_cifar10)",
        network=network,
        weights=fitting(path, ours_from_flax(path, arrays, network), network),
        dropped=dropped,
        use=use_in(path, content, network, given),
        precond=EDM(),
        ema=f"constant {rate:g}" if rate is not None else "",
        facts=average | precision(array.of(array.data.to("meta")) for array in arrays.values()) | assumed(network),
    )


def arrays_and_dropped(content: Mapping[str, object]) -> tuple[dict[str, Array], dict[str, str]]:
    """(the average's arrays, what is dropped: name -> why). Raises ValueError for paths that are none."""
    parts = {part: REASONS.get(part, "not of the network") for part in content if part != "params_ema"}
    dropped = {name: reason for part, reason in parts.items() for name in arrays_in(content[part], part)}
    return arrays_in(content.get("params_ema")), dropped


def number_in(value: object) -> float | None:
    """A number as itself, or as the array without axes that flax makes of it."""
    if isinstance(value, Array) and value.shape == () and not value.data.is_meta:
        value = value.of(value.data.clone()).item()
    return value if isinstance(value, float) and math.isfinite(value) else None


def assumed(network: SongUNetConfig) -> dict[str, str]:
    """What no checkpoint holds."""
    size, side = network.img_resolution, network.attn_resolutions[0]
    return {
        "not in the file": f"resolution ({size}x{size}), where attention is ({side}x{side}), both as published, and "
        "dropout (set to 0)"
    }


def use_in(path: Path, content: Mapping[str, object], network: SongUNetConfig, given: Given) -> Use:
    known = "cm" if "target_params" in content else None
    method, how = decided(path, given, known, "it holds the target network of consistency models")
    if method is None:
        return open_use(path, given, "edm (the teacher) or cm")
    return use_of(method, how, network, EDM(), given, mid=(SECOND,) if method == "cm" else None)


def network_of(path: Path, arrays: Mapping[str, Array]) -> SongUNetConfig:
    """From the numbers of modules of each class: see blocks_of."""

    def number(kind: str) -> int:
        return len({name.split("/")[0] for name in arrays if name.startswith(f"{kind}_")})

    def side(name: str, axis: int) -> int:
        if name not in arrays or len(arrays[name].shape) <= axis:
            raise UserError(f"{path}: not a whole NCSN++ with a residual encoder, params_ema/{name} is missing")
        return arrays[name].shape[axis]

    levels, blocks, attentions = (number(kind) for kind in ("Downsample", "ResnetBlockBigGANpp", "AttnBlockpp"))
    levels += 1
    n = blocks // levels // 2 - 1
    if blocks != levels * (2 * n + 3) or not 1 < levels <= MAX_LEVELS or not 0 < n <= MAX_BLOCKS or attentions != n + 2:
        raise UserError(
            f"{path}: {blocks} blocks, {attentions} of attention, on {levels} levels are not an NCSN++ with "
            "attention at one level"
        )
    channels, images = side("Conv_0/kernel", 3), side("Conv_0/kernel", 2)
    widths = [side(f"ResnetBlockBigGANpp_{level * (n + 1)}/Conv_1/kernel", 3) for level in range(levels)]
    if not channels or any(width % channels for width in widths):
        raise UserError(f"{path}: levels of {widths} channels, which are no multiples of {channels}")
    resolution = LOWEST << (levels - 1)
    mult = tuple(width // channels for width in widths)
    return SongUNetConfig(resolution, images, 0, channels, mult, n, (resolution // 2,), dropout=0.0, variant="ncsnpp")


def blocks_of(network: SongUNetConfig) -> Iterator[tuple[str, bool]]:
    """(our name, has attention) of every block in the order of construction: levels * (2 num_blocks + 3) of them."""
    sides, n = network.resolutions, network.num_blocks
    for s in sides:
        if s != sides[0]:
            yield f"enc.{s}x{s}_down", False
        yield from ((f"enc.{s}x{s}_block{i}", s in network.attn_resolutions) for i in range(n))
    bottom = f"dec.{sides[-1]}x{sides[-1]}"
    yield from ((f"{bottom}_in0", True), (f"{bottom}_in1", False))
    for s in reversed(sides):
        if s != sides[-1]:
            yield f"dec.{s}x{s}_up", False
        yield from ((f"dec.{s}x{s}_block{i}", i == n and s in network.attn_resolutions) for i in range(n + 1))


def places_in(network: SongUNetConfig) -> dict[str, str]:
    """Path of each flax module -> our module; the projections of an attention block get the suffixes 0, 1, 2."""
    sides = network.resolutions
    first, last = f"enc.{sides[0]}x{sides[0]}_conv", f"dec.{sides[0]}x{sides[0]}_aux"
    places = {"Conv_0": first, "Conv_1": f"{last}_conv", "GroupNorm_0": f"{last}_norm"}
    places |= {"Dense_0": "map_layer0", "Dense_1": "map_layer1", "GaussianFourierProjection_0": "map_noise"}
    places |= {f"Downsample_{i}/Conv2d_0": f"enc.{s}x{s}_aux_residual" for i, s in enumerate(sides[1:])}
    attentions = count()
    for i, (name, attention) in enumerate(blocks_of(network)):
        theirs = f"ResnetBlockBigGANpp_{i}"
        places |= {f"{theirs}/{part}": f"{name}.{ours}" for part, ours in BLOCK.items()}
        places[f"{theirs}/Conv_2"] = f"{name}.skip"
        if attention:
            theirs = f"AttnBlockpp_{next(attentions)}"
            places |= {f"{theirs}/GroupNorm_0": f"{name}.norm2", f"{theirs}/NIN_3": f"{name}.proj"}
            places |= {f"{theirs}/NIN_{part}": f"{name}.qkv.{part}" for part in range(3)}
    return places


def ours_from_flax(path: Path, arrays: Mapping[str, Array], network: SongUNetConfig) -> dict[str, Tensor | Made]:
    """Raises UserError for arrays that have no place."""
    places, ours = places_in(network), {}
    for name, array in arrays.items():
        module, _, leaf = name.rpartition("/")
        if module not in places:
            raise UserError(f"{path}: params_ema/{printable(name)} has no place in our SongUNet")
        name_of_ours = f"{places[module]}.{our_leaf(module, leaf)}"
        if name_of_ours in ours:
            raise UserError(f"{path}: params_ema/{printable(name)} is there under two names")
        ours[name_of_ours] = (leaf, array)
    made: dict[str, Tensor | Made] = {}
    for name, (leaf, array) in ours.items():
        *head, part, kind = name.split(".")
        if part == "0":  # rows of qkv: (q, k, v) of channel 0, then of channel 1, ...
            parts = [
                ours[".".join((*head, str(i), kind))][1] for i in range(3) if ".".join((*head, str(i), kind)) in ours
            ]
            if len(parts) < 3:
                raise UserError(f"{path}: the q, k or v of {'.'.join(head)} is missing")
            made[".".join((*head, kind))] = Made(tuple(p.data for p in parts), Arranged(parts, leaf))
        elif part not in ("1", "2"):
            made[name] = Made((array.data,), Arranged([array], leaf))
    for s in network.resolutions[1:]:
        resampled = (f"enc.{s}x{s}_down", f"dec.{2 * s}x{2 * s}_up")
        layers = [f"{block}.{layer}" for block in resampled for layer in ("conv0", "skip")]
        made |= {f"{layer}.resample_filter": network.filter for layer in (*layers, f"enc.{s}x{s}_aux_residual")}
    return made


def our_leaf(module: str, leaf: str) -> str:
    if module.startswith("GaussianFourierProjection"):
        return "freqs"
    return "bias" if leaf in ("bias", "b") else "weight"


class Arranged:
    """Bytes of one array, or of q, k and v, as one tensor in torch's layout."""

    def __init__(self, arrays: list[Array], leaf: str):
        self.arrays, self.leaf = arrays, leaf

    def __call__(self, *data: Tensor) -> Tensor:
        parts = [in_our_layout(array.of(raw), self.leaf) for array, raw in zip(self.arrays, data, strict=True)]
        return torch.stack(parts, 1).flatten(0, 1) if len(parts) > 1 else parts[0]


def in_our_layout(w: Tensor, leaf: str) -> Tensor:
    if w.ndim == 4:
        return w.permute(3, 2, 0, 1)
    if w.ndim == 2:
        return w.T[..., None, None] if leaf == "W" else w.T
    return w
