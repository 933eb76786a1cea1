"""How far a Frechet distance would move with other samples of the same model."""

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from onejump.evaluation.statistics import FEW, GaussianStatistics, check_one_detector
from onejump.types import Features

RESAMPLES = 500
SINGULAR = 1e-12  # eigenvalues below this share of the largest count as 0


def frechet_interval(
    features: Features,
    reference: GaussianStatistics,
    distance: float,
    share: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval that holds this share of the distances of bootstrap resamples of the features (Efron 1979).

    The distance of a resample is taken to first order, FD + mean of `frechet_influence` over the images drawn (Efron &
    Tibshirani 1993, chapter 22): one pass over the features instead of a thousand covariances and roots. The interval
    tells the sampling noise at this n. It does not tell the upward bias of a distance at small n, which a resample,
    where images repeat, would count twice. Deterministic for equal arguments.
    """
    influence = frechet_influence(features, reference)
    n, generator = len(influence), np.random.default_rng(seed)
    counts = (generator.multinomial(n, np.full(n, 1 / n)) for _ in range(resamples))
    tail = (1 - share) / 2
    low, high = np.quantile([times @ influence.numpy() / n for times in counts], [tail, 1 - tail]).tolist()
    return max(distance + low, 0.0), distance + high


def frechet_influence(features: Features, reference: GaussianStatistics) -> Float64[Tensor, " n"]:
    """What each image adds to the Frechet distance from the reference, to first order; the mean over them is 0.

    With the sample's N(mu, A), the reference's N(nu, B) and the map T = B^1/2 (B^1/2 A B^1/2)^-1/2 B^1/2 that carries
    the one Gaussian to the other, dFD = 2 (mu - nu).dmu + tr (1 - T) dA, since tr (B^1/2 A B^1/2)^1/2 has the gradient
    T / 2 in A. An image x of more weight moves mu along x - mu, and A, which
    is unbiased, along (x - mu)(x - mu)^T n / (n - 1) - A. Where A is singular, T is taken on its range, which resamples
    never leave.
    """
    own = GaussianStatistics.of(features)
    check_one_detector(own, reference)
    root = reference.root
    values, vectors = torch.linalg.eigh(root @ own.covariance @ root)
    inverse = torch.where(values > SINGULAR * values[-1], values.clamp(min=SINGULAR**2).rsqrt(), 0.0)
    basis = root @ vectors * inverse.sqrt()  # T = basis basis^T
    slope, parts = 2 * (own.mean - reference.mean), []
    for few in features.split(FEW):
        x = few.double().cpu() - own.mean
        parts.append(x @ slope + (x.square().sum(1) - (x @ basis).square().sum(1)) * (own.n / (own.n - 1)))
    influence = torch.cat(parts)
    return influence - influence.mean()
