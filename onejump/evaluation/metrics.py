"""Kernel distance, inception score, nearest images and counts over samples: float64 and exact.

Frechet distances are in `statistics`, precision and recall in `manifold`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from onejump.types import Images, UserError

ROWS = 2048  # rows of a table of pairs held at once


def kid(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Kernel distance: the unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, eq. 4).

    Over the full sets, not averaged over random subsets. Unbiased: near 0, also below it, for equal distributions.
    """
    if min(len(a), len(b)) < 2:
        raise UserError(f"{len(a)} and {len(b)} images: the kernel distance needs at least 2 of each")
    a, b = a.double().cpu(), b.double().cpu()
    n, m = len(a), len(b)
    within_a = (_kernel_sum(a, a) - _kernel(a.square().sum(1), a.shape[1]).sum()) / (n * (n - 1))
    within_b = (_kernel_sum(b, b) - _kernel(b.square().sum(1), b.shape[1]).sum()) / (m * (m - 1))
    return (within_a + within_b - 2 * _kernel_sum(a, b) / (n * m)).item()


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a number over subsets of the samples."""

    mean: float
    std: float


def kid_subsets(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], subsets: int = 100, size: int = 1000, seed: int = 0
) -> Spread:
    """The kernel distance of random subsets, `size` of each set without repetition (Binkowski et al. 2018, section 4).

    As unbiased as `kid`, and affordable for large sets. Sets smaller than `size` enter whole. The spread is that of
    one subset's value, not of the mean. Deterministic for equal arguments.
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        rows, columns = (torch.randperm(len(x), generator=generator)[:size].to(x.device) for x in (a, b))
        values.append(kid(a[rows], b[columns]))
    found = torch.tensor(values, dtype=torch.float64)
    return Spread(found.mean().item(), found.std(correction=0).item())


def inception_score(probabilities: Float[Tensor, "n classes"], splits: int = 10) -> Spread:
    """exp of the mean KL(p(y|x) || p(y)) over the images of a split; mean and spread over the splits.

    Salimans et al. 2016, section 4. Between 1 (every image reads the same) and the number of classes (each read surely,
    all equally often). Splits are runs of neighbours, as even as n allows.
    """
    if not 1 <= splits <= len(probabilities):
        raise UserError(f"splits: {splits}; from 1 to the {len(probabilities)} images")
    scores = []
    for p in probabilities.double().cpu().tensor_split(splits):
        divergence = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))
        scores.append(divergence.sum(1).mean().exp())
    found = torch.stack(scores)
    return Spread(found.mean().item(), found.std(correction=0).item())


def _kernel(products: Tensor, d: int) -> Tensor:
    return (products / d + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the kernel over all pairs."""
    return torch.stack([_kernel(rows @ y.T, x.shape[1]).sum() for rows in x.split(ROWS)]).sum()


def nearest_neighbours(
    samples: Images, training: UInt8[Tensor, "m c h w"], own: Int64[Tensor, " n"] | None = None
) -> tuple[Int64[Tensor, " n"], Float64[Tensor, " n"]]:
    """For each sample the nearest training image (the first among equals) and its distance.

    own: for samples that are training images themselves, their places among them, which are left out.
    Distance: root mean square over the pixels, in units of [-1, 1] (0 for a copy, 2 for black against white).
    """
    return nearest_in_chunks(samples, training.split(ROWS), own)


def nearest_in_chunks(
    samples: Images, chunks: Iterable[UInt8[Tensor, "_ c h w"]], own: Int64[Tensor, " n"] | None = None
) -> tuple[Int64[Tensor, " n"], Float64[Tensor, " n"]]:
    """The same from training images that come a few at a time, in their order."""
    x = samples.cpu().flatten(1).double()
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    index = torch.zeros(len(x), dtype=torch.int64)
    start = 0
    for chunk in chunks:
        y = chunk.cpu().flatten(1).double()
        for i in range(0, len(x), ROWS):
            rows = slice(i, i + ROWS)
            # bytes are whole numbers, so this is exact in float64: a copy is at distance 0
            squares = x[rows].square().sum(1)[:, None] + y.square().sum(1) - 2 * x[rows] @ y.T
            if own is not None:
                place = own[rows] - start
                here = (0 <= place) & (place < len(y))
                squares[here, place[here]] = torch.inf
            value, place = squares.min(1)
            closer = value < best[rows]
            best[rows] = torch.where(closer, value, best[rows])
            index[rows] = torch.where(closer, place + start, index[rows])
        start += len(y)
    return index, (best / x.shape[1]).sqrt() / 127.5


@dataclass(frozen=True)
class Balance:
    """How samples spread over the classes."""

    shares: tuple[float, ...]  # per class, of all samples
    total_variation: float  # from the reference shares: 0 equal, 1 disjoint


def class_shares(classes: Int64[Tensor, " n"] | Float[Tensor, "n classes"], count: int) -> Float64[Tensor, " classes"]:
    """Share of each of `count` classes among labels, or among the likeliest classes of probabilities."""
    labels = classes.argmax(1) if classes.ndim == 2 else classes
    return torch.bincount(labels.cpu(), minlength=count).double() / len(labels)


def class_balance(
    classes: Int64[Tensor, " n"] | Float[Tensor, "n classes"], reference: Float[Tensor, " classes"]
) -> Balance:
    """Shares of the classes among samples (labels or probabilities), and their distance from a reference's shares."""
    shares = class_shares(classes, len(reference))
    distance = (shares - reference.double().cpu()).abs().sum() / 2
    return Balance(tuple(shares.tolist()), distance.item())


@dataclass(frozen=True)
class Confidence:
    """How surely a classifier reads the samples."""

    mean: float  # of the largest probability
    above_90: float  # share of samples whose largest probability is above 0.9
    as_asked: float | None  # share read as the class that was asked for; None if none was asked


def confidence(probabilities: Float[Tensor, "n classes"], asked: Int64[Tensor, " n"] | None = None) -> Confidence:
    """Confidence over samples from their class probabilities and, where classes were asked for, their labels."""
    largest, read = probabilities.double().cpu().max(1)
    as_asked = None if asked is None else (read == asked.cpu()).double().mean().item()
    return Confidence(largest.mean().item(), (largest > 0.9).double().mean().item(), as_asked)
