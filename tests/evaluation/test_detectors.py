"""The shipped classifier reads digits it never saw, and detectors say what they are."""

import pytest
import torch

from onejump.data.digits import digits, digits_split
from onejump.evaluation import digits_classifier
from onejump.evaluation.digits_classifier import accuracy, augment, labelled_digits, load_digits_classifier, train
from onejump.evaluation.features import Detector, DigitsDetector, PixelDetector
from onejump.evaluation.metrics import frechet_distance
from onejump.types import UserError


def test_the_shipped_classifier_reads_held_out_digits():
    _, held_out = digits_split()
    assert held_out.n == 360
    assert accuracy(load_digits_classifier(), held_out.images, held_out.labels) >= 0.97


def test_the_classifier_trains_on_the_training_part_of_the_split():
    images, labels, held_out = labelled_digits()
    training, rest = digits_split()
    assert torch.equal(images[~held_out], training.images) and torch.equal(labels[~held_out], training.labels)
    assert torch.equal(images[held_out], rest.images) and torch.equal(labels[held_out], rest.labels)


def test_training_is_deterministic_learns_and_leaves_torchs_generator_alone():
    training, held_out = digits_split()
    state = torch.get_rng_state()
    one, two = (train(training.images, training.labels, epochs=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert accuracy(one, held_out.images, held_out.labels) > 0.5


def test_augmentation_shifts_by_at_most_one_pixel_and_adds_small_noise():
    x = torch.full((400, 1, 8, 8), -1.0)
    x[:, :, 3, 4] = 1
    shifted = (augment(x) > 0).nonzero()[:, 2:]
    assert len(shifted) == 400  # each bright pixel is still one, and noise makes no other
    assert {tuple(place) for place in shifted.tolist()} == {(i, j) for i in (2, 3, 4) for j in (3, 4, 5)}


def test_features_and_probabilities_do_not_depend_on_the_batch(monkeypatch):
    images, model = digits().images[:50], load_digits_classifier()
    whole = model.features(images), model.probabilities(images)
    monkeypatch.setattr(digits_classifier, "BATCH", 7)
    assert torch.allclose(model.features(images), whole[0], atol=1e-5)
    assert torch.allclose(model.probabilities(images), whole[1], atol=1e-5)
    assert torch.allclose(whole[1].sum(1), torch.ones(50))


def test_the_digits_detector_refuses_other_images():
    with pytest.raises(UserError, match="3x32x32"):
        DigitsDetector()(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_the_pixel_detector_averages_areas():
    images = torch.randint(0, 256, (3, 2, 16, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    expected = images.double().view(3, 2, 8, 2, 8, 3).mean((3, 5)).flatten(1) / 127.5 - 1
    assert torch.allclose(PixelDetector()(images), expected, atol=1e-12)


def test_detectors_tell_themselves_apart():
    detectors: list[Detector] = [DigitsDetector(), PixelDetector(), PixelDetector(size=4)]
    assert len({detector.hash for detector in detectors}) == len({detector.name for detector in detectors}) == 3
    assert [detector(digits().images[:3]).shape[1] for detector in detectors] == [64, 64, 16]


@pytest.mark.parametrize("detector", [DigitsDetector(), PixelDetector()])
def test_more_noise_is_farther_from_the_digits(detector):
    real = digits().images
    reference = detector(real)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        frechet_distance(detector((real + strength * noise).round().clamp(0, 255).to(torch.uint8)), reference)
        for strength in (0, 16, 48, 96)
    ]
    assert distances == sorted(distances) and distances[0] < 1e-9 < 0.01 < distances[1]
