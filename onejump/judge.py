"""Real images as the measure of samples: every number of one set of samples."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from onejump.data.source import numbered
from onejump.data.training_set import TrainingSet
from onejump.evaluation.bootstrap import frechet_interval
from onejump.evaluation.features import Detector, DigitsDetector, PixelDetector
from onejump.evaluation.manifold import density_coverage, precision_recall
from onejump.evaluation.metrics import (
    class_balance,
    class_shares,
    confidence,
    inception_score,
    kid,
    kid_subsets,
    nearest_in_chunks,
)
from onejump.evaluation.reading import FEATURES, PROBABILITIES, SPATIAL, Reader
from onejump.evaluation.statistics import GaussianStatistics, Moments, check_one_detector, frechet_distance
from onejump.metrics_log import progress_of
from onejump.reference import CHUNK, NEAREST, SAMPLE, Reference, Tell, cache_folder, reference_of
from onejump.types import Images, UserError

METRICS = ("fid", "kid", "kid-subsets", "is", "pr", "dc", "sfid", "dfid", "per-class")
NEEDS_IMAGES = ("kid", "kid-subsets", "pr", "dc", "dfid", "per-class")  # and not only their statistics
AT_LEAST = {"pr": 4, "dc": 6}  # real images: balls reach to the third, to the fifth nearest other
DIGITS = tuple("0123456789")


def detector_for(data: TrainingSet) -> Detector:
    """The digits classifier for digits of its kind; for any other images their pixels, area-averaged to 8x8."""
    of_its_kind = data.shape == (1, 8, 8) and data.class_names == DIGITS
    return DigitsDetector() if of_its_kind else PixelDetector()


def same_classes(asked: tuple[str, ...], real: tuple[str, ...]) -> bool:
    """Whether class k of samples is class k of real images: by name, or by number where the samples' have no names.

    Published models know their classes by number alone.
    """
    return asked == real or (len(asked) == len(real) and asked == numbered(list(range(len(asked)))))


@dataclass(frozen=True, eq=False)
class Judge:
    """Real images, and the detector through which samples are compared with them.

    metrics: the numbers wanted, of METRICS (the Frechet distance is always there). given: statistics to compare with in
    place of the images' own; they do where there are no images (a set of n = 0). show: tell the progress.
    Raises UserError at once for a metric that the detector or the images cannot give.
    """

    data: TrainingSet
    detector: Detector
    metrics: tuple[str, ...] = ("fid", "kid")
    given: Reference | None = None
    show: bool = False

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise UserError(f"metrics: no {name!r}; there are {', '.join(METRICS)}")
            if not self.data.n and name in NEEDS_IMAGES:
                raise UserError(f"metrics: {name} compares with real images themselves; give them with --data")
            if 0 < self.data.n < AT_LEAST.get(name, 0):
                raise UserError(f"metrics: {name} needs at least {AT_LEAST[name]} real images, not {self.data.n}")
        if "per-class" in self.metrics and self.data.labels is None:
            raise UserError("metrics: per-class needs real images with labels")
        reader = self.reader
        if self.given:
            if SPATIAL in reader.kinds and self.given.spatial is None:
                raise UserError("metrics: sfid needs mu_s and sigma_s, which this --reference lacks")
            blank = torch.zeros(2, *self.data.shape, dtype=torch.uint8)
            check_one_detector(GaussianStatistics.of(self.detector(blank)), self.given.statistics)

    @property
    def reads_digits(self) -> bool:
        return isinstance(self.detector, DigitsDetector) and self.data.class_names == DIGITS

    @property
    def reader(self) -> Reader:
        classes = (PROBABILITIES,) if "is" in self.metrics or self.reads_digits else ()
        return Reader(self.detector, (FEATURES, *classes, *((SPATIAL,) if "sfid" in self.metrics else ())))

    @cached_property
    def real(self) -> Reference:
        """The images as measured; without them, what was given."""
        if not self.data.n:
            assert self.given is not None
            return self.given
        with told("real images", self.show and self.data.n > SAMPLE) as tell:
            return reference_of(self.data, self.reader, "per-class" in self.metrics, cache_folder(), tell)

    def measure_real(self) -> None:
        """Now, and not when they are first compared with."""
        _ = self.real

    @property
    def features(self) -> Tensor:
        """Of real images, 10,000 at most."""
        assert self.real.sample is not None
        return self.real.sample

    @property
    def statistics(self) -> GaussianStatistics:
        return (self.given or self.real).statistics

    @cached_property
    def reference(self) -> dict[str, Any]:
        """What the numbers are measured against, and what real images themselves would get."""
        about: dict[str, Any] = {"detector": self.detector.name, "detector_sha256": self.detector.hash}
        if self.given:
            about |= {"reference_sha256": self.given.file_sha256}
        if not self.data.n:
            return {"n": None, "fingerprint": None, **about, "real_half_frechet": None, "nearest_rms_of_real": None}
        return {
            "n": self.data.n,
            "fingerprint": self.data.fingerprint,
            **about,
            "real_half_frechet": self.real.half,
            "nearest_rms_of_real": self._nearest_of_real(),
        }

    def _nearest_of_real(self) -> float:
        """Mean distance of a real image to the nearest of all others, over up to 1,000 of them drawn at random.

        An image is left out by its place: where the set holds one twice, the distance is 0.
        """
        chosen = torch.randperm(self.data.n, generator=torch.Generator().manual_seed(1))[:NEAREST]
        return self._nearest(self.data.pick(chosen), chosen)

    def _nearest(self, images: Images, own: Tensor | None = None) -> float:
        """Mean distance to the nearest real image, from one pass over them. own: the places of those that are some."""
        with told("nearest real images", self.show and self.data.n > SAMPLE) as tell:
            return nearest_in_chunks(images, self._real_images(tell), own)[1].mean().item()

    def _real_images(self, tell: Tell) -> Iterator[Images]:
        done = 0
        for images, _ in self.data.chunks(CHUNK):
            yield images
            done += len(images)
            tell(done, self.data.n)

    def frechet(self, images: Images) -> float:
        return frechet_distance(self.reader(images)[FEATURES], self.statistics)

    def numbers(self, images: Images, labels: Tensor | None) -> dict[str, Any]:
        """Every number of one set of samples. labels: the class asked of each."""
        return self.judged([{**self.reader(images), "images": images[:NEAREST]}], labels)

    def judged(self, parts: Iterable[dict[str, Tensor]], labels: Tensor | None) -> dict[str, Any]:
        """The same from what was read off the samples, part by part (as a Job gives it)."""
        own, spatial = Moments(), Moments()
        kept: dict[str, list[Tensor]] = {FEATURES: [], PROBABILITIES: [], "images": []}
        for part in parts:
            own.add(part[FEATURES])
            if SPATIAL in part:
                spatial.add(part[SPATIAL])
            for kind, tensors in kept.items():
                tensors += [part[kind]] if kind in part else []
        read = {kind: torch.cat(tensors) for kind, tensors in kept.items() if tensors}
        distance = frechet_distance(own.statistics(), self.statistics)
        found: dict[str, Any] = {"frechet": distance, "n": own.n}
        found["frechet_interval"] = list(frechet_interval(read[FEATURES], self.statistics, distance))
        if spatial.n:
            places = (self.given or self.real).spatial
            assert places is not None
            found["spatial_frechet"] = frechet_distance(spatial.statistics(), places)
        if self.data.n:
            found |= self._pairs(read[FEATURES][:SAMPLE])
            found["nearest_rms"] = self._nearest(read["images"])
        return found | self._classes(read, labels)

    def _pairs(self, features: Tensor) -> dict[str, Any]:
        """What looks at pairs of images: of the first 10,000 samples and of 10,000 real images, at most."""
        found: dict[str, Any] = {}
        if "kid" in self.metrics:
            found["kid"] = kid(features, self.features)
        if "kid-subsets" in self.metrics:
            spread = kid_subsets(features, self.features)
            found["kid_subsets"] = {"mean": spread.mean, "std": spread.std}
        if "pr" in self.metrics:
            shares = precision_recall(features, self.features)
            found |= {"precision": shares.precision, "recall": shares.recall}
        if "dc" in self.metrics:
            held = density_coverage(features, self.features)
            found |= {"density": held.density, "coverage": held.coverage}
        return found

    def _classes(self, read: dict[str, Tensor], labels: Tensor | None) -> dict[str, Any]:
        """What has to do with classes: the asked ones, and those that a classifier sees."""
        found: dict[str, Any] = {}
        if "per-class" in self.metrics and labels is not None and self.real.of_class:
            found["per_class"] = per_class(read[FEATURES], labels, self.real.of_class)
        if "is" in self.metrics:
            splits = min(10, len(read[PROBABILITIES]))
            score = inception_score(read[PROBABILITIES], splits)
            found["inception_score"] = {"mean": score.mean, "std": score.std, "splits": splits}
        if self.reads_digits:
            assert self.data.labels is not None
            balance = class_balance(read[PROBABILITIES], class_shares(self.data.labels, 10))
            sure = confidence(read[PROBABILITIES], labels)
            found |= {"class_balance": list(balance.shares), "balance_distance": balance.total_variation}
            found["confidence"] = {"mean": sure.mean, "above_0.9": sure.above_90, "as_asked": sure.as_asked}
        return found


def per_class(features: Tensor, labels: Tensor, real: Sequence[GaussianStatistics | None]) -> dict[str, Any]:
    """Frechet distance of the samples asked to be of a class from the real images of it, and the mean over classes.

    None for a class with fewer than 2 of either; the mean is over the others.
    """
    distances = []
    for c, statistics in enumerate(real):
        own = features[labels == c]
        distances.append(frechet_distance(own, statistics) if statistics and len(own) > 1 else None)
    known = [distance for distance in distances if distance is not None]
    return {"mean": sum(known) / len(known) if known else None, "classes": distances}


@contextmanager
def told(title: str, show: bool) -> Iterator[Tell]:
    """Progress with the time left, if asked for."""
    if not show:
        yield lambda done, total: None
        return
    with progress_of(title) as tell:
        yield tell
