"""Fidelity and variety told apart: precision and recall, density and coverage. Exact, in float64, block by block."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from onejump.types import UserError

ROWS = 2048  # of a table of distances held at once, and its columns
SAME = 1e-12  # squared distances below this share of the squared norms are rounding: float32 features know no more


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares between 0 and 1."""

    precision: float  # of samples that lie among real images
    recall: float  # of real images that lie among samples


@dataclass(frozen=True)
class DensityCoverage:
    density: float  # mean number of real balls around a sample, over k: about 1 for real images, may exceed it
    coverage: float  # share of real images with a sample in their ball


def precision_recall(samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2).

    Each set's manifold is the union of balls around its images that reach to the k-th nearest other image of the set,
    borders included. Raises UserError unless both sets have more than k images.
    """
    samples, real = _centred(samples, real)
    within_real = _counts(samples, real, _squared_radii(real, k))[0]
    within_samples = _counts(real, samples, _squared_radii(samples, k))[0]
    return PrecisionRecall(_share(within_real), _share(within_samples))


def density_coverage(samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int = 5) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, eq. 3 and 4), over balls around real images as in `precision_recall`.

    Unlike recall, coverage is not raised by a few stray samples with large balls of their own.
    """
    samples, real = _centred(samples, real)
    balls, inside = _counts(samples, real, _squared_radii(real, k))
    return DensityCoverage(balls.sum().item() / (k * len(samples)), _share(inside))


def _share(counts: Int64[Tensor, " n"]) -> float:
    return (counts > 0).double().mean().item()


def _centred(
    samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"]
) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "m d"]]:
    """Around the mean of the real features: small numbers, whose squares keep their digits."""
    samples, real = samples.double().cpu(), real.double().cpu()
    mean = real.mean(0)
    return samples - mean, real - mean


def _squares(x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
    """Squared distances; exactly 0 between features that float32 could not tell apart."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = norms - 2 * x @ y.T
    return torch.where(squares > SAME * norms, squares, 0.0)


def _squared_radii(x: Float64[Tensor, "n d"], k: int) -> Float64[Tensor, " n"]:
    """Squared distance of each to the k-th nearest of all others, which are told by their places."""
    if len(x) <= k:
        raise UserError(f"{len(x)} images: balls that reach to the {k}. nearest other need at least {k + 1}")
    radii = []
    for i in range(0, len(x), ROWS):
        rows = x[i : i + ROWS]
        nearest = torch.full((len(rows), k), torch.inf, dtype=torch.float64)
        for j in range(0, len(x), ROWS):
            squares = _squares(rows, x[j : j + ROWS])
            if i == j:
                squares.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, squares], 1).topk(k, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _counts(
    points: Float64[Tensor, "n d"], centres: Float64[Tensor, "m d"], radii: Float64[Tensor, " m"]
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " m"]]:
    """(how many balls hold each point, how many points lie in each ball)."""
    balls = torch.zeros(len(points), dtype=torch.int64)
    inside = torch.zeros(len(centres), dtype=torch.int64)
    for i in range(0, len(points), ROWS):
        for j in range(0, len(centres), ROWS):
            held = _squares(points[i : i + ROWS], centres[j : j + ROWS]) <= radii[j : j + ROWS]
            balls[i : i + ROWS] += held.sum(1)
            inside[j : j + ROWS] += held.sum(0)
    return balls, inside
