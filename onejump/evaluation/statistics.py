"""Gaussians fitted to sets of features, in one pass over batches, and the Frechet distance of two of them. float64."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from onejump.types import Features, UserError

FEW = 4096  # features made float64 at once


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Mean [d] and unbiased covariance [d, d] of n features: all that a Frechet distance needs of a set.

    n is 0 for statistics from a file that does not say of how many images they are.
    """

    mean: Float64[Tensor, " d"]
    covariance: Float64[Tensor, "d d"]
    n: int

    @cached_property
    def root(self) -> Float64[Tensor, "d d"]:
        """Symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    @classmethod
    def of(cls, features: Features) -> "GaussianStatistics":
        """Raises UserError for fewer than 2 images."""
        return cls.of_batches([features])

    @classmethod
    def of_batches(cls, batches: Iterable[Float[Tensor, "_ d"]]) -> "GaussianStatistics":
        """Of all features together; no more than one batch and a few [d, d] are in memory."""
        moments = Moments()
        for features in batches:
            moments.add(features)
        return moments.statistics()


class Moments:
    """Count, mean and scatter (the sum of (x - mean)(x - mean)^T) of features that come in batches.

    Each batch is centred on its own mean and then moved to that of all, so that no large numbers are subtracted (Chan,
    Golub & LeVeque 1979, eq. 2.1): as exact as with all features at hand, also where the mean is far from 0.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, features: Features) -> None:
        for few in features.split(FEW):
            x = few.double().cpu()
            mean = x.mean(0)
            x = x - mean
            self._join(len(x), mean, x.T @ x)

    def merge(self, other: "Moments") -> None:
        """Adds all features of `other`, which stays as it is."""
        if other.n:
            self._join(other.n, other.mean, other.scatter)

    def _join(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.n:
            self.n, self.mean, self.scatter = n, mean.clone(), scatter.clone()
            return
        shift, total = mean - self.mean, self.n + n
        self.scatter.add_(scatter).addr_(shift, shift, alpha=self.n * n / total)
        self.mean = self.mean + shift * (n / total)
        self.n = total

    def statistics(self) -> GaussianStatistics:
        """Raises UserError for fewer than 2 images."""
        if self.n < 2:
            raise UserError(f"{self.n} images: a covariance needs at least 2")
        return GaussianStatistics(self.mean, self.scatter / (self.n - 1), self.n)


def frechet_distance(
    a: Float[Tensor, "n d"] | GaussianStatistics, b: Float[Tensor, "m d"] | GaussianStatistics
) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (Heusel et al. 2017, eq. 6; FID on Inception's,
    sFID on its spatial features, Nash et al. 2021).

    |mu_a - mu_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2. The last trace is the sum of the singular values of
    A^1/2 B^1/2, with symmetric roots by `eigh`: never complex, and exact also where n < d makes A or B singular.
    Biased upwards for small sets: compare only distances of equal n. Raises UserError for fewer than 2 images.
    """
    a, b = (x if isinstance(x, GaussianStatistics) else GaussianStatistics.of(x) for x in (a, b))
    check_one_detector(a, b)
    cross = torch.linalg.svdvals(a.root @ b.root).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(distance.item(), 0.0)


def check_one_detector(a: GaussianStatistics, b: GaussianStatistics) -> None:
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions: use one detector for both sets")
