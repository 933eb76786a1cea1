"""Images from a model, each from a seed of its own."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from onejump.data.image_set import to_uint8
from onejump.model import ConsistencyModel
from onejump.samplers import Sampler, noise_for
from onejump.types import Images


@torch.no_grad()
def generate(
    model: ConsistencyModel,
    sampler: Sampler,
    steps: int,
    indices: Sequence[int],
    shape: tuple[int, int, int],
    labels: Tensor | None = None,
    seed: int = 0,
    batch: int = 256,
) -> Images:
    """The images with these numbers, uint8 on the CPU. labels: the class asked of each, int64 [n], or None.

    Image k depends on (seed, k), its label, the sampler and the steps; not on the batch or on its neighbours.
    """
    model.eval()
    device = next(model.parameters()).device
    out = []
    for rows in _batches(len(indices), batch):
        noise = noise_for(indices[rows], shape, sampler.draws(steps), seed).to(device)
        cond = None if labels is None else labels[rows].to(device)
        out.append(to_uint8(sampler(model, noise, steps, cond)).cpu())
    return torch.cat(out)


def _batches(n: int, batch: int) -> Iterator[slice]:
    return (slice(i, min(i + batch, n)) for i in range(0, n, batch))


def balanced_labels(n: int, classes: int, first: int = 0) -> Tensor | None:
    """0, 1, ..., classes - 1, 0, 1, ...: the class asked of image k is k mod classes. None for unlabelled models."""
    return torch.arange(first, first + n) % classes if classes else None
