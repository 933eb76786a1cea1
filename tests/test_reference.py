"""Reference statistics are measured once, kept whole or not at all, and read from published files."""

import numpy as np
import pytest
import torch

from onejump.data.digits import digits
from onejump.data.image_set import ImageSet
from onejump.evaluation.features import DigitsDetector, PixelDetector
from onejump.evaluation.reading import Reader
from onejump.evaluation.statistics import GaussianStatistics, frechet_distance
from onejump.judge import Judge
from onejump.reference import cache_folder, published_reference, reference_of
from onejump.types import UserError

READER = Reader(PixelDetector())


class Counting:
    """A set that counts how often its images are looked at."""

    def __init__(self, data):
        self.data, self.looks = data, 0

    def __getattr__(self, name):
        return getattr(self.data, name)

    def chunks(self, size):
        self.looks += 1
        return self.data.chunks(size)


def few(n=40, classes=()):
    images = torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
    return ImageSet("few", images, torch.arange(n) % len(classes) if classes else None, classes)


def test_it_is_that_of_all_images_by_halves_and_by_classes():
    data = few(700, ("a", "b", "c"))
    found, features = reference_of(data, READER, by_class=True), PixelDetector()(data.images)
    whole = GaussianStatistics.of(features)
    assert found.statistics.n == 700 and torch.equal(found.sample, features)
    assert torch.allclose(found.statistics.mean, whole.mean, atol=1e-12)
    assert torch.allclose(found.statistics.covariance, whole.covariance, atol=1e-12)
    a, b = features[torch.randperm(700, generator=torch.Generator().manual_seed(0))].tensor_split(2)
    assert found.half == pytest.approx(frechet_distance(a, b), rel=1e-9)
    for c in range(3):
        own = GaussianStatistics.of(features[c::3])
        assert found.of_class[c].n == own.n
        assert torch.allclose(found.of_class[c].covariance, own.covariance, atol=1e-12)


def test_what_was_kept_is_what_was_measured(tmp_path):
    data = Counting(few(classes=("a", "b")))
    kept = {"cache": tmp_path, "keep_from": 0.0}
    first = reference_of(data, READER, by_class=True, **kept)
    again = reference_of(data, READER, by_class=True, **kept)
    assert data.looks == 1 and again.half == first.half and torch.equal(again.sample, first.sample)
    for one, other in zip((first.statistics, *first.of_class), (again.statistics, *again.of_class), strict=True):
        assert one.n == other.n and torch.equal(one.mean, other.mean) and torch.equal(one.covariance, other.covariance)
    reference_of(Counting(few(41)), READER, **kept)
    reference_of(data, Reader(PixelDetector(4)), **kept)
    assert data.looks == 2 and len(list(tmp_path.rglob("*.safetensors"))) == 3  # by content, and by detector


def test_classes_that_were_not_measured_are_measured_when_they_are_asked_for(tmp_path):
    data, kept = Counting(few(classes=("a", "b"))), {"cache": tmp_path, "keep_from": 0.0}
    assert reference_of(data, READER, **kept).of_class == ()
    assert len(reference_of(data, READER, by_class=True, **kept).of_class) == 2
    assert len(reference_of(data, READER, **kept).of_class) == 2 and data.looks == 2


@pytest.mark.parametrize("place", [3, 300, -9])
def test_a_damaged_file_is_measured_again_and_said(tmp_path, capsys, place):
    data, kept = Counting(few()), {"cache": tmp_path, "keep_from": 0.0}
    first = reference_of(data, READER, **kept)
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    again = reference_of(data, READER, **kept)
    assert data.looks == 2 and torch.equal(first.statistics.covariance, again.statistics.covariance)
    assert "damaged" in (said := capsys.readouterr().err) and str(path) in said
    path.write_bytes(bytes(content[:-40]))
    reference_of(data, READER, **kept)
    assert data.looks == 3


def test_what_takes_no_time_leaves_no_file(tmp_path):
    reference_of(few(), READER, cache=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("ONEJUMP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("ONEJUMP_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "onejump")


def test_published_statistics_give_the_distance_that_the_images_give(tmp_path):
    features = DigitsDetector()(digits().images)
    own = GaussianStatistics.of(features)
    path = tmp_path / "digits.npz"
    np.savez(path, mu=own.mean.numpy(), sigma=own.covariance.numpy(), arr_0=np.zeros(3, np.uint8))
    nothing = ImageSet("none", digits().images[:0])
    judge = Judge(nothing, DigitsDetector(), ("fid",), published_reference(path))
    images = digits().images[:300].flip(3)
    found = judge.numbers(images, None)
    assert found["frechet"] == pytest.approx(frechet_distance(DigitsDetector()(images), features), rel=1e-9)
    assert set(found) == {"frechet", "frechet_interval", "n"}
    assert judge.reference["n"] is None and len(judge.reference["reference_sha256"]) == 64


def refused(tmp_path, match, **arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=match):
        published_reference(tmp_path / "a.npz")


def test_files_that_hold_no_statistics_are_refused(tmp_path):
    refused(tmp_path, "no arrays mu and sigma", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    refused(tmp_path, "a finite mean", mu=np.zeros(3), sigma=np.eye(2))
    refused(tmp_path, "a finite mean", mu=np.array([0, np.nan]), sigma=np.eye(2))
    refused(tmp_path, "not symmetric", mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0.0, 1.0]]))
    refused(tmp_path, "not readable", mu=np.array([{}]), sigma=np.eye(2))  # a pickle
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(UserError, match="not readable"):
        published_reference(tmp_path / "b.npz")
    with pytest.raises(UserError, match="no such file"):
        published_reference(tmp_path / "c.npz")


def test_statistics_of_another_detector_are_refused_before_any_work(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="64 and of 2048 dimensions"):
        Judge(digits(), DigitsDetector(), ("fid",), published_reference(tmp_path / "a.npz"))
    with pytest.raises(UserError, match="kid compares with real images"):
        Judge(ImageSet("none", digits().images[:0]), DigitsDetector(), ("kid",))
    with pytest.raises(UserError, match="sfid: the detector digits-64 has no spatial"):
        Judge(digits(), DigitsDetector(), ("sfid",))
