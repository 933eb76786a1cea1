"""The tensors of diffusers' UNet2DModel, where it is an ADM: the same under other names, and qkv in another order.

diffusers' consistency pipeline gives the network 1000 c_noise, as OpenAI's code does. Where ours reads another multiple
of c_noise, the one weight that reads the features of the noise level is refitted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from onejump.networks.adm_unet import ADMUNetConfig, attention_heads
from onejump.networks.layers import empty_network
from onejump.networks.unet_parts import smoothing

NOISE_SCALE = 1000.0  # the pipeline's multiple of c_noise
REFITTED = "map_layer0.weight"
REFIT_TIMES = 1e-3, 200.0  # the noise levels between which a refitted weight serves
REFIT_LIMIT = 1e-6  # the largest error of a feature (a sine or cosine) that is let through

LEAVES = {  # of a residual block, and of resampling by a convolution
    **{"norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2"},
    **{"skip": "conv_shortcut", "conv": "conv"},
}
ATTENTION_LEAVES = {"norm2": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "proj": ("to_out.0",)}


@dataclass(frozen=True)
class Renamed:
    """A tensor of ours: from which of theirs it is made, and how."""

    theirs: tuple[str, ...]
    made: Callable[..., Tensor]


def renamed(config: ADMUNetConfig) -> dict[str, Renamed]:
    """Every tensor of our state dict. Constants of ours are made of none of theirs."""
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_network(config).state_dict().items()}
    return {name: Renamed(their_names(config, name), _joined(config, name, shape)) for name, shape in shapes.items()}


def to_unet(config: ADMUNetConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights as UNet2DModel's."""
    out: dict[str, Tensor] = {}
    for ours, tensor in weights.items():
        if ours == REFITTED and config.noise_scale != NOISE_SCALE:
            tensor = (tensor.double().cpu() @ time_features(config)[0].T).to(tensor)
        out |= dict(zip(their_names(config, ours), _split(config, ours, tensor), strict=True))
    return out


def their_names(config: ADMUNetConfig, ours: str) -> tuple[str, ...]:
    """None for a constant of ours, three for qkv, else one."""
    module, kind = ours.rsplit(".", 1)
    if kind == "resample_filter":
        return ()
    side = config.img_resolution
    top = {
        "map_layer0": "time_embedding.linear_1",
        "map_layer1": "time_embedding.linear_2",
        "map_label": "class_embedding",
        f"enc.{side}x{side}_conv": "conv_in",
        "out_norm": "conv_norm_out",
        "out_conv": "conv_out",
    }
    if module in top:
        return (f"{top[module]}.{kind}",)
    block, leaf = module.rsplit(".", 1)
    where = _block(config, block)
    if leaf in LEAVES:
        return (f"{where}.{LEAVES[leaf]}.{kind}",)
    return tuple(f"{where.replace('resnets', 'attentions')}.{name}.{kind}" for name in ATTENTION_LEAVES[leaf])


def _block(config: ADMUNetConfig, ours: str) -> str:
    """Their name of our block, such as enc.32x32_block0, or dec.8x8_in0."""
    half, name = ours.split(".")
    side, what = name.split("_")
    level, levels = config.resolutions.index(int(side.split("x")[0])), len(config.resolutions)
    if what in ("in0", "in1"):
        return f"mid_block.resnets.{what[2:]}"
    if what == "down":  # belongs to the level above
        return f"down_blocks.{level - 1}.downsamplers.0"
    if what == "up":  # belongs to the level below
        return f"up_blocks.{levels - level - 2}.upsamplers.0"
    stack = f"down_blocks.{level}" if half == "enc" else f"up_blocks.{levels - 1 - level}"
    return f"{stack}.resnets.{what.removeprefix('block')}"


def _split(config: ADMUNetConfig, ours: str, tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor of ours as theirs: labels are an embedding, and attention's 1x1 convolutions are linear layers."""
    module, kind = ours.rsplit(".", 1)
    leaf = module.rsplit(".", 1)[-1]
    if kind == "resample_filter":
        return ()
    if leaf == "map_label":
        return (tensor.T,)
    if leaf == "proj" and kind == "weight":
        return (tensor.flatten(1),)
    if leaf == "qkv":
        rows = tensor.flatten(1) if kind == "weight" else tensor
        c = len(rows) // 3
        heads = attention_heads(c, config.head_channels)
        return tuple(part.flatten(0, 1) for part in rows.unflatten(0, (heads, c // heads, 3)).unbind(2))
    return (tensor,)


def _joined(config: ADMUNetConfig, ours: str, shape: tuple[int, ...]) -> Callable[..., Tensor]:
    """The inverse of _split, for a tensor of ours of this shape."""
    module, kind = ours.rsplit(".", 1)
    leaf = module.rsplit(".", 1)[-1]
    if kind == "resample_filter":
        return lambda: smoothing(1, 1)
    if leaf == "map_label":
        return lambda table: table.T
    if leaf == "proj" and kind == "weight":
        return lambda weight: weight[:, :, None, None]
    if leaf == "qkv":
        heads = attention_heads(shape[0] // 3, config.head_channels)

        def interleaved(*parts: Tensor) -> Tensor:
            split = [part.unflatten(0, (heads, -1)) for part in parts]
            rows = torch.stack(split, dim=2).flatten(0, 2)
            return rows[:, :, None, None] if kind == "weight" else rows

        return interleaved
    return lambda tensor: tensor


def not_refitted(config: ADMUNetConfig) -> str:
    """Why the features of the noise level cannot be refitted, "" if they can or need not be."""
    if config.noise_scale == NOISE_SCALE or time_features(config)[1] <= REFIT_LIMIT:
        return ""
    return f"noise_scale={config.noise_scale:g} with model_channels={config.model_channels}"


def time_features(config: ADMUNetConfig) -> tuple[Float64[Tensor, "c c"], float]:
    """A with theirs @ A = ours, for the rows of features of any noise level in REFIT_TIMES; and the largest error.

    Both have n = c / 2 frequencies that fall from noise_scale by a factor 1e4. Where theirs are higher, most of ours
    are too low to be among them: there a sine or cosine is nearly a polynomial on the interval, and a combination of
    the low frequencies of theirs. Least squares at Chebyshev's nodes, damped so that the combinations stay small.
    """
    n = config.model_channels // 2
    low, high = torch.tensor(REFIT_TIMES, dtype=torch.float64).log() / 4
    nodes = torch.cos(torch.pi * (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)
    c_noise = (low + high) / 2 + (high - low) / 2 * nodes
    w = 10 ** (-4 * torch.arange(n, dtype=torch.float64) / n)
    theirs, ours = _features(NOISE_SCALE * w, c_noise), _features(config.noise_scale * w, c_noise)
    usable = (NOISE_SCALE * w <= max(8.0, 8 * config.noise_scale)).repeat(2)
    u, s, v = torch.linalg.svd(theirs[:, usable], full_matrices=False)
    found = torch.zeros(2 * n, 2 * n, dtype=torch.float64)
    found[usable] = v.T @ ((s / (s**2 + 1e-12))[:, None] * (u.T @ ours))
    return found, float((theirs @ found - ours).abs().max())


def _features(w: Float64[Tensor, " n"], c_noise: Float64[Tensor, " m"]) -> Float64[Tensor, "m 2*n"]:
    angle = c_noise[:, None] * w
    return torch.cat([angle.cos(), angle.sin()], dim=1)
