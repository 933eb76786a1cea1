"""The image networks under LPIPS and their weights, read from local files. Tensors have torchvision's names."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from onejump.evaluation.weight_files import WeightFile
from onejump.types import UserError

Pooling = Literal["average", "max"]
BackboneName = Literal["vgg", "alex", "squeeze"]
Tensors = dict[str, Tensor]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, RGB, of pixels in [0, 1]
KERAS_MEAN = (123.68, 116.779, 103.939)  # RGB, of pixels in [0, 255]
KERAS_SQUEEZENET = "squeezenet_v1.1_notop_keras.h5"


@dataclass(frozen=True)
class Backbone:
    """taps: the layers whose outputs are compared, with so many channels. min_side: the smallest image it takes."""

    layers: Callable[[Pooling], list[nn.Module]]
    taps: tuple[int, ...]
    channels: tuple[int, ...]
    min_side: int
    weights: WeightFile
    heads: WeightFile


class Fire(nn.Module):
    """SqueezeNet's module: 1x1 to few channels, then 1x1 and 3x3 side by side (Iandola et al. 2016)."""

    def __init__(self, inside: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Conv2d(inside, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu_()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1).relu_()


def _pool(pooling: Pooling, kernel: int, ceil: bool = False) -> nn.Module:
    kind = nn.AvgPool2d if pooling == "average" else nn.MaxPool2d
    return kind(kernel, 2, ceil_mode=ceil)


def _conv(inside: int, out: int, kernel: int, stride: int = 1, padding: int = 0) -> list[nn.Module]:
    return [nn.Conv2d(inside, out, kernel, stride, padding), nn.ReLU(inplace=True)]


def _vgg(pooling: Pooling) -> list[nn.Module]:
    """VGG-16 up to relu5_3 (Simonyan & Zisserman 2015)."""
    layers, inside = [], 3
    for block, (convolutions, channels) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)]):
        layers += [_pool(pooling, 2)] if block else []
        for _ in range(convolutions):
            layers += _conv(inside, channels, 3, padding=1)
            inside = channels
    return layers


def _alex(pooling: Pooling) -> list[nn.Module]:
    """AlexNet up to relu5, in one column (Krizhevsky 2014)."""
    layers = [*_conv(3, 64, 11, 4, 2), _pool(pooling, 3), *_conv(64, 192, 5, padding=2), _pool(pooling, 3)]
    return layers + _conv(192, 384, 3, padding=1) + _conv(384, 256, 3, padding=1) + _conv(256, 256, 3, padding=1)


def _squeeze(pooling: Pooling) -> list[nn.Module]:
    """SqueezeNet 1.1 up to fire 9."""
    layers = [*_conv(3, 64, 3, 2), _pool(pooling, 3, True), Fire(64, 16, 64), Fire(128, 16, 64)]
    layers += [_pool(pooling, 3, True), Fire(128, 32, 128), Fire(256, 32, 128), _pool(pooling, 3, True)]
    return layers + [Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256)]


def _published(name: str, size: int, sha256: str) -> WeightFile:
    return WeightFile(name, size, sha256, f"https://download.pytorch.org/models/{name}, ~/.cache/torch/hub/checkpoints")


def _heads(backbone: BackboneName, size: int, sha256: str) -> WeightFile:
    where = f"lpips/weights/v0.1/{backbone}.pth in https://github.com/richzhang/PerceptualSimilarity, renamed"
    return WeightFile(f"v0.1-{backbone}.pth", size, sha256, where)


