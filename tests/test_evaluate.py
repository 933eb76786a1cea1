"""What evaluation.json says is true of images whose numbers are known."""

import pytest
import torch

from onejump.data.digits import digits
from onejump.data.image_set import ImageSet
from onejump.evaluate import Judge, detector_for, evaluate
from onejump.evaluation.features import DigitsDetector, PixelDetector
from onejump.evaluation.statistics import frechet_distance
from onejump.model import ConsistencyModel
from onejump.networks.mlp import MLPConfig
from onejump.run_evaluation import real_images
from onejump.samplers import ODE, Multistep
from onejump.saved import SavedModel
from onejump.types import UserError


@pytest.fixture(scope="module")
def judge():
    return Judge(digits(), detector_for(digits()))


def photos(n=12, name="digits of pi"):
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(name, images)


def test_real_images_have_distance_0_from_themselves_and_are_read_as_what_they_are(judge):
    found = judge.numbers(digits().images, digits().labels)
    assert found["frechet"] == pytest.approx(0, abs=1e-6) and judge.frechet(digits().images) == found["frechet"]
    assert found["nearest_rms"] == 0 and found["n"] == 1797
    assert found["confidence"]["as_asked"] > 0.97 and found["confidence"]["mean"] > 0.9
    assert found["balance_distance"] < 0.02


def test_worse_images_are_further_away(judge):
    """Noise on the digits, and then none of the digit left."""
    generator = torch.Generator().manual_seed(0)
    images = digits().images[:600].int()
    noise = torch.randint(-80, 81, images.shape, generator=generator)
    distances = [judge.frechet(x.clamp(0, 255).to(torch.uint8)) for x in (images, images + noise, 127 + noise)]
    assert distances[0] < distances[1] < distances[2]


def test_one_class_alone_is_off_balance_by_the_share_of_the_others(judge):
    labels = digits().labels
    found = judge.numbers(digits().images[labels == 3], None)
    assert found["balance_distance"] == pytest.approx(1 - (labels == 3).double().mean().item(), abs=0.03)
    assert found["confidence"]["as_asked"] is None


