"""How good a model's samples are: the numbers of evaluation.json."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from onejump.config_json import to_json
from onejump.data.image_set import ImageSet
from onejump.evaluation.features import Detector, DigitsDetector, PixelDetector
from onejump.evaluation.metrics import (
    GaussianStatistics,
    class_balance,
    class_shares,
    confidence,
    frechet_distance,
    kid,
    nearest_neighbours,
)
from onejump.generate import balanced_labels, generate
from onejump.saved import SavedModel
from onejump.types import Images


def detector_for(data: ImageSet) -> Detector:
    """The digits classifier for digits of its kind; for any other images their pixels, area-averaged to 8x8."""
    of_its_kind = data.shape == (1, 8, 8) and data.class_names == tuple("0123456789")
    return DigitsDetector() if of_its_kind else PixelDetector()


@dataclass(frozen=True, eq=False)
class Judge:
    """Real images, and the detector through which samples are compared with them."""

    data: ImageSet
    detector: Detector

    @cached_property
    def features(self) -> torch.Tensor:
        return self.detector(self.data.images)

    @cached_property
    def statistics(self) -> GaussianStatistics:
        return GaussianStatistics.of(self.features)

    @cached_property
    def reference(self) -> dict[str, Any]:
        """What the numbers are measured against, and what real images themselves would get."""
        order = torch.randperm(self.data.n, generator=torch.Generator().manual_seed(0))
        a, b = self.features[order].tensor_split(2)
        return {
            "n": self.data.n,
            "fingerprint": self.data.fingerprint,
            "detector": self.detector.name,
            "detector_sha256": self.detector.hash,
            "real_half_frechet": frechet_distance(a, b) if len(b) > 1 else None,
            "nearest_rms_of_real": self._nearest_of_real(),
        }

    def _nearest_of_real(self) -> float:
        """Mean distance of a real image to the nearest of all others, over up to 1,000 of them drawn at random.

        An image is left out by its place: where the set holds one twice, the distance is 0.
        """
        chosen = torch.randperm(self.data.n, generator=torch.Generator().manual_seed(1))[:1000]
        return nearest_neighbours(self.data.images[chosen], self.data.images, chosen)[1].mean().item()

    def frechet(self, images: Images) -> float:
        return frechet_distance(self.detector(images), self.statistics)

    def numbers(self, images: Images, labels: torch.Tensor | None) -> dict[str, Any]:
        """Every number of one set of samples."""
        features = self.detector(images)
        return {
            "frechet": frechet_distance(features, self.statistics),
            "kid": kid(features, self.features),
            "n": len(images),
            "nearest_rms": nearest_neighbours(images[:1000], self.data.images)[1].mean().item(),
            **self._reading(images, labels),
        }

    def _reading(self, images: Images, labels: torch.Tensor | None) -> dict[str, Any]:
        if not isinstance(self.detector, DigitsDetector):
            return {}
        from onejump.evaluation.digits_classifier import load_digits_classifier

        assert self.data.labels is not None
        probabilities = load_digits_classifier().probabilities(images)
        balance = class_balance(probabilities, class_shares(self.data.labels, 10))
        sure = confidence(probabilities, labels)
        return {
            "class_balance": list(balance.shares),
            "balance_distance": balance.total_variation,
            "confidence": {"mean": sure.mean, "above_0.9": sure.above_90, "as_asked": sure.as_asked},
        }


def evaluate(
    judge: Judge, saved: SavedModel, steps: Sequence[int], n: int, seed: int, batch: int = 512
) -> dict[str, Any]:
    """{"steps": {"1": numbers, "2": numbers}} of n samples each, images 0 .. n - 1 of this seed.

    Classes are asked of a model that has some; whether they came is told where they are those of the real images.
    """
    sampler, labels, out = saved.sampler, balanced_labels(n, len(saved.class_names)), {}
    asked = labels if saved.class_names == judge.data.class_names else None
    for k in steps:
        began = time.perf_counter()
        images = generate(saved.model, sampler, k, range(n), saved.shape, labels, seed, batch)
        seconds = time.perf_counter() - began
        numbers = judge.numbers(images, asked)
        out[str(k)] = {**numbers, "times": sampler.times(k), "nfe": sampler.calls(k), "seed": seed, "seconds": seconds}
    return {"sampler": to_json(sampler), "steps": out}
