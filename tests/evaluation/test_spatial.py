"""sFID: statistics of Inception's spatial features, and the distance of samples from them."""

import numpy as np
import pytest
import torch

from onejump.data.image_set import ImageSet
from onejump.evaluation.inception import CONVS, InceptionDetector, needed
from onejump.evaluation.reading import Reader
from onejump.judge import Judge
from onejump.reference import published_reference, reference_of
from onejump.types import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Drawn at random, of all layers that the spatial features need."""
    path, rng, arrays = tmp_path_factory.mktemp("weights") / "own.npz", np.random.default_rng(0), {}
    for name in needed("spatial"):
        conv = CONVS[name]
        shape = (conv.out, conv.inside, *conv.kernel)
        scale = (2 / np.prod(shape[1:])) ** 0.5
        arrays[f"{name}.weight"] = (scale * rng.standard_normal(shape, np.float32)).astype(np.float32)
        arrays[f"{name}.bias"] = np.zeros(conv.out, np.float32)
    np.savez(path, **arrays)
    return path


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_spatial_statistics_are_those_of_all_real_images_and_kept_with_the_rest(weights, tmp_path):
    detector, data = (
        InceptionDetector(weights, "64"),
        ImageSet("few", images(3), torch.tensor([0, 0, 1]), ("a", "b")),
    )
    assert reference_of(data, Reader(detector), True, tmp_path, keep_from=0.0).spatial is None
    found = reference_of(data, Reader(detector, ("features", "spatial")), False, tmp_path, keep_from=0.0)
    y = detector.spatial(data.images).double()
    assert torch.allclose(found.spatial.mean, y.mean(0)) and len(found.of_class) == 2  # which the file had before
    assert torch.allclose(found.spatial.covariance, torch.cov(y.T), atol=1e-12)


def test_sfid_is_the_distance_of_spatial_features_from_those_published(weights, tmp_path):
    """Of few images: tr (A B)^1/2 is the sum of the singular values of the products of centred features."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, 20, generator=generator, dtype=torch.float64) + k for k in (0, 1))
    cov = {"sigma": np.eye(64), "sigma_s": np.cov(y.T.numpy())}
    np.savez(tmp_path / "ref.npz", mu=np.zeros(64), mu_s=y.mean(0).numpy(), **cov)
    np.savez(tmp_path / "bare.npz", mu=np.zeros(64), sigma=np.eye(64))
    about = ImageSet("none", images(1)[:0]), InceptionDetector(weights, "64"), ("sfid",)
    judge = Judge(*about, published_reference(tmp_path / "ref.npz"))
    part = {"features": torch.randn(9, 64, generator=generator), "spatial": x, "images": images(9)}
    a, b = ((z - z.mean(0)) / 8**0.5 for z in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    assert judge.judged([part], None)["spatial_frechet"] == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(UserError, match="sfid needs mu_s and sigma_s"):
        Judge(*about, published_reference(tmp_path / "bare.npz"))
