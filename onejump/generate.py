"""Images from a model, each from a seed of its own and the same to the bit in whatever company it is asked for."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from onejump.data.image_set import from_uint8, to_uint8
from onejump.distributed import Team
from onejump.evaluation.reading import one_core_each
from onejump.model import ConsistencyModel
from onejump.samplers import Sampler, noise_for
from onejump.types import Cond, Images, Samples, UserError

CPU_BLOCK, GPU_BLOCK = 8, 64  # images of one network call: a CPU is as fast with few, a GPU wants many
Rounding = Literal["round", "truncate"]


def to_bytes(x: Samples, rounding: Rounding = "round") -> Images:
    """[-1, 1] to bytes: to the nearest (EDM's habit, our default), or cut off to the byte below (OpenAI's, CTM's)."""
    if rounding == "round":
        return to_uint8(x)
    return ((x.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def check_rounding(rounding: str) -> None:
    if rounding not in get_args(Rounding):
        raise UserError(f"rounding: {rounding!r}; choose one of {', '.join(get_args(Rounding))}")


def block_on(device: torch.device) -> int:
    """Images of one network call on this device."""
    return CPU_BLOCK if device.type == "cpu" else GPU_BLOCK


def generate(
    model: ConsistencyModel,
    sampler: Sampler,
    steps: int,
    indices: Sequence[int],
    shape: tuple[int, int, int],
    labels: Tensor | None = None,
    seed: int = 0,
    batch: int = 256,
    block: int | None = None,
    rounding: Rounding = "round",
    decode: Callable[[Samples], Samples] | None = None,
) -> Images:
    """The images with these numbers, uint8 on the CPU. labels: the class asked of each, int64 [n], or None.

    Image k depends, to the bit, on (seed, k), its label, the sampler, the steps, `block` and the device alone: it is
    always row k mod block of a network call with `block` rows, whose other rows are whichever images were asked for
    too, or grey. So neither `batch`, how many images are in flight at once, nor the number of threads or processes
    changes it. block: see `block_on`. Runs in eval mode, and leaves the model in the mode it was in.
    Of a text-to-image model, `labels` are embeddings of prompts, and `decode` makes images of its latents.
    """

    def start(places: list[int]) -> Tensor:
        return noise_for([indices[place] for place in places], shape, sampler.draws(steps), seed).transpose(0, 1)

    def run(noise: Tensor, cond: Cond) -> Samples:
        x0 = sampler(model, noise.transpose(0, 1), steps, cond)
        return decode(x0) if decode else x0

    return _in_blocks(model, start, run, indices, labels, batch, block, rounding)


def generate_by(
    team: Team,
    model: ConsistencyModel,
    sampler: Sampler,
    steps: int,
    n: int,
    shape: tuple[int, int, int],
    labels: Tensor | None = None,
    seed: int = 0,
) -> Images:
    """Images 0 .. n - 1, the very ones of `generate`, on every process of the team, each of which makes its share."""

    def make(mine: list[int]) -> Images:
        asked = None if labels is None else labels[mine]
        return generate(model, sampler, steps, mine, shape, asked, seed, block=block)

    block = block_on(next(model.parameters()).device)
    return by_share(team, n, shape, block, make)


def by_share(
    team: Team, n: int, shape: tuple[int, int, int], block: int, make: Callable[[list[int]], Images]
) -> Images:
    """Images 0 .. n - 1 of this shape on every process of the team, each of which makes whole blocks of them."""
    places = torch.arange(n)
    mine = places[places // block % team.world == team.rank]
    own = make(mine.tolist()) if len(mine) else torch.empty(0, *shape, dtype=torch.uint8)
    images = torch.empty(n, *shape, dtype=torch.uint8)
    return images.index_copy_(0, team.gathered(mine), team.gathered(own))


def denoise_images(
    model: ConsistencyModel,
    images: Images,
    t: float,
    indices: Sequence[int],
    labels: Tensor | None = None,
    seed: int = 0,
    batch: int = 256,
    block: int | None = None,
    rounding: Rounding = "round",
) -> Images:
    """f(x0 + t eps, t) of real images x0, as bytes: what the denoising FID looks at. Their noise and bits as above.

    indices: the number of each image, by which its noise is drawn. A diffusion model gives D(x, t), its estimate of the
    mean, which is blurred. Raises UserError below t', where the model was never trained.
    """
    if t < model.t_min:
        raise UserError(f"times: {t:g} is below t' = {model.t_min:g}, where this model was never trained")

    def start(places: list[int]) -> Tensor:
        eps = noise_for([indices[place] for place in places], tuple(images.shape[1:]), 1, seed)[0]
        return from_uint8(images[places]) + t * eps

    def run(x: Tensor, cond: Cond) -> Samples:
        return model(x, x.new_full((len(x),), t), cond=cond)

    return _in_blocks(model, start, run, indices, labels, batch, block, rounding)


def _in_blocks(
    model: ConsistencyModel,
    start: Callable[[list[int]], Tensor],
    run: Callable[[Tensor, Cond], Samples],
    indices: Sequence[int],
    labels: Tensor | None,
    batch: int,
    block: int | None,
    rounding: Rounding,
) -> Images:
    """start: what the images at some places of `indices` begin with; run: the model on a block of that."""
    training = model.training
    device = next(model.parameters()).device
    size = block or block_on(device)

    def made(places: list[int]) -> Images:
        rows = torch.tensor([indices[place] % size for place in places])
        given = start(places)
        x = given.new_zeros(size, *given.shape[1:]).index_copy_(0, rows, given).to(device)
        cond = None
        if labels is not None:
            cond = labels.new_zeros(size, *labels.shape[1:]).index_copy_(0, rows, labels[places]).to(device)
        with torch.no_grad():  # which each thread has to say for itself
            return to_bytes(run(x, cond)[rows.to(device)], rounding)

    groups = blocks_of(indices, size)
    at_once = max(-(-batch // size), 1)
    out = torch.empty(0)
    model.eval()
    try:
        if device.type == "cpu":
            out = torch.cat(one_core_each(made, groups, at_once))
        else:
            waves = (groups[i : i + at_once] for i in range(0, len(groups), at_once))
            out = torch.cat([torch.cat([made(places) for places in wave]).cpu() for wave in waves])
    finally:
        model.train(training)
    order = torch.tensor([place for places in groups for place in places])
    return torch.empty_like(out).index_copy_(0, order, out)


def blocks_of(indices: Sequence[int], size: int) -> list[list[int]]:
    """The places in `indices` of the images of each block; where a number comes twice, it gets a block of its own."""
    seen: Counter[int] = Counter()
    groups: dict[tuple[int, int], list[int]] = {}
    for place, k in enumerate(indices):
        groups.setdefault((k // size, seen[k]), []).append(place)
        seen[k] += 1
    return list(groups.values())


def balanced_labels(n: int, classes: int) -> Tensor | None:
    """0, 1, ..., classes - 1, 0, 1, ...: the class asked of image k is k mod classes. None for unlabelled models."""
    return torch.arange(n) % classes if classes else None
