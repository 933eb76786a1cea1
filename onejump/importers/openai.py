"""OpenAI's U-Net as a bare state dict: its consistency models' teachers and students, and CTM's on ImageNet.

It is our ADMUNet with other names, and with the rows of qkv in another order. Neither the resolution nor the channels
of an attention head are in the file: every preset ends at 8x8, and all that is published has 64 channels a head.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from onejump.importers.imported import Imported, Made, fitting, placed, precision, understood
from onejump.importers.published import average_of, second_time
from onejump.importers.use import Given, Use, decided, open_use, use_of
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.unet_parts import MAX_LEVELS, smoothing
from onejump.precond import EDM
from onejump.types import UserError

# leaves of a residual block, of an attention block, and of a plain convolution that resamples
LEAVES = {
    **{"in_layers.0": "norm0", "in_layers.2": "conv0", "emb_layers.1": "affine", "emb_layers_s.1": "affine_s"},
    **{"out_layers.0": "norm1", "out_layers.3": "conv1", "skip_connection": "skip", "op": "conv", "conv": "conv"},
    **{"norm": "norm2", "qkv": "qkv", "proj_out": "proj"},
}
LOWEST = 8  # side of the maps at the lowest level


def is_openai(names: Mapping[str, object]) -> bool:
    return "input_blocks.0.0.weight" in names and "out.2.weight" in names


def read_openai(path: Path, tensors: Mapping[str, Tensor], given: Given) -> Imported:
    network = Shapes(path, tensors).network(given.head_channels or 64)
    two_times = network.second_time != "off"
    given.only(path, "OpenAI's U-Net", "method", "qkv", "head_channels", "t_min")
    places = places_in(network)
    ours = placed(path, tensors, network, lambda name: ours_from_openai(name, places))
    made: dict[str, Tensor | Made] = {
        name: changed(path, name, tensor, network, given) for name, tensor in ours.items()
    }
    if network.resample == "block":
        sides = network.resolutions
        for block in (*(f"enc.{s}x{s}_down" for s in sides[1:]), *(f"dec.{s}x{s}_up" for s in sides[:-1])):
            made |= {f"{block}.{layer}.resample_filter": smoothing(1, 1) for layer in ("conv0", "skip")}
    ema, average = average_of(path)
    return understood(
        kind="OpenAI U-Net with CTM's second time" if two_times else "OpenAI U-Net",
        network=network,
        weights=fitting(path, made, network),
        dropped={},
        use=use_in(path, network, given),
        precond=EDM(),
        ema=ema,
        facts=average | precision(tensors.values()) | assumed(network, given),
    )


def assumed(network: ADMUNetConfig, given: Given) -> dict[str, str]:
    """What no file of this kind holds."""
    size, levels = network.img_resolution, len(network.channel_mult)
    return {
        "not in the file": f"resolution ({size}x{size}, as the {levels} levels of every preset), channels of an "
        f"attention head ({network.head_channels}: --head-channels), dropout (set to 0)",
        "qkv": f"as --qkv {given.qkv} says" if given.qkv else "in blocks (4-d)",
    }


class Shapes:
    """What the shapes of OpenAI's tensors say of the network."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]):
        self.path, self.tensors = path, tensors

    def size(self, name: str, axis: int) -> int:
        if name not in self.tensors or self.tensors[name].ndim <= axis:
            raise UserError(f"{self.path}: not a whole OpenAI U-Net, {name} is missing")
        return self.tensors[name].shape[axis]

    def network(self, head_channels: int) -> ADMUNetConfig:
        channels, images = (self.size("input_blocks.0.0.weight", axis) for axis in (0, 1))
        if self.size("out.2.weight", 0) != images:
            out = self.size("out.2.weight", 0)
            raise UserError(
                f"{self.path}: the network has {out} channels out for {images} in; a variance beside the mean is of "
                "guided diffusion's models, which are not preconditioned as consistency models are"
            )
        blocks, levels = self.depth()
        first = [1 + level * (blocks + 1) for level in range(levels)]  # block of each level
        widths = [self.size(f"input_blocks.{i}.0.out_layers.3.weight", 0) for i in first]
        if not channels or any(width % channels or not width for width in widths):
            raise UserError(f"{self.path}: levels of {widths} channels, which are no multiples of {channels}")
        resolution = LOWEST << (levels - 1)
        modulation = self.size("input_blocks.1.0.emb_layers.1.weight", 0)
        return ADMUNetConfig(
            resolution,
            images,
            self.size("label_emb.weight", 0) if "label_emb.weight" in self.tensors else 0,
            channels,
            tuple(width // channels for width in widths),
            blocks,
            tuple(resolution >> i for i, n in enumerate(first) if f"input_blocks.{n}.1.qkv.weight" in self.tensors),
            dropout=0.0,
            scale_shift=modulation == 2 * widths[0],
            second_time="random" if "time_embed_s.0.weight" in self.tensors else "off",
            head_channels=head_channels,
            min_group=1,
            noise_scale=1000.0,
            label_at_s=False,
            resample="conv" if f"input_blocks.{blocks + 1}.0.op.weight" in self.tensors else "block",
        )

    def depth(self) -> tuple[int, int]:
        """(blocks a level, levels): the decoder resamples after each level's last block but the last level's."""
        names = {name.split(".")[1] for name in self.tensors if name.startswith("output_blocks.")}
        n = len(names)
        for i in range(n):
            ups = (f"output_blocks.{i}.{part}.{kind}.weight" for part in (1, 2) for kind in ("in_layers.0", "conv"))
            if any(up in self.tensors for up in ups):
                break
        if not n or i == 0 or n % (i + 1) or n // (i + 1) > MAX_LEVELS:
            raise UserError(f"{self.path}: not a whole OpenAI U-Net, its {n} output blocks are no whole levels")
        return i, n // (i + 1)


def places_in(network: ADMUNetConfig) -> dict[str, str]:
    """Name of each of OpenAI's modules -> ours. Their level ends with the resampling with which ours begins."""
    sides, n = network.resolutions, network.num_blocks
    places = {"time_embed.0": "map_layer0", "time_embed.2": "map_layer1", "out.0": "out_norm", "out.2": "out_conv"}
    places |= {"time_embed_s.0": "map_layer0_s", "time_embed_s.2": "map_layer1_s", "label_emb": "map_label"}
    encoder = [f"{s}x{s}_{part}" for s in sides for part in ("down", *(f"block{i}" for i in range(n)))]
    encoder[0] = f"{sides[0]}x{sides[0]}_conv"
    places |= {f"input_blocks.{i}.{part}": f"enc.{name}" for i, name in enumerate(encoder) for part in (0, 1)}
    bottom = f"dec.{sides[-1]}x{sides[-1]}"
    places |= {"middle_block.0": f"{bottom}_in0", "middle_block.1": f"{bottom}_in0", "middle_block.2": f"{bottom}_in1"}
    for i, (s, block) in enumerate((s, block) for s in reversed(sides) for block in range(n + 1)):
        ours = f"dec.{s}x{s}_block{block}"
        places |= {f"output_blocks.{i}.0": ours, f"output_blocks.{i}.1": ours}
        if block == n and s != sides[0]:
            last = 2 if s in network.attn_resolutions else 1  # behind the attention, where there is one
            places[f"output_blocks.{i}.{last}"] = f"dec.{2 * s}x{2 * s}_up"
    return places


def ours_from_openai(name: str, places: Mapping[str, str]) -> str | None:
    """Our name of one of OpenAI's parameters, None if the network has no such part."""
    *module, leaf = name.split(".")
    for n in range(len(module), 0, -1):
        place, inner = ".".join(module[:n]), ".".join(module[n:])
        if place in places and (not inner or inner in LEAVES):
            return ".".join(filter(None, (places[place], LEAVES.get(inner), leaf)))
    return None


def changed(path: Path, name: str, tensor: Tensor, network: ADMUNetConfig, given: Given) -> Tensor | Made:
    """The tensor as our network has it."""
    if name == "map_label.weight" and tensor.ndim == 2:
        return Made((tensor,), lambda w: w.T)
    if name.endswith(("qkv.weight", "qkv.bias")):
        order = order_of_qkv(path, tensor, given) if name.endswith("weight") else given.qkv or "block"
        rows = tensor.shape[0] if tensor.ndim else 0
        if not rows or rows % 3 or (order == "heads" and rows // 3 % network.head_channels):
            raise UserError(f"{path}: {name} has {rows} rows, which are not q, k and v of whole heads")
        return Made((tensor,), lambda qkv: image_like(interleaved(qkv, order, network.head_channels)))
    return Made((tensor,), image_like) if name.endswith("proj.weight") else tensor


def order_of_qkv(path: Path, weight: Tensor, given: Given) -> str:
    """4-d weights are in blocks; 3-d ones, of guided diffusion, in either order, and nothing in them tells which."""
    if weight.ndim == 4:
        if given.qkv == "heads":
            raise UserError(f"--qkv heads: the qkv of {path} are 4-d, which is always in blocks; leave the option out")
        return "block"
    if given.qkv is None:
        raise UserError(
            f"{path}: its qkv are 3-d, as guided diffusion's, whose rows have one of two orders that the file does not "
            "tell: give --qkv heads (its default) or --qkv block (use_new_attention_order, its 64x64 model)"
        )
    return given.qkv


def interleaved(rows: Tensor, order: str, head_channels: int) -> Tensor:
    """qkv as [all q, all k, all v], or of each head [q, k, v] -> (q, k, v) of channel 0, of channel 1, ..."""
    groups = (1, 3, len(rows) // 3) if order == "block" else (len(rows) // 3 // head_channels, 3, head_channels)
    return rows.reshape(*groups, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def image_like(weight: Tensor) -> Tensor:
    """A 1-d convolution's weight as a 2-d one's."""
    return weight[..., None] if weight.ndim == 3 else weight


def use_in(path: Path, network: ADMUNetConfig, given: Given) -> Use:
    if network.second_time != "off":
        method, how = decided(path, given, "ctm", "its network reads a second time")
        return use_of(str(method), how, network, EDM(), given)
    method, how = decided(path, given, None)
    if method is None:
        return open_use(path, given, "edm (a teacher) or cm")
    mid = second_time(path.stem) if method == "cm" else None
    use = use_of(method, how, network, EDM(), given, mid=((mid,) if mid else ()) if method == "cm" else None)
    return replace(use, facts=use.facts | {"second time": f"that of {path.stem} as published"}) if mid else use
