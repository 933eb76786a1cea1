"""The fields of diffusers' UNet2DModel, where it is an ADM: from our configuration and back."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from onejump.networks.adm_unet import ADMUNetConfig, Block, Resampling, attention_heads
from onejump.networks.diffusers_weights import NOISE_SCALE, not_refitted
from onejump.networks.layers import empty_network
from onejump.networks.unet_parts import MAX_BLOCKS, MAX_CHANNELS, MAX_LEVELS
from onejump.types import UserError

PIPELINE, SCHEDULER = "ConsistencyModelPipeline", "CMStochasticIterativeScheduler"  # diffusers' classes, and ours:
OUR_UNET, OUR_PIPELINE = "OneJumpUNet", "OneJumpPipeline"
OURS, ORIGINAL = "onejump.json", "onejump.safetensors"  # files of an exported folder that diffusers does not read
STORED = "_onejump"  # our field of the scheduler: the model's sampler and t'
GROUPS = 32  # of every normalisation

FIXED: dict[str, Any] = {  # what ADM needs of UNet2DModel's fields, most of them its defaults
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_num_groups": GROUPS,
    "norm_eps": 1e-5,
    "add_attention": True,
    "class_embed_type": None,
    "num_train_timesteps": None,
}
FREE: dict[str, Any] = {  # the others, with its defaults
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_dim": None,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
}
ATTENTION = ("AttnDownBlock2D", "AttnUpBlock2D")
PLAIN: dict[Resampling, tuple[str, str]] = {
    "block": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    "conv": ("DownBlock2D", "UpBlock2D"),
}
KIND: dict[Resampling, str] = {"block": "resnet", "conv": "conv"}  # how levels with attention are resampled


def not_a_unet(config: ADMUNetConfig) -> str:
    """Why UNet2DModel cannot be this network; "" if it can."""
    modules = list(empty_network(config).modules())
    groups = {m.num_groups for m in modules if isinstance(m, nn.GroupNorm)}
    heads = {m.qkv.in_channels // m.heads for m in modules if isinstance(m, Block) and m.heads}
    if config.second_time != "off":
        return f"second_time={config.second_time}"
    if config.augment_dim:
        return f"augment_dim={config.augment_dim}"
    if groups != {GROUPS}:
        return f"normalisation in {', '.join(map(str, sorted(groups)))} groups, not in {GROUPS} everywhere"
    if len(heads) > 1:
        return f"attention heads of {', '.join(map(str, sorted(heads)))} channels, not of one size"
    return not_refitted(config)


def unet_config(config: ADMUNetConfig) -> dict[str, Any]:
    """UNet2DModel's fields for this network. Dropout that ends at some resolution has none, and is left out."""
    attention = [has for _, _, has in config.levels]
    down, up = ([ATTENTION[i] if has else PLAIN[config.resample][i] for has in attention] for i in (0, 1))
    lowest = config.levels[-1][1]
    return FIXED | {
        "sample_size": config.img_resolution,
        "in_channels": config.img_channels,
        "out_channels": config.img_channels,
        "time_embedding_dim": None,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "block_out_channels": [width for _, width, _ in config.levels],
        "layers_per_block": config.num_blocks,
        "downsample_type": KIND[config.resample],
        "upsample_type": KIND[config.resample],
        "dropout": 0.0 if config.dropout_resolution else config.dropout,
        "attention_head_dim": lowest // attention_heads(lowest, config.head_channels),
        "attn_norm_num_groups": GROUPS,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "num_class_embeds": config.label_dim or None,
    }


