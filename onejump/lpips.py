"""LPIPS, the perceptual distance of consistency models and CTM (Zhang et al. 2018)."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from onejump.lpips_backbones import BACKBONES, BackboneName, Features, Pooling, find_files, load
from onejump.types import PerSample, Samples, UserError

FOLDER_VARIABLE = "ONEJUMP_WEIGHTS"


@dataclass(frozen=True)
class LPIPS:
    """d(x, y) = sum over layers l of the mean over places of sum_c w_lc (x_lc - y_lc)^2.   Zhang et al. 2018, eq. 1

    x_l: the layer's output, divided at each place by its norm over channels (+ 1e-10); w_l >= 0: learned heads (v0.1).
    Called with images in [-1, 1] of 3 channels, or of 1 that is repeated; computes in float32 whatever the autocast;
    gradients reach x and y, the network is frozen. The papers differ in resizing (bilinear) and pooling:

        LPIPS()                                 PyTorch code of consistency models, CTM: sides below 256 become 224
        LPIPS(pooling="max", keep_from=None)    JAX code of consistency models: every image becomes 224
        LPIPS(pooling="max", keep_from=0)       as published: no image is resized

    folder: holds the heads (v0.1-vgg.pth) and the backbone (vgg16-397923af.pth, alexnet-owt-7be5be79.pth or
    squeezenet1_1-b8a52dc0.pth, or .safetensors of the same stem). "" means the environment variable ONEJUMP_WEIGHTS.
    Nothing is downloaded. For `squeeze` a Keras file, squeezenet_v1.1_notop_keras.h5, is read too; its weights may not
    be those that the heads were learned on, so call such a distance LPIPS-like.
    pooling: what all pooling layers of the backbone do; the published networks take the maximum.
    keep_from: images whose shorter side is at least this keep their size, others become resize x resize; None: all do.
    Calls raise UserError for missing or damaged files and for images that the backbone cannot take.
    """

    backbone: BackboneName = "vgg"
    folder: str = ""
    pooling: Pooling = "average"
    resize: int = 224
    keep_from: int | None = 256

    def __post_init__(self) -> None:
        for field, value, known in (
            ("backbone", self.backbone, tuple(BACKBONES)),
            ("pooling", self.pooling, ("average", "max")),
        ):
            if value not in known:
                raise UserError(f"{field}: {value!r}; choose one of {', '.join(known)}")
        if self.resize < self.min_side:
            raise UserError(f"resize: {self.resize}; {self.backbone} needs images of at least {self.min_side}")
        if self.keep_from is not None and self.keep_from < 0:
            raise UserError(f"keep_from: {self.keep_from}; at least 0 is needed (0 resizes none, None all)")

    def __call__(self, x: Samples, y: Samples) -> PerSample:
        network = _network(self.backbone, self.pooling, self._folder(), x.device)
        with torch.autocast(x.device.type, enabled=False):
            layers = zip(network(self._resized(x)), network(self._resized(y)), network.heads, strict=True)
            return torch.stack([_layer_distance(fx, fy, head) for fx, fy, head in layers]).sum(0)

    @property
    def min_side(self) -> int:
        return BACKBONES[self.backbone].min_side

    def check(self) -> None:
        """Raises UserError if a file is missing; reads none. For calling before hours of work."""
        find_files(self.backbone, self._folder())

    def _folder(self) -> Path:
        folder = self.folder or os.environ.get(FOLDER_VARIABLE, "")
        if not folder:
            files = BACKBONES[self.backbone]
            raise UserError(
                f"LPIPS: set its field folder, or the environment variable {FOLDER_VARIABLE}, "
                f"to the folder that holds {files.heads.name} and {files.weights.name}"
            )
        return Path(folder).expanduser().absolute()

    def _resized(self, x: Samples) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            shape = "x".join(str(n) for n in x.shape[1:])
            raise UserError(f"LPIPS compares images of 1 or 3 channels, not samples of {shape}: use mean_l2")
        x = x.float().expand(-1, 3, -1, -1)
        side = min(x.shape[2:])
        if self.keep_from is None or side < self.keep_from:
            x = F.interpolate(x, size=(self.resize, self.resize), mode="bilinear", align_corners=False)
        elif side < self.min_side:
            raise UserError(
                f"LPIPS: {self.backbone} needs sides of {self.min_side} or more, not {side}: raise keep_from"
            )
        return x


def _layer_distance(fx: Tensor, fy: Tensor, head: Tensor) -> PerSample:
    return ((_unit(fx) - _unit(fy)).square() * head).sum(1).mean((1, 2))


def _unit(x: Tensor) -> Tensor:
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)


@lru_cache(maxsize=8)
def _network(backbone: BackboneName, pooling: Pooling, folder: Path, device: torch.device) -> Features:
    """One network for all distances that need the same one; usable in training even if first called in inference."""
    with torch.inference_mode(False):
        return load(backbone, pooling, folder, device)
