"""FID's Inception-v3 (the TensorFlow graph of 2015-12-05): features, logits and the spatial features of sFID."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from onejump.evaluation.inception_weights import FILE_NAMES, read_inception
from onejump.evaluation.precision import exact_float32
from onejump.evaluation.weight_files import Tensors, sha256_of
from onejump.types import Features, Images, UserError

SIDE = 299  # pixels that the network sees


@dataclass(frozen=True)
class Conv:
    """A convolution with ReLU. `same`: padded so that stride 1 keeps the size."""

    inside: int
    out: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True

    def build(self) -> nn.Module:
        padding = (self.kernel[0] // 2, self.kernel[1] // 2) if self.same else 0
        return nn.Conv2d(self.inside, self.out, self.kernel, self.stride, padding)


def _tower(name: str, *convs: Conv) -> dict[str, Conv]:
    """The convolutions of one branch: NAME_conv, NAME_conv_1, ..."""
    return {f"{name}_conv{f'_{i}' if i else ''}": conv for i, conv in enumerate(convs)}


def _block_35(m: str, inside: int, pooled: int) -> dict[str, Conv]:
    return (
        _tower(m, Conv(inside, 64))
        | _tower(f"{m}_tower", Conv(inside, 48), Conv(48, 64, (5, 5)))
        | _tower(f"{m}_tower_1", Conv(inside, 64), Conv(64, 96, (3, 3)), Conv(96, 96, (3, 3)))
        | _tower(f"{m}_tower_2", Conv(inside, pooled))
    )


def _block_17(m: str, width: int) -> dict[str, Conv]:
    wide, tall = Conv(width, width, (1, 7)), Conv(width, width, (7, 1))
    return (
        _tower(m, Conv(768, 192))
        | _tower(f"{m}_tower", Conv(768, width), wide, Conv(width, 192, (7, 1)))
        | _tower(f"{m}_tower_1", Conv(768, width), tall, wide, tall, Conv(width, 192, (1, 7)))
        | _tower(f"{m}_tower_2", Conv(768, 192))
    )


def _block_8(m: str, inside: int) -> dict[str, Conv]:
    wide, tall = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
    return (
        _tower(m, Conv(inside, 320))
        | _tower(f"{m}_tower", Conv(inside, 384))
        | _tower(f"{m}_tower_mixed", wide, tall)
        | _tower(f"{m}_tower_1", Conv(inside, 448), Conv(448, 384, (3, 3)))
        | _tower(f"{m}_tower_1_mixed", wide, tall)
        | _tower(f"{m}_tower_2", Conv(inside, 192))
    )


CONVS: dict[str, Conv] = {  # in the order of the graph, so that a tap needs all up to its last
    "conv": Conv(3, 32, (3, 3), 2, same=False),
    "conv_1": Conv(32, 32, (3, 3), same=False),
    "conv_2": Conv(32, 64, (3, 3)),
    "conv_3": Conv(64, 80),
    "conv_4": Conv(80, 192, (3, 3), same=False),
    **_block_35("mixed", 192, 32),
    **_block_35("mixed_1", 256, 64),
    **_block_35("mixed_2", 288, 64),
    **_tower("mixed_3", Conv(288, 384, (3, 3), 2, same=False)),
    **_tower("mixed_3_tower", Conv(288, 64), Conv(64, 96, (3, 3)), Conv(96, 96, (3, 3), 2, same=False)),
    **_block_17("mixed_4", 128),
    **_block_17("mixed_5", 160),
    **_block_17("mixed_6", 160),
    **_block_17("mixed_7", 192),
    **_tower("mixed_8_tower", Conv(768, 192), Conv(192, 320, (3, 3), 2, same=False)),
    **_tower("mixed_8_tower_1", Conv(768, 192), Conv(192, 192, (1, 7)), Conv(192, 192, (7, 1))),
    "mixed_8_tower_1_conv_3": Conv(192, 192, (3, 3), 2, same=False),
    **_block_8("mixed_9", 1280),
    **_block_8("mixed_10", 2048),
}
LAST = {
    "64": "conv_2",
    "192": "conv_4",
    "spatial": "mixed_6_tower_2_conv",
    "768": "mixed_7_tower_2_conv",
    "2048": "mixed_10_tower_2_conv",
    "logits": "output",
}
CLASSES = 1008


def needed(tap: str) -> list[str]:
    """The layers that a tap depends on, in the order of the graph."""
    names = [*CONVS, "output"]
    return names[: names.index(LAST[tap]) + 1]


def resize_tf1(x: Float[Tensor, "b c h w"], side: int = SIDE) -> Float[Tensor, "b c s s"]:
    """Bilinear, as TensorFlow 1's graph does it: output pixel i looks at i * (n / side), without half-pixel centres.

    No antialiasing; the last row and column repeat. In the dtype of x, columns first.
    """
    for dim in (3, 2):
        n = x.shape[dim]
        at = torch.arange(side, device=x.device, dtype=x.dtype) * torch.tensor(n, dtype=x.dtype).div(side).to(x.device)
        low = at.long().clamp(max=n - 1)
        weight = (at - low).view(-1, 1) if dim == 2 else at - low
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * weight
    return x


def _mean_3(x: Tensor) -> Tensor:
    """Mean over 3x3 places, those outside the image left out."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_3(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _half(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


