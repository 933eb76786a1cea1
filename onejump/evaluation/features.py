"""Detectors: what turns images into the features that Frechet and kernel distances compare."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from onejump.evaluation.digits_classifier import load_digits_classifier, weights_hash
from onejump.types import Features, Images


@runtime_checkable
class Detector(Protocol):
    """Images (uint8 [n, c, h, w]) to features (float [n, d]); distances compare only within one (name, hash)."""

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str:
        """sha256 (hex) of whatever the features depend on."""
        ...

    def __call__(self, images: Images) -> Features: ...


@dataclass(frozen=True)
class DigitsDetector:
    """The 64 features of the digits classifier: sees strokes and shapes of 8x8 digits, and of nothing else."""

    device: torch.device | str = "cpu"
    name: str = "digits-64"

    @property
    def hash(self) -> str:
        return weights_hash()

    def __call__(self, images: Images) -> Float[Tensor, "n 64"]:
        return load_digits_classifier(self.device).features(images).double()


@dataclass(frozen=True)
class PixelDetector:
    """Images averaged over areas to `size` x `size` pixels, flattened, in [-1, 1]; d = c * size^2.

    For images of any kind when no learned detector is at hand. It sees colour and coarse layout only: a blurred
    image scores as well as a sharp one, and a plausible picture that is laid out unusually scores badly.
    """

    size: int = 8

    @property
    def name(self) -> str:
        return f"pixels-{self.size}x{self.size}"

    @property
    def hash(self) -> str:
        return sha256(f"area averages in [-1, 1], {self.name}".encode()).hexdigest()

    def __call__(self, images: Images) -> Features:
        means = [F.adaptive_avg_pool2d(x.double(), self.size) for x in images.split(256)]
        return torch.cat(means).flatten(1) / 127.5 - 1