BACKBONES: dict[str, Backbone] = {
    "vgg": Backbone(
        *(_vgg, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16),
        _published("vgg16-397923af.pth", 553433881, "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
        _heads("vgg", 7289, "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    ),
    "alex": Backbone(
        *(_alex, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31),
        _published(
            "alexnet-owt-7be5be79.pth", 244408911, "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02"
        ),
        _heads("alex", 6009, "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
    ),
    "squeeze": Backbone(
        *(_squeeze, (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512), 17),
        _published(
            "squeezenet1_1-b8a52dc0.pth", 4958839, "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b"
        ),
        _heads("squeeze", 10811, "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76"),
    ),
}


class Features(nn.Module):
    """A backbone with LPIPS's heads. forward: RGB images in [-1, 1] -> the outputs of all taps.

    Built on the meta device, then filled: making it draws no random numbers. Frozen, in evaluation mode.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: BackboneName, pooling: Pooling):
        super().__init__()
        backbone = BACKBONES[name]
        with torch.device("meta"):
            self.features = nn.Sequential(*backbone.layers(pooling))
            self.heads = nn.ParameterList([torch.empty(1, n, 1, 1) for n in backbone.channels])
        self.taps = backbone.taps
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        x, outputs = ((x + 1) / 2 - self.mean) / self.std, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            outputs += [x] if i in self.taps else []
        return outputs


def find_files(name: BackboneName, folder: Path) -> tuple[Path, Path]:
    """The files of the backbone and of the heads, each a .pth or a .safetensors of the same stem.

    For `squeeze` the backbone may also be squeezenet_v1.1_notop_keras.h5. Raises UserError if one is missing.
    """
    backbone = BACKBONES[name]
    others = (KERAS_SQUEEZENET,) if name == "squeeze" else ()
    return _find(backbone.weights, folder, others), _find(backbone.heads, folder)


def _find(file: WeightFile, folder: Path, others: tuple[str, ...] = ()) -> Path:
    for name in (file.name, f"{Path(file.name).stem}.safetensors", *others):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"LPIPS: {folder} has no {file}; copy it there")


def load(name: BackboneName, pooling: Pooling, folder: Path, device: torch.device) -> Features:
    """The network with its weights, float32. Raises UserError for a missing, damaged or foreign file."""
    weights_path, heads_path = find_files(name, folder)
    backbone, network = BACKBONES[name], Features(name, pooling)
    read = _read_keras if weights_path.name == KERAS_SQUEEZENET else _read
    names = {f"features.{key}": f"features.{key}" for key in network.features.state_dict()}
    heads = {f"lin{i}.model.1.weight": f"heads.{i}" for i in range(len(network.heads))}
    wanted = network.state_dict()
    state = _take(read(weights_path, backbone.weights), names, wanted, weights_path)
    state |= _take(_read(heads_path, backbone.heads), heads, wanted, heads_path)
    network.load_state_dict(state, assign=True)
    return network.to(device)


def _take(tensors: Tensors, names: dict[str, str], wanted: Tensors, path: Path) -> Tensors:
    """The tensors called by the keys of `names`, under its values, if their shapes are the wanted ones."""
    for key, name in names.items():
        found = tuple(tensors[key].shape) if key in tensors else "missing"
        if found != tuple(wanted[name].shape):
            raise UserError(f"{path}: {key} is {found}, not {tuple(wanted[name].shape)}: it is of another network")
    return {name: tensors[key].float().contiguous() for key, name in names.items()}


def _read(path: Path, file: WeightFile) -> Tensors:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {key: value for key, value in dict(tensors).items() if isinstance(value, Tensor)}
    except Exception as error:  # a damaged file can raise anything
        raise UserError(_unreadable(path, error, f"it should be {file}")) from error


def _read_keras(path: Path, file: WeightFile) -> Tensors:
    """SqueezeNet 1.1 as Keras stores it (kernels height, width, in, out), under torchvision's names.

    That network reads BGR in [0, 255] less a mean. What leads there from standardised RGB is put into the first
    convolution, exactly, as that has no padding.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path}: install h5py to read it (pip install h5py), or put {file.name} there") from error
    layers = {"features.0": "conv1"}
    for fire, index in enumerate((3, 4, 6, 7, 9, 10, 11, 12), start=2):
        for ours, theirs in (("squeeze", "squeeze1x1"), ("expand1x1", "expand1x1"), ("expand3x3", "expand3x3")):
            layers[f"features.{index}.{ours}"] = f"fire{fire}/{theirs}"
    tensors: Tensors = {}
    try:
        with h5py.File(path) as f:
            for ours, theirs in layers.items():
                arrays = [torch.from_numpy(f[theirs][name][()]) for name in f[theirs].attrs["weight_names"]]
                kernel, bias = sorted(arrays, key=lambda array: -array.ndim)
                tensors |= {f"{ours}.weight": kernel.permute(3, 2, 0, 1), f"{ours}.bias": bias}
    except Exception as error:  # as above
        raise UserError(_unreadable(path, error, f"or put {file.name} there")) from error
    kernel, mean, std = tensors["features.0.weight"].flip(1), torch.tensor(MEAN), torch.tensor(STD)
    offset = 255 * mean - torch.tensor(KERAS_MEAN)
    tensors["features.0.weight"] = kernel * (255 * std).view(3, 1, 1)
    tensors["features.0.bias"] = tensors["features.0.bias"] + kernel.sum((2, 3)) @ offset
    return tensors


def _unreadable(path: Path, error: Exception, way_out: str) -> str:
    return f"{path} cannot be read ({type(error).__name__}), it may be damaged: fetch it anew; {way_out}"
