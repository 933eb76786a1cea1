"""Precision, recall, density and coverage against direct loops and sets whose answer is known."""

import pytest
import torch

from onejump.evaluation.manifold import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from onejump.types import UserError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distances(x, y):
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def radii(x, k):
    return distances(x, x).fill_diagonal_(torch.inf).sort(1).values[:, k - 1]


@pytest.mark.parametrize("rows", [5, 2048])
def test_they_equal_their_definitions(monkeypatch, rows):
    monkeypatch.setattr("onejump.evaluation.manifold.ROWS", rows)
    samples, real = 0.7 * normal(23, 3) + 0.4, normal(31, 3, seed=1)
    in_real = distances(samples, real) <= radii(real, 3)
    in_samples = distances(real, samples) <= radii(samples, 3)
    expected = PrecisionRecall(in_real.any(1).double().mean().item(), in_samples.any(1).double().mean().item())
    assert precision_recall(samples, real) == expected and 0 < expected.recall < 1
    held = distances(samples, real) <= radii(real, 5)
    found = density_coverage(samples, real)
    assert found.density == pytest.approx(held.sum().item() / (5 * 23), rel=1e-12)
    assert found.coverage == held.any(0).double().mean().item()


def test_equal_sets_lie_in_each_other_also_where_images_repeat():
    x = normal(40, 6).float() + 100
    x[7:20] = x[3]  # more copies than neighbours counted: balls of radius 0
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert precision_recall(x[order], x) == PrecisionRecall(1.0, 1.0)
    assert density_coverage(x[order], x).coverage == 1.0


def test_disjoint_sets_share_nothing():
    real = normal(30, 4)
    assert precision_recall(normal(20, 4, seed=1) + 50, real) == PrecisionRecall(0.0, 0.0)
    assert density_coverage(normal(20, 4, seed=1) + 50, real) == DensityCoverage(0.0, 0.0)


def test_one_mode_out_of_two_is_precise_and_recalls_half():
    left, right = normal(60, 2), normal(60, 2, seed=1) + 40
    found = precision_recall(normal(60, 2, seed=2) * 0.5, torch.cat([left, right]))
    assert found.precision > 0.9 and 0.2 < found.recall <= 0.5
    assert density_coverage(normal(60, 2, seed=2), torch.cat([left, right])).coverage <= 0.5


def test_a_stray_sample_raises_recall_but_not_coverage():
    real, samples = normal(50, 2), normal(50, 2, seed=1) * 0.05
    stray = torch.cat([samples, torch.tensor([[300.0, 0.0]]).double()])
    assert precision_recall(stray, real).recall > 0.2 > precision_recall(samples, real).recall
    assert density_coverage(stray, real).coverage == density_coverage(samples, real).coverage


def test_density_of_real_images_is_about_1():
    found = density_coverage(normal(400, 3), normal(400, 3, seed=1))
    assert 0.9 < found.density < 1.1 and found.coverage > 0.9


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="3 images: balls .* at least 4"):
        precision_recall(normal(9, 2), normal(3, 2))
