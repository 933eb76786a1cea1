"""diffusers' UNet2DConditionModel, the network of Stable Diffusion 1 and 2, called as our networks are."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from onejump.networks.layers import SecondTime, check_second_time
from onejump.networks.lora import add_lora
from onejump.types import Cond, DropoutKey, Samples, Times, UserError

# What the configuration file may say besides what TextUNetConfig has a field for: Stable Diffusion's values alone.
FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "only_cross_attention": (False,),
    "dual_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "transformer_layers_per_block": (1, [1, 1, 1, 1]),
    "addition_embed_type_num_heads": (64,),
}
READ = (
    *("sample_size", "in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types"),
    *("layers_per_block", "cross_attention_dim", "attention_head_dim", "num_attention_heads", "norm_num_groups"),
    *("use_linear_projection", "upcast_attention"),
)


@dataclass(frozen=True)
class TextUNetConfig:
    """F(x; t, text) on latents. The defaults are Stable Diffusion 1.5: 859,520,964 parameters.

    lora_rank: 0, or the rank of what is trained in place of the weights, beside each attention's four projections.
    """

    img_resolution: int = 64  # of the latents
    img_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attends: tuple[bool, ...] = (True, True, True, False)  # which levels look at the text
    layers_per_block: int = 2
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    text_width: int = 768
    tokens: int = 77
    linear_projection: bool = False  # Stable Diffusion 2 has it
    upcast_attention: bool = False  # and 2.1 this
    norm_groups: int = 32
    lora_rank: int = 0

    label_dim: ClassVar[int] = 0
    dropout: ClassVar[float] = 0.0
    second_time: ClassVar[SecondTime] = "off"

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name, values in (("attends", self.attends), ("num_heads", self.num_heads)):
            if len(values) != levels or not 1 <= levels <= 8:
                raise UserError(f"{name}: {len(values)} values; one for each of the {levels} levels, 1 to 8, is needed")
        bounds = {"img_resolution": 4096, "img_channels": 64, "layers_per_block": 16, "text_width": 16384}
        bounds |= {"tokens": 4096, "norm_groups": 1024}
        for name, most in bounds.items():
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"{name}: {getattr(self, name)}; 1 to {most:,} are possible")
        for channels, heads in zip(self.block_out_channels, self.num_heads, strict=True):
            if not 1 <= channels <= 8192 or channels % self.norm_groups or heads < 1 or channels % heads:
                wanted = f"a multiple of norm_groups={self.norm_groups} and of num_heads={heads}, 8,192 at most,"
                raise UserError(f"block_out_channels: {channels}; {wanted} is needed")
        if not 0 <= self.lora_rank <= 1024:
            raise UserError(f"lora_rank: {self.lora_rank}; 0 (all weights are trained) to 1,024 are possible")
        if self.img_resolution % 2 ** (levels - 1):
            raise UserError(f"img_resolution: {self.img_resolution}; {levels} levels halve it {levels - 1} times")

    def build(self) -> "TextUNet":
        """A freshly initialised network. Raises UserError without diffusers."""
        return TextUNet(self)


def unet_arguments(config: TextUNetConfig) -> dict[str, Any]:
    """What diffusers' class is built with."""
    down = tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attends)
    up = tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attends))
    return {
        "sample_size": config.img_resolution,
        "in_channels": config.img_channels,
        "out_channels": config.img_channels,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "cross_attention_dim": config.text_width,
        "attention_head_dim": config.num_heads,  # so named by mistake in diffusers: it is how many there are
        "use_linear_projection": config.linear_projection,
        "upcast_attention": config.upcast_attention,
        "norm_num_groups": config.norm_groups,
    }


def text_config(content: Mapping[str, Any], tokens: int = 77) -> TextUNetConfig:
    """The configuration in a folder's unet/config.json. Raises UserError for what Stable Diffusion 1 and 2 have not."""
    if content.get("_class_name") != "UNet2DConditionModel":
        raise UserError(f"{content.get('_class_name')}; UNet2DConditionModel is read")
    if content.get("addition_embed_type") == "text_time":
        raise UserError("Stable Diffusion XL, which is not supported; give a folder of Stable Diffusion 1 or 2")
    for name, value in content.items():
        known = name.startswith("_") or name in READ or value is None
        if not known and value not in FIXED.get(name, (None,)):
            raise UserError(f"{name}={value!r}, which Stable Diffusion 1 and 2 have not; only these are read")
    channels = tuple(content["block_out_channels"])
    heads = content.get("num_attention_heads") or content.get("attention_head_dim", 8)
    down, up = (content[f"{side}_block_types"] for side in ("down", "up"))
    attends = tuple(kind == "CrossAttnDownBlock2D" for kind in down)
    if content.get("in_channels", 4) != content.get("out_channels", 4):
        raise UserError(
            f"in_channels={content['in_channels']}: an inpainting or upscaling model; text-to-image is read"
        )
    config = TextUNetConfig(
        img_resolution=content["sample_size"],
        img_channels=content.get("in_channels", 4),
        block_out_channels=channels,
        attends=attends,
        layers_per_block=content.get("layers_per_block", 2),
        num_heads=tuple(heads) if isinstance(heads, list | tuple) else (heads,) * len(channels),
        text_width=content.get("cross_attention_dim", 1280),
        tokens=tokens,
        linear_projection=content.get("use_linear_projection", False),
        upcast_attention=content.get("upcast_attention") or False,
        norm_groups=content.get("norm_num_groups", 32),
    )
    ours = unet_arguments(config)
    if (tuple(down), tuple(up)) != (ours["down_block_types"], ours["up_block_types"]):
        raise UserError(f"down_block_types={list(down)}, up_block_types={list(up)}; Stable Diffusion's kinds are read")
    return config