def test_the_reference_is_what_real_images_get(judge):
    reference = judge.reference
    assert reference["n"] == 1797 and reference["fingerprint"] == digits().fingerprint
    assert reference["detector"] == "digits-64" and reference["detector_sha256"] == DigitsDetector().hash
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    a, b = judge.features[order[:899]], judge.features[order[899:]]
    assert reference["real_half_frechet"] == pytest.approx(frechet_distance(a, b))
    pixels = digits().images.flatten(1).double() / 127.5
    chosen = torch.randperm(1797, generator=torch.Generator().manual_seed(1))[:1000]
    distances = torch.cdist(pixels, pixels, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    nearest = distances[chosen].min(1).values / 8
    assert reference["nearest_rms_of_real"] == pytest.approx(nearest.mean().item())


def test_a_real_image_that_is_there_twice_is_at_distance_0_from_its_nearest_other():
    """Of 4 images, two are alike: they count 0; the others count their distance to the nearest of the rest."""
    images = torch.tensor([0, 0, 51, 255], dtype=torch.uint8)[:, None, None, None].expand(4, 1, 8, 8)
    judge = Judge(ImageSet("greys", images), PixelDetector())
    assert judge.reference["nearest_rms_of_real"] == pytest.approx((0 + 0 + 0.4 + 1.6) / 4)


def test_any_other_images_are_judged_by_their_pixels_whatever_their_name():
    assert isinstance(detector_for(digits()), DigitsDetector)
    unlabelled = ImageSet("digits", digits().images)
    for data in (photos(), photos(name="digits"), unlabelled):
        assert isinstance(detector_for(data), PixelDetector)
        judge = Judge(data, detector_for(data))
        assert judge.numbers(data.images, None)["frechet"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_very_few_images_are_judged_as_far_as_they_go(n):
    judge = Judge(photos(n), PixelDetector())
    assert judge.reference["n"] == n and (judge.reference["real_half_frechet"] is None) == (n < 4)
    assert judge.numbers(judge.data.images, None)["nearest_rms"] == 0


def zero_model(names=()):
    """An untrained MLP is zero everywhere, so one step from t = 80 gives c_skip(80) * 80 eps, all but grey."""
    network = MLPConfig(shape=(1, 8, 8), label_dim=len(names), width=8, depth=1)
    return SavedModel(ConsistencyModel(network.build()), network, Multistep(mid=(1.0,)), (1, 8, 8), names)


def test_a_record_names_its_times_calls_and_seed_and_does_not_depend_on_the_batch(judge):
    model = zero_model()
    record = evaluate(judge, model, (1, 2), n=30, seed=11)
    assert record["sampler"] == {"type": "Multistep", "sigma_max": 80.0, "mid": [1.0]}
    found = record["steps"]["2"]
    assert (found["times"], found["nfe"], found["seed"], found["n"]) == ([80.0, 1.0], 2, 11, 30)
    assert found["confidence"]["as_asked"] is None  # no class was asked for
    again = evaluate(judge, model, (1, 2), n=30, seed=11, batch=7)["steps"]["2"]
    assert again["frechet"] == pytest.approx(found["frechet"], rel=1e-3)
    assert evaluate(judge, model, (2,), n=30, seed=12)["steps"]["2"]["frechet"] != found["frechet"]


def test_a_model_with_classes_is_asked_for_each_in_turn(judge):
    found = evaluate(judge, zero_model(tuple("0123456789")), (1,), n=30, seed=0)["steps"]["1"]
    assert found["confidence"]["as_asked"] == pytest.approx(0.1)  # all images alike: one class in ten is right


def test_classes_that_are_not_those_of_the_images_are_not_looked_for(judge):
    """Class 3 of these names is no digit 3."""
    found = evaluate(judge, zero_model(tuple("abcdefghij")), (1,), n=30, seed=0)["steps"]["1"]
    assert found["confidence"]["as_asked"] is None and found["balance_distance"] > 0.5


def test_heun_counts_two_calls_a_step_but_for_the_last(judge):
    from dataclasses import replace

    found = evaluate(judge, replace(zero_model(), sampler=ODE()), (3,), n=10, seed=0)["steps"]["3"]
    assert found["nfe"] == 5 and found["times"][0] == 80 and found["times"][-1] == pytest.approx(0.002)


def test_a_set_on_a_disk_gives_the_numbers_of_the_same_set_in_memory(tmp_path):
    """With those of the nearest real images, which are looked up in one pass."""
    from onejump.data.open import open_training_set
    from onejump.data.png import write_png

    for k, image in enumerate(photos(700).images.permute(0, 2, 3, 1).numpy()):
        (tmp_path / f"{k:03}.png").write_bytes(write_png(image))
    judges = [Judge(open_training_set(tmp_path, stream=on, cache=tmp_path), PixelDetector()) for on in (True, False)]
    samples = photos(720).images[500:]
    streamed, held = (judge.numbers(samples, None) | judge.reference for judge in judges)
    assert streamed == held and held["nearest_rms"] > 0 and held["nearest_rms_of_real"] > 0


def test_metrics_of_neighbours_want_enough_real_images():
    for name, least in (("pr", 4), ("dc", 6)):
        Judge(photos(least), PixelDetector(), (name,))
        with pytest.raises(UserError, match=f"metrics: {name} needs at least {least} real images, not {least - 1}"):
            Judge(photos(least - 1), PixelDetector(), (name,))


def test_a_class_without_images_leaves_black_places_among_the_real_ones():
    images = torch.arange(1, 5, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 1, 2, 2).contiguous()
    data = ImageSet("x", images, torch.tensor([0, 2, 2, 0]), ("a", "b", "c"))
    found = real_images(data, torch.arange(9) % 3)
    assert found[:, 0, 0, 0].tolist() == [1, 0, 2, 4, 0, 3, 1, 0, 2]