def adm_config(given: Mapping[str, Any]) -> ADMUNetConfig:
    """Our configuration of a UNet2DModel with these fields. Raises UserError for what is no ADM, by field and value."""
    fields = Fields(FIXED | FREE | {name: value for name, value in given.items() if not name.startswith("_")})
    for name, value in fields.values.items():
        fields.need(name, name in FIXED or name in FREE, "no field of UNet2DModel that is known here")
        fields.need(name, name not in FIXED or value == FIXED[name], f"OpenAI's ADM is read, with {FIXED.get(name)!r}")
    widths = fields.widths()
    attention, resample = fields.blocks(len(widths))
    shift, groups = fields.values["resnet_time_scale_shift"], fields.values["attn_norm_num_groups"]
    fields.need("resnet_time_scale_shift", shift in ("scale_shift", "default"), "scale_shift or default is read")
    fields.need(
        "attn_norm_num_groups",
        groups == GROUPS or groups is None and shift == "default",
        f"{GROUPS} is read; without it the middle's attention is not normalised, as in OpenAI's first uploads",
    )
    dropout = fields.values["dropout"]
    fields.need("dropout", isinstance(dropout, int | float) and 0 <= dropout <= 1, "a probability is needed")
    side, channels = fields.whole("sample_size"), fields.whole("in_channels")
    fields.need("out_channels", fields.whole("out_channels") == channels, f"as many as in_channels={channels} are read")
    return ADMUNetConfig(
        img_resolution=side,
        img_channels=channels,
        label_dim=0 if fields.values["num_class_embeds"] is None else fields.whole("num_class_embeds"),
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_blocks=fields.whole("layers_per_block", MAX_BLOCKS),
        attn_resolutions=tuple(side >> level for level, has in enumerate(attention) if has),
        dropout=float(dropout),
        scale_shift=shift == "scale_shift",
        head_channels=fields.head({w for w, has in zip(widths, attention, strict=True) if has} | {widths[-1]}),
        min_group=1,
        noise_scale=NOISE_SCALE,
        resample=resample,
    )


class Fields:
    """The fields of a UNet2DModel that was not made here."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def need(self, name: str, ok: bool, why: str) -> None:
        if not ok:
            raise UserError(f"{name}={repr(self.values[name])[:200]}: {why}")

    def whole(self, name: str, at_most: int = MAX_CHANNELS) -> int:
        value = self.values[name]
        self.need(name, type(value) is int and 0 < value <= at_most, f"a whole number from 1 to {at_most} is needed")
        return value

    def widths(self) -> list[int]:
        """Channels of the levels: multiples of the first, and of the number of groups."""
        name = "block_out_channels"
        widths = self.values[name]
        counted = isinstance(widths, list | tuple) and 0 < len(widths) <= MAX_LEVELS
        counted = counted and all(type(width) is int and 0 < width <= MAX_CHANNELS for width in widths)
        self.need(name, counted, f"whole numbers for 1 to {MAX_LEVELS} levels are needed")
        c = widths[0]
        fits = all(width % c == width % GROUPS == 0 for width in widths)
        self.need(name, fits, f"multiples of the first and of {GROUPS} are read")
        self.need("time_embedding_dim", self.values["time_embedding_dim"] in (None, 4 * c), f"{4 * c} is read")
        return list(widths)

    def blocks(self, levels: int) -> tuple[list[bool], Resampling]:
        """Which levels have attention, and how all of them are resampled."""
        names = "down_block_types", "up_block_types"
        for name, known in zip(names, zip(ATTENTION, *PLAIN.values(), strict=True), strict=True):
            types = self.values[name]
            right = isinstance(types, list | tuple) and len(types) == levels and all(kind in known for kind in types)
            self.need(name, right, f"one of {', '.join(known)} for each of block_out_channels is read")
        down, up = (list(self.values[name]) for name in names)
        up.reverse()
        attention = [kind == ATTENTION[0] for kind in down]
        self.need(names[1], [kind == ATTENTION[1] for kind in up] == attention, "attention where the way down has it")
        kinds = {self._resampled(kind, "downsample_type") for kind in down[:-1]}
        kinds |= {self._resampled(kind, "upsample_type") for kind in up[1:]}
        ways: list[Resampling] = [way for way, kind in KIND.items() if kinds <= {kind}]
        self.need(names[0], bool(ways), f"one way of resampling is read, here they are {', '.join(sorted(kinds))}")
        return attention, ways[0]

    def _resampled(self, kind: str, name: str) -> str:
        """The way of resampling of a level with blocks of this kind."""
        plain = {other: KIND[way] for way, pair in PLAIN.items() for other in pair}
        return plain[kind] if kind in plain else str(self.values[name])

    def head(self, widths: set[int]) -> int:
        """Channels of an attention head, where levels of these widths have attention."""
        name = "attention_head_dim"
        if self.values[name] is None:  # one head everywhere
            return max(widths)
        head = self.whole(name)
        self.need(name, all(width % head == 0 for width in widths), f"a divisor of {sorted(widths)} is needed")
        return head
