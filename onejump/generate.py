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

    The noise and the class of image k depend on (seed, k) and its label alone, exactly; its pixels, given the sampler
    and the steps, up to rounding: batches of another size may round another way. Runs in eval mode, and leaves the
    model in the mode it was in.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    out = []
    try:
        for rows in _batches(len(indices), batch):
            noise = noise_for(indices[rows], shape, sampler.draws(steps), seed).to(device)
            cond = None if labels is None else labels[rows].to(device)
            out.append(to_uint8(sampler(model, noise, steps, cond)).cpu())
    finally:
        model.train(training)
    return torch.cat(out)


def _batches(n: int, batch: int) -> Iterator[slice]:
    return (slice(i, min(i + batch, n)) for i in range(0, n, batch))


def balanced_labels(n: int, classes: int) -> Tensor | None:
    """0, 1, ..., classes - 1, 0, 1, ...: the class asked of image k is k mod classes. None for unlabelled models."""
    return torch.arange(n) % classes if classes else None
