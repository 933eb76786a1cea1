"""The order of images is a pure function of (seed, step), and bytes survive the trip to [-1, 1] and back."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from onejump.data.digits import digits, digits_split
from onejump.data.image_set import ImageSet, from_uint8, to_uint8


def numbered(n: int = 21, **options: object) -> ImageSet:
    """Image i is filled with the byte i in its left column and 255 - i in the right one; its label is i."""
    left = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 1)
    images = torch.cat([left, 255 - left], 3)
    return ImageSet("numbered", images, torch.arange(n), tuple(map(str, range(n))), **options)


def seen(images: ImageSet, step: int, batch: int, **arguments: int) -> list[int]:
    return images.batch(step, batch, **{"seed": 0, **arguments})[1].tolist()


def test_bytes_survive_the_trip_and_the_ends_are_exact():
    every_byte = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = from_uint8(every_byte)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(to_uint8(x), every_byte)


def test_to_uint8_rounds_to_the_nearest_byte_and_clamps():
    x = torch.tensor([-1.5, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 1 - 0.49 / 127.5, 1 - 0.51 / 127.5, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 1, 255, 254, 255]


def test_no_image_repeats_within_an_epoch_and_epochs_differ():
    images = numbered(21)
    order = [i for step in range(9) for i in seen(images, step, 7)]
    epochs = [order[i : i + 21] for i in range(0, 63, 21)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_straddle_epochs_and_may_exceed_the_set():
    images = numbered(5)
    order = [i for step in range(5) for i in seen(images, step, 12)]
    assert all(sorted(order[i : i + 5]) == list(range(5)) for i in range(0, 60, 5))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_processes_split_the_batch_of_one_process(world):
    images = numbered(21)
    for step in (0, 2, 5, 40):
        whole = seen(images, step, 8)
        parts = [seen(images, step, 8 // world, rank=rank, world=world) for rank in range(world)]
        assert [i for turn in zip(*parts, strict=True) for i in turn] == whole


def test_a_batch_depends_on_its_arguments_alone():
    images, again = numbered(21), numbered(21)
    forwards = [seen(images, step, 4) for step in range(12)]
    backwards = [seen(again, step, 4) for step in reversed(range(12))]
    assert forwards == backwards[::-1]
    assert seen(images, 3, 4, seed=1) != seen(images, 3, 4)


def test_torch_generator_is_left_alone():
    state = torch.get_rng_state()
    numbered(21, flip=True).batch(3, 4, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_permutation_is_equally_likely():
    images = numbered(3)
    orders = [tuple(seen(images, 0, 3, seed=seed)) for seed in range(1200)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 6
    assert ((counts - 200) ** 2 / 200).sum() < 20.5  # chi-squared, 5 degrees: 0.1 % of fair coins exceed it


def test_images_and_labels_stay_together():
    x0, labels = numbered(21).batch(2, 8, seed=0)
    assert x0.dtype == torch.float32
    assert torch.equal(to_uint8(x0)[:, 0, 0, 0].long(), labels)


def test_flip_mirrors_half_of_the_images_afresh_every_epoch_and_purely():
    plain, flipped = numbered(21), numbered(21, flip=True)
    mirrored = []
    for step in range(40):
        a, b = plain.batch(step, 21, seed=0), flipped.batch(step, 21, seed=0)
        assert torch.equal(a[1], b[1])
        is_mirrored = (b[0] != a[0]).flatten(1).any(1)
        assert torch.equal(b[0][is_mirrored], a[0][is_mirrored].flip(-1))
        mirrored.append(is_mirrored[a[1].argsort()])
    coins = torch.stack(mirrored).double()
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / 840**0.5
    assert (coins.mean(0) > 0.1).all() and (coins.mean(0) < 0.9).all()  # no image is stuck on one side
    again = numbered(21, flip=True)
    whole, halves = again.batch(7, 6, seed=0)[0], [again.batch(7, 3, 0, rank, 2)[0] for rank in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), whole)


def test_fingerprint_tells_pixels_labels_and_shapes_apart():
    base = numbered(21)
    other_pixel = base.images.clone()
    other_pixel[3, 0, 1, 1] ^= 1
    variants = [
        base,
        dataclasses.replace(base, images=other_pixel),
        dataclasses.replace(base, labels=base.labels.flip(0)),
        dataclasses.replace(base, labels=None, class_names=()),
        dataclasses.replace(base, images=base.images.transpose(2, 3).reshape(21, 2, 2, 1)),
    ]
    assert len({variant.fingerprint for variant in variants}) == 5
    assert dataclasses.replace(base, name="other", flip=True).fingerprint == base.fingerprint


def test_digits_are_those_of_scikit_learn_on_the_full_scale():
    data, ours = load_digits(), digits()
    assert ours.shape == (1, 8, 8) and ours.n == 1797 and ours.classes == 10
    assert ours.images.min() == 0 and ours.images.max() == 255
    assert np.array_equal((ours.images[:, 0].numpy() * (16 / 255)).round(), data.images)
    assert np.array_equal(ours.labels.numpy(), data.target)
    assert ours.class_names[int(ours.labels[5])] == str(data.target[5])


def test_the_split_parts_the_digits():
    training, held_out = digits_split()
    assert (training.n, held_out.n) == (1437, 360)
    assert torch.equal(held_out.images, digits().images[::5]) and torch.equal(held_out.labels, digits().labels[::5])
    together = torch.cat([training.images, held_out.images]).flatten(1)
    assert torch.equal(together.unique(dim=0), digits().images.flatten(1).unique(dim=0))
    assert held_out.labels.bincount(minlength=10).min() >= 20  # enough of every class to judge by
