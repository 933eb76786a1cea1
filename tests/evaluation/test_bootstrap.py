"""The interval of a Frechet distance is as wide as distances of fresh samples spread."""

import pytest
import torch

from onejump.evaluation.bootstrap import frechet_influence, frechet_interval
from onejump.evaluation.statistics import GaussianStatistics, frechet_distance


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MIX = normal(6, 6, seed=100)
REFERENCE = GaussianStatistics.of((normal(500, 6, seed=101) @ MIX.T) * 1.3)


def draw(seed: int, n: int = 400) -> torch.Tensor:
    return normal(n, 6, seed=seed) @ MIX.T + 0.5


@pytest.mark.parametrize("n", [5, 40])
def test_influence_is_the_derivative_of_the_distance(n):
    """An image that counts a little more moves the distance by its influence over n; also where n < d."""
    x = draw(0, n)
    influence = frechet_influence(x, REFERENCE)
    h = 1e-5
    for i in (0, n - 1):
        ends = []
        for sign in (1, -1):
            w = torch.full((n,), 1 / n, dtype=torch.float64)
            w = (1 - sign * h) * w
            w[i] += sign * h
            mean = w @ x
            covariance = ((x - mean).T * w) @ (x - mean) * (n / (n - 1))
            ends.append(frechet_distance(GaussianStatistics(mean, covariance, n), REFERENCE))
        assert influence[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-4)
    assert influence.mean().abs() < 1e-12


def test_the_interval_is_as_wide_as_fresh_samples_spread():
    spread = torch.tensor([frechet_distance(draw(seed), REFERENCE) for seed in range(60)]).std().item()
    widths = []
    for seed in range(4):
        x = draw(seed)
        low, high = frechet_interval(x, REFERENCE, frechet_distance(x, REFERENCE))
        widths.append((high - low) / (2 * 1.96))
    assert sum(widths) / 4 == pytest.approx(spread, rel=0.25)


def test_the_interval_holds_the_distance_and_repeats():
    x = draw(1)
    distance = frechet_distance(x, REFERENCE)
    low, high = frechet_interval(x, REFERENCE, distance)
    assert 0 <= low < distance < high
    assert (low, high) == frechet_interval(x, REFERENCE, distance)
    narrow = frechet_interval(x, REFERENCE, distance, share=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert frechet_interval(x, REFERENCE, 0.0)[0] == 0.0  # distances are not negative
