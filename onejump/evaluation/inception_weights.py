"""Weights of FID's Inception-v3 (2015-12-05) from the files that hold them, under the names of the TensorFlow graph."""

from pathlib import Path

import torch
from torch import Tensor

from onejump.evaluation.weight_files import Tensors, WeightFile, check_published, read_tensors
from onejump.types import UserError

EPS = 0.001  # of every batch norm
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PYTORCH_FID = WeightFile(
    "pt_inception-2015-12-05-6726825d.pth",
    95628359,
    SHA256,
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights, ~/.cache/torch/hub/checkpoints",
)
TORCH_FIDELITY = WeightFile(
    "weights-inception-2015-12-05-6726825d.pth",
    95628359,
    SHA256,
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0, ~/.cache/torch/hub/checkpoints",
)
STYLEGAN = WeightFile(
    "inception-2015-12-05.pt",
    95607719,
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics",
)
PUBLISHED = (PYTORCH_FID, STYLEGAN, TORCH_FIDELITY)
FILE_NAMES = (*(file.name for file in PUBLISHED), "inception-2015-12-05.npz")

BLOCKS = {  # pytorch-fid's names of blocks
    **{"Conv2d_1a_3x3": "conv", "Conv2d_2a_3x3": "conv_1", "Conv2d_2b_3x3": "conv_2"},
    **{"Conv2d_3b_1x1": "conv_3", "Conv2d_4a_3x3": "conv_4"},
    **{"Mixed_5b": "mixed", "Mixed_5c": "mixed_1", "Mixed_5d": "mixed_2", "Mixed_6a": "mixed_3", "Mixed_6b": "mixed_4"},
    **{"Mixed_6c": "mixed_5", "Mixed_6d": "mixed_6", "Mixed_6e": "mixed_7"},
    **{"Mixed_7a": "mixed_8", "Mixed_7b": "mixed_9", "Mixed_7c": "mixed_10"},
}
SAME = {"branch1x1": "conv", "branch_pool": "tower_2_conv"}
BRANCHES_35 = SAME | {
    **{"branch5x5_1": "tower_conv", "branch5x5_2": "tower_conv_1"},
    **{"branch3x3dbl_1": "tower_1_conv", "branch3x3dbl_2": "tower_1_conv_1", "branch3x3dbl_3": "tower_1_conv_2"},
}
BRANCHES_35_TO_17 = {
    "branch3x3": "conv",
    **{"branch3x3dbl_1": "tower_conv", "branch3x3dbl_2": "tower_conv_1", "branch3x3dbl_3": "tower_conv_2"},
}
BRANCHES_17 = SAME | {
    **{"branch7x7_1": "tower_conv", "branch7x7_2": "tower_conv_1", "branch7x7_3": "tower_conv_2"},
    "branch7x7dbl_1": "tower_1_conv",
    **{f"branch7x7dbl_{i + 1}": f"tower_1_conv_{i}" for i in (1, 2, 3, 4)},
}
BRANCHES_17_TO_8 = {
    **{"branch3x3_1": "tower_conv", "branch3x3_2": "tower_conv_1", "branch7x7x3_1": "tower_1_conv"},
    **{f"branch7x7x3_{i + 1}": f"tower_1_conv_{i}" for i in (1, 2, 3)},
}
BRANCHES_8 = SAME | {
    **{"branch3x3_1": "tower_conv", "branch3x3_2a": "tower_mixed_conv", "branch3x3_2b": "tower_mixed_conv_1"},
    **{"branch3x3dbl_1": "tower_1_conv", "branch3x3dbl_2": "tower_1_conv_1"},
    **{"branch3x3dbl_3a": "tower_1_mixed_conv", "branch3x3dbl_3b": "tower_1_mixed_conv_1"},
}
BRANCHES = (
    {f"mixed{i}": BRANCHES_35 for i in ("", "_1", "_2")}
    | {"mixed_3": BRANCHES_35_TO_17}
    | {f"mixed_{i}": BRANCHES_17 for i in (4, 5, 6, 7)}
    | {"mixed_8": BRANCHES_17_TO_8, "mixed_9": BRANCHES_8, "mixed_10": BRANCHES_8}
)


def read_inception(path: Path) -> Tensors:
    """NAME.weight and NAME.bias of every convolution in the file, batch norms folded in, and of `output`; float32.

    Read are: an .npz or .safetensors of these very names; pytorch-fid's state dict (Mixed_5b.branch1x1.conv.weight,
    with .bn.*); StyleGAN's TorchScript archive (layers.mixed.tower.conv_1.weight, with .beta, .mean and .var), of which
    no code is run. Raises UserError for other and for damaged files, and for a published name with other content.
    """
    check_published(path, PUBLISHED)
    tensors = read_tensors(path)
    if any(name.startswith("Mixed_") or name.startswith("Conv2d_") for name in tensors):
        tensors = _from_pytorch_fid(tensors, path)
    elif any(name.startswith("layers.") for name in tensors):
        tensors = _from_stylegan(tensors, path)
    elif "conv.weight" not in tensors:
        some = next(iter(tensors), "nothing")
        raise UserError(f"{path}: not the weights of Inception-v3 (it holds {some}); known are {', '.join(FILE_NAMES)}")
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def _from_pytorch_fid(tensors: Tensors, path: Path) -> Tensors:
    found = {f"output.{key}": tensors[f"fc.{key}"] for key in ("weight", "bias") if f"fc.{key}" in tensors}
    for key in tensors:
        if key.endswith(".conv.weight") and (name := _graph_name(key.removesuffix(".conv.weight"))):
            norm = [f"{key.removesuffix('conv.weight')}bn.{part}" for part in ("bias", "running_mean", "running_var")]
            gain = tensors.get(f"{key.removesuffix('conv.weight')}bn.weight")
            found |= _folded(name, tensors[key], [_given(tensors, part, path) for part in norm], gain)
    return found


def _graph_name(name: str) -> str | None:
    """mixed_9_tower_mixed_conv for Mixed_7b.branch3x3_2a; None for what the features do not depend on (AuxLogits)."""
    block, _, branch = name.partition(".")
    if block not in BLOCKS:
        return None
    return f"{BLOCKS[block]}_{BRANCHES[BLOCKS[block]][branch]}" if branch else BLOCKS[block]


def _from_stylegan(tensors: Tensors, path: Path) -> Tensors:
    found = {name: tensor for name, tensor in tensors.items() if name.startswith("output.")}
    for key, kernel in tensors.items():
        if key.startswith("layers.") and kernel.ndim == 4:
            layer = key.removesuffix(".weight")
            norm = [_given(tensors, f"{layer}.{part}", path) for part in ("beta", "mean", "var")]
            found |= _folded(layer.removeprefix("layers.").replace(".", "_"), kernel, norm)
    return found


def _given(tensors: Tensors, name: str, path: Path) -> Tensor:
    if name not in tensors:
        raise UserError(f"{path}: {name} is missing; known are {', '.join(FILE_NAMES)}")
    return tensors[name]


def _folded(name: str, kernel: Tensor, norm: list[Tensor], gain: Tensor | None = None) -> Tensors:
    """gain (w*x - mean) / sqrt(variance + EPS) + shift as one convolution with bias; calculated in float64."""
    shift, mean, variance = (tensor.double() for tensor in norm)
    scale = torch.rsqrt(variance + EPS) * (1 if gain is None else gain.double())
    weight = kernel.double() * scale[:, None, None, None]
    return {f"{name}.weight": weight.float(), f"{name}.bias": (shift - mean * scale).float()}