def our_name(name: str) -> str:
    """A weight's name here, from its name in diffusers' class."""
    return re.sub(r"^((?:down|up)_blocks\.\d+|mid_block)\.", r"\1.block.", name)


class Down(nn.Module):
    """A block on the way down: its map, and those that the way up reads, as a tuple."""

    def __init__(self, block: nn.Module, attends: bool):
        super().__init__()
        self.block, self.attends = block, attends

    def forward(self, h: Tensor, emb: Tensor, text: Tensor, key: DropoutKey) -> tuple[Tensor, ...]:
        h, kept = self.block(h, emb, encoder_hidden_states=text) if self.attends else self.block(h, emb)
        return h, *kept


class Middle(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, h: Tensor, emb: Tensor, text: Tensor, key: DropoutKey) -> Tensor:
        return self.block(h, emb, encoder_hidden_states=text)


class Up(nn.Module):
    """A block on the way up, with the maps that it reads from the way down."""

    def __init__(self, block: nn.Module, attends: bool):
        super().__init__()
        self.block, self.attends = block, attends

    def forward(self, h: Tensor, emb: Tensor, text: Tensor, *kept_and_key: Any) -> Tensor:
        *kept, _ = kept_and_key
        if self.attends:
            return self.block(h, tuple(kept), emb, encoder_hidden_states=text)
        return self.block(h, tuple(kept), emb)


class TextUNet(nn.Module):
    """Build it with TextUNetConfig(...).build(). The modules are diffusers' own, run by a forward pass of ours.

    cond: embeddings of the text, float [b, tokens, text_width]; c_noise: the scheduler's time, float. There is no
    dropout, and key is not read.
    """

    def __init__(self, config: TextUNetConfig):
        super().__init__()
        if not find_spec("diffusers"):
            raise UserError("Stable Diffusion's network is diffusers': pip install 'onejump[text]'")
        from diffusers import UNet2DConditionModel

        self.config = config
        given = unet_arguments(config)
        unet: Any = UNet2DConditionModel(**given)
        self.time_proj, self.time_embedding, self.conv_in = unet.time_proj, unet.time_embedding, unet.conv_in
        self.down_blocks = nn.ModuleList(map(Down, unet.down_blocks, config.attends))
        self.mid_block = Middle(unet.mid_block)
        self.up_blocks = nn.ModuleList(map(Up, unet.up_blocks, reversed(config.attends)))
        self.reads = [len(block.resnets) for block in unet.up_blocks]  # maps of the way down
        self.conv_norm_out, self.conv_act, self.conv_out = unet.conv_norm_out, unet.conv_act, unet.conv_out
        if config.lora_rank:
            add_lora(self, config.lora_rank)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts, in the order of their calls."""
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def forward(
        self, x: Samples, c_noise: Times, c_noise_s: Times | None = None, cond: Cond = None, key: DropoutKey = None
    ) -> Samples:
        """F(x; c_noise, cond). Raises UserError if the text is missing or of another model."""
        check_second_time(c_noise_s, "off", "TextUNet")
        text = self._checked(x, cond)
        emb = self.time_embedding(self.time_proj(c_noise.float()).to(x.dtype))
        h = self.conv_in(x)
        kept: tuple[Tensor, ...] = (h,)
        for down in self.down_blocks:
            h, *more = down(h, emb, text, key)
            kept += tuple(more)
        h = self.mid_block(h, emb, text, key)
        for up, count in zip(self.up_blocks, self.reads, strict=True):
            kept, read = kept[:-count], kept[-count:]
            h = up(h, emb, text, *read, key)
        return self.conv_out(self.conv_act(self.conv_norm_out(h)))

    def _checked(self, x: Samples, cond: Cond) -> Tensor:
        width = self.config.text_width
        if cond is None or cond.ndim != 3 or cond.shape[0] != len(x) or cond.shape[2] != width:
            given = "nothing" if cond is None else f"a tensor {list(cond.shape)}"
            raise UserError(f"cond: {given}; this network reads embeddings of text, [{len(x)}, tokens, {width}]")
        if x.shape[1] != self.config.img_channels or any(
            side % 2 ** (len(self.down_blocks) - 1) for side in x.shape[2:]
        ):
            raise UserError(
                f"samples of shape {tuple(x.shape[1:])} do not fit this network's {self.config.img_channels}"
            )
        return cond.to(x.dtype) if torch.is_floating_point(cond) else cond
