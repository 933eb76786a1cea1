"""Distances between sets against closed forms, other libraries' matrix roots and direct double loops."""

import math

import pytest
import torch
from scipy.linalg import sqrtm

from onejump.evaluation.metrics import (
    class_balance,
    confidence,
    inception_score,
    kid,
    kid_subsets,
    nearest_neighbours,
)
from onejump.evaluation.statistics import GaussianStatistics, Moments, frechet_distance
from onejump.types import UserError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(n: int, d: int) -> torch.Tensor:
    """n features with mean exactly 0 and unbiased covariance exactly 1."""
    x = normal(n, d)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T


def correlated(n: int, d: int, seed: int) -> torch.Tensor:
    return normal(n, d, seed=seed) @ normal(d, d, seed=seed + 100) + normal(d, seed=seed + 200)


def test_frechet_equals_the_closed_form_for_diagonal_covariances():
    z, (s, q) = whitened(300, 4), torch.tensor([[1.0, 2.0, 0.5, 3.0], [2.0, 2.0, 0.1, 0.0]]).double()
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    expected = shift.square().sum() + (s - q).square().sum()
    assert frechet_distance(z * s, z * q + shift) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_equals_the_closed_form_in_one_dimension_with_unbiased_variances():
    a, b = normal(7, 1), 3 * normal(5, 1, seed=1) + 1
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_equals_the_formula_with_scipys_matrix_root():
    a, b = correlated(200, 12, seed=1), correlated(150, 12, seed=2)
    ga, gb = GaussianStatistics.of(a), GaussianStatistics.of(b)
    root = sqrtm((ga.covariance @ gb.covariance).numpy())
    expected = (a.mean(0) - b.mean(0)).square().sum() + ga.covariance.trace() + gb.covariance.trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item() - 2 * root.trace().real, rel=1e-9)


def test_frechet_with_fewer_images_than_features_equals_the_nuclear_norm_of_the_samples():
    a, b = correlated(10, 40, seed=3), correlated(14, 40, seed=4)
    xa, xb = (a - a.mean(0)) / 9**0.5, (b - b.mean(0)) / 13**0.5
    cross = torch.linalg.svdvals(xa @ xb.T).sum()  # tr (A^1/2 B A^1/2)^1/2 without any root of a singular matrix
    expected = (a.mean(0) - b.mean(0)).square().sum() + xa.square().sum() + xb.square().sum() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("n", [10, 300])
def test_frechet_of_a_set_with_itself_is_zero(n):
    a = correlated(n, 40, seed=5)
    scale = GaussianStatistics.of(a).covariance.trace().item()
    assert frechet_distance(a, a) <= 1e-12 * scale


def test_frechet_is_symmetric_and_blind_to_rotation_and_order():
    a, b = correlated(60, 9, seed=6), correlated(80, 9, seed=7)
    rotation = torch.linalg.qr(normal(9, 9, seed=8))[0]
    reference = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(reference, rel=1e-9)
    assert frechet_distance(a @ rotation + 3, b.flip(0) @ rotation + 3) == pytest.approx(reference, rel=1e-9)
    assert frechet_distance(5 * a, 5 * b) == pytest.approx(25 * reference, rel=1e-9)


def test_cached_statistics_give_the_distance_of_the_features():
    a, b = correlated(60, 9, seed=6), correlated(80, 9, seed=7)
    cached = GaussianStatistics.of(b)
    assert cached.n == 80
    assert torch.allclose(cached.covariance, torch.cov(b.T), rtol=1e-12)
    assert frechet_distance(a, cached) == frechet_distance(a, b)


def test_float32_features_with_a_large_offset_keep_their_precision():
    a, b = correlated(60, 9, seed=6), correlated(80, 9, seed=7)
    shifted = [(x + 4096).float() for x in (a, b)]
    assert frechet_distance(*shifted) == pytest.approx(frechet_distance(a, b), rel=1e-3)


def test_frechet_refuses_single_images_and_two_detectors():
    with pytest.raises(UserError, match="at least 2"):
        frechet_distance(normal(1, 4), normal(5, 4))
    with pytest.raises(UserError, match="64 and of 192"):
        frechet_distance(GaussianStatistics.of(normal(5, 64)), GaussianStatistics.of(normal(5, 192)))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_statistics_in_one_pass_are_those_of_all_features_at_once(size):
    """Also far from 0, where sums of squares would lose every digit, and in two heaps that are put together."""
    a = correlated(100, 9, seed=6) * 1e-3 + 1e6
    found = GaussianStatistics.of_batches(a.split(size))
    assert found.n == 100 and torch.allclose(found.mean, a.mean(0), rtol=1e-14)
    assert torch.allclose(found.covariance, torch.cov((a - 1e6).T), rtol=1e-5, atol=1e-11)
    left, right = Moments(), Moments()
    for heap, rows in ((left, a[:30]), (right, a[30:])):
        for few in rows.split(size):
            heap.add(few)
    left.merge(right)
    left.merge(Moments())
    assert torch.allclose(left.statistics().covariance, found.covariance, rtol=1e-6, atol=1e-11)