class Inception(nn.Module):
    """The network, with as many of its layers as the weights have. Frozen, in evaluation mode.

    Called with pixels of 0..255 (float, [b, 3, h, w], any size). The taps:
    64, 192: after the first and the second max-pooling; 768: after mixed_7; 2048: pool_3; each averaged over places.
    spatial: the first 7 channels of mixed_6/conv at 17x17 places, row by row as TensorFlow stores them: 2023 numbers.
    logits: of 1008 classes, without the bias, as the inception score takes them.
    """

    def __init__(self, tensors: Tensors):
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ModuleDict({k: conv.build() for k, conv in CONVS.items() if f"{k}.weight" in tensors})
            if "output.weight" in tensors:
                self.layers["output"] = nn.Linear(2048, CLASSES, bias=False)
        self.layers.load_state_dict({name: tensors[name] for name in self.layers.state_dict()}, assign=True)
        self.requires_grad_(False).eval()
        layers: Any = self.layers
        layers.to(memory_format=torch.channels_last)  # 1.7 times the speed on a CPU

    def forward(self, pixels: Tensor, taps: tuple[str, ...]) -> dict[str, Features]:
        found: dict[str, Tensor] = {}
        for tap, value in self._taps((resize_tf1(pixels) - 128) / 128):
            found |= {tap: value} if tap in taps else {}
            if len(found) == len(set(taps)):
                break
        return found

    def missing(self, tap: str) -> list[str]:
        """Layers that the tap needs and the weights lack."""
        return [name for name in needed(tap) if name not in self.layers]

    def _taps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        x = _half(self._run(x, "conv", "conv_1", "conv_2"))
        yield "64", x.mean((2, 3))
        x = _half(self._run(x, "conv_3", "conv_4"))
        yield "192", x.mean((2, 3))
        x = self._block_35("mixed_2", self._block_35("mixed_1", self._block_35("mixed", x)))
        x = torch.cat([self._run(x, "mixed_3_conv"), self._along(x, "mixed_3_tower", 3), _half(x)], 1)
        x = self._block_17("mixed_6", self._block_17("mixed_5", self._block_17("mixed_4", x)))
        yield "spatial", x[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self._block_17("mixed_7", x)
        yield "768", x.mean((2, 3))
        x = torch.cat([self._along(x, "mixed_8_tower", 2), self._along(x, "mixed_8_tower_1", 4), _half(x)], 1)
        x = self._block_8("mixed_9", x, _mean_3(x))
        x = self._block_8("mixed_10", x, _max_3(x)).mean((2, 3))  # a maximum here: so was the graph exported
        yield "2048", x
        yield "logits", self.layers["output"](x)

    def _run(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self.layers[name](x).relu_()
        return x

    def _along(self, x: Tensor, tower: str, n: int) -> Tensor:
        """Through the n convolutions of a tower."""
        return self._run(x, *(f"{tower}_conv{f'_{i}' if i else ''}" for i in range(n)))

    def _block_35(self, m: str, x: Tensor) -> Tensor:
        towers = [self._along(x, m, 1), self._along(x, f"{m}_tower", 2), self._along(x, f"{m}_tower_1", 3)]
        return torch.cat([*towers, self._along(_mean_3(x), f"{m}_tower_2", 1)], 1)

    def _block_17(self, m: str, x: Tensor) -> Tensor:
        towers = [self._along(x, m, 1), self._along(x, f"{m}_tower", 3), self._along(x, f"{m}_tower_1", 5)]
        return torch.cat([*towers, self._along(_mean_3(x), f"{m}_tower_2", 1)], 1)

    def _block_8(self, m: str, x: Tensor, pooled: Tensor) -> Tensor:
        one, two = self._along(x, f"{m}_tower", 1), self._along(x, f"{m}_tower_1", 2)
        towers = [
            self._run(y, f"{m}_{t}_mixed_conv{i}") for y, t in ((one, "tower"), (two, "tower_1")) for i in ("", "_1")
        ]
        return torch.cat([self._along(x, m, 1), *towers, self._along(pooled, f"{m}_tower_2", 1)], 1)


def inception_of(tensors: Tensors, path: Path) -> Inception:
    """The network with these weights. Raises UserError for a tensor of another shape, or a bias that is missing."""
    shapes: dict[str, tuple[int, ...]] = {f"{k}.weight": (c.out, c.inside, *c.kernel) for k, c in CONVS.items()}
    shapes |= {f"{k}.bias": (c.out,) for k, c in CONVS.items()} | {"output.weight": (CLASSES, 2048)}
    for name, shape in shapes.items():
        layer, _, part = name.rpartition(".")
        if part == "bias" and f"{layer}.weight" in tensors and name not in tensors:
            raise UserError(f"{path}: {name} is missing; fetch the file anew")
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise UserError(f"{path}: {name} is {tuple(tensors[name].shape)}, not {shape}: it is of another network")
    return Inception(tensors)


@lru_cache(maxsize=2)
def _network(path: Path, content: str, device: torch.device) -> Inception:
    with torch.inference_mode(False):
        return inception_of(read_inception(path), path).to(device)


@dataclass(frozen=True)
class InceptionDetector:
    """Features of one tap, float32 [n, d]: "2048" for FID and KID, "768", "192", "64", "spatial" (sFID), "logits".

    weights: a file that `read_inception` knows. Images of 1 (repeated) or 3 channels, any size, resized as TensorFlow 1
    does. Calculates in float32 on `device`, also where TF32 or autocast is on, `batch` images at once.
    Raises UserError for a damaged file, for one that ends before the tap, and for images of other channels.
    """

    weights: Path
    tap: str = "2048"
    device: torch.device | str = "cpu"
    batch: int = 32

    def __post_init__(self) -> None:
        if self.tap not in LAST:
            raise UserError(f"tap: {self.tap!r}; choose one of {', '.join(LAST)}")

    @property
    def name(self) -> str:
        return f"inception-{self.tap}"

    @property
    def hash(self) -> str:
        return sha256(f"{sha256_of(self.weights)} {self.name}".encode()).hexdigest()

    def __call__(self, images: Images) -> Features:
        return self.measure(images, (self.tap,))[self.tap]

    def logits(self, images: Images) -> Features:
        return self.measure(images, ("logits",))["logits"]

    def spatial(self, images: Images) -> Features:
        return self.measure(images, ("spatial",))["spatial"]

    def measure(self, images: Images, taps: tuple[str, ...]) -> dict[str, Features]:
        """Several taps for the price of the deepest one."""
        network = self.check(*taps)
        if images.shape[1] not in (1, 3):
            raise UserError(
                f"Inception sees images of 1 or 3 channels, not of {images.shape[1]}: use the pixel detector"
            )
        device, found = torch.device(self.device), []
        with exact_float32(device):
            for x in images.split(self.batch):
                found.append(network(x.to(device).float().expand(-1, 3, -1, -1), taps))
        return {tap: torch.cat([part[tap] for part in found]) for tap in taps}

    def check(self, *taps: str) -> Inception:
        """Reads the weights. Raises UserError if they do not reach the taps (the detector's own, if none is given)."""
        network = _network(self.weights.absolute(), sha256_of(self.weights), torch.device(self.device))
        for tap in taps or (self.tap,):
            if missing := network.missing(tap):
                raise UserError(
                    f"{self.weights} ends before inception-{tap}: {len(missing)} layers are missing, {missing[0]} to "
                    f"{missing[-1]}; use a smaller tap, or {' or '.join(FILE_NAMES[:2])}"
                )
        return network