def test_frechet_and_kernel_distance_equal_those_of_torchmetrics():
    """Bare, with the same features: a second implementation."""
    fid, kernel_distance = (pytest.importorskip(f"torchmetrics.image.{name}") for name in ("fid", "kid"))
    a, b = (correlated(80, 8, seed=seed).float() / 4 for seed in (1, 2))

    class Same(torch.nn.Module):
        num_features = 8

        def forward(self, x):
            return x.flatten(1)

    theirs = fid.FrechetInceptionDistance(feature=Same(), input_img_size=(1, 2, 4), normalize=True)
    theirs.set_dtype(torch.float64)
    kernel = kernel_distance.KernelInceptionDistance(feature=Same(), subsets=1, subset_size=80, normalize=True)
    for metric in (theirs, kernel):
        metric.used_custom_model = True
        for x, real in ((a, True), (b, False)):
            metric.update(x.view(-1, 1, 2, 4), real=real)
    assert frechet_distance(a, b) == pytest.approx(theirs.compute().item(), rel=1e-6)
    assert kid(a, b) == pytest.approx(kernel.compute()[0].item(), rel=1e-4)  # theirs in float32


def direct_kid(a: torch.Tensor, b: torch.Tensor) -> float:
    def k(x, y):
        return ((x @ y).item() / len(x) + 1) ** 3

    n, m = len(a), len(b)
    within_a = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_a + within_b - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


def test_kid_equals_the_double_loop(monkeypatch):
    monkeypatch.setattr("onejump.evaluation.metrics.ROWS", 5)
    a, b = normal(13, 6), 1.5 * normal(8, 6, seed=1) + 0.3
    assert kid(a, b) == pytest.approx(direct_kid(a, b), rel=1e-11)


def test_kid_is_unbiased():
    pool = normal(40, 5, seed=9)
    splits = [torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(400)]
    values = torch.tensor([kid(pool[order[:20]], pool[order[20:]]) for order in splits])
    # over all splits of one pool the expectation is that of two draws of the same law: 0
    assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5
    assert (values < 0).any()
    diagonal = (pool.square().sum(1) / 5 + 1).pow(3).mean() / 20  # what each set's own pairs would add
    assert diagonal > 10 * values.std() / len(values) ** 0.5
    assert kid(pool[:20], pool[20:] + 1) > values.max()


def test_nearest_neighbours_equal_a_direct_search(monkeypatch):
    monkeypatch.setattr("onejump.evaluation.metrics.ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(0, 256, (15, 3, 4, 4), generator=generator).to(torch.uint8)
    training = torch.randint(0, 256, (24, 3, 4, 4), generator=generator).to(torch.uint8)
    x, y = (images.double() / 127.5 - 1 for images in (samples, training))
    rms = (x[:, None] - y).square().flatten(2).mean(2).sqrt()
    index, distance = nearest_neighbours(samples, training)
    assert torch.equal(index, rms.argmin(1))
    assert torch.allclose(distance, rms.min(1).values, rtol=1e-12)


def test_a_copy_is_at_distance_zero_and_black_from_white_at_two():
    training = torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    training[17] = training[4]
    index, distance = nearest_neighbours(training[[9, 17]], training)
    assert index.tolist() == [9, 4] and distance.tolist() == [0.0, 0.0]
    black, white = torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    assert nearest_neighbours(black, white)[1].item() == pytest.approx(2, rel=1e-12)


def test_class_balance_counts_labels_and_likeliest_classes():
    labels, reference = torch.tensor([0, 0, 2, 1]), torch.tensor([0.25, 0.25, 0.25, 0.25])
    balance = class_balance(labels, reference)
    assert balance.shares == (0.5, 0.25, 0.25, 0.0)
    assert balance.total_variation == pytest.approx(0.25)
    probabilities = torch.nn.functional.one_hot(labels, 4) * 0.5 + 0.1
    assert class_balance(probabilities, reference) == balance
    assert class_balance(torch.tensor([3, 3]), torch.tensor([1.0, 0, 0, 0])).total_variation == 1


def test_confidence_by_hand():
    probabilities = torch.tensor([[0.95, 0.05], [0.2, 0.8], [0.6, 0.4], [0.01, 0.99]])
    result = confidence(probabilities, asked=torch.tensor([0, 1, 1, 0]))
    assert result.mean == pytest.approx((0.95 + 0.8 + 0.6 + 0.99) / 4)
    assert (result.above_90, result.as_asked) == (0.5, 0.5)
    assert confidence(probabilities).as_asked is None


def test_kid_of_subsets_is_as_unbiased_and_that_of_whole_sets_is_kid():
    a, b = normal(30, 4), normal(50, 4, seed=1) + 0.5
    whole = kid_subsets(a, b, subsets=3, size=1000)
    assert whole.mean == pytest.approx(kid(a, b), rel=1e-9) and whole.std == pytest.approx(0, abs=1e-12)
    some = kid_subsets(a, b, subsets=300, size=10)
    assert some == kid_subsets(a, b, subsets=300, size=10) != kid_subsets(a, b, subsets=300, size=10, seed=1)
    assert abs(some.mean - kid(a, b)) < 4 * some.std / 300**0.5


def test_inception_score_lies_between_1_and_the_number_of_classes():
    sure = torch.eye(5).repeat(4, 1)  # every class equally often, without a doubt
    assert inception_score(sure, splits=4).mean == pytest.approx(5)
    assert inception_score(sure[[2]].repeat(8, 1), splits=1).mean == pytest.approx(1)  # all the same class: no variety
    assert inception_score(torch.full((8, 5), 0.2), splits=2).mean == pytest.approx(1)  # all in doubt


def test_inception_score_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]).double()
    q = p.mean(0)
    divergence = sum((x * (x / y).log()).item() for row in p for x, y in zip(row, q, strict=True)) / 3
    assert inception_score(p, splits=1).mean == pytest.approx(math.exp(divergence), rel=1e-12)
    with pytest.raises(UserError, match="splits: 4"):
        inception_score(p, splits=4)
