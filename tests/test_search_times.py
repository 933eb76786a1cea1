"""The search finds known optima, and never asks below t'."""

import math

import pytest
import torch
from test_samplers import GaussianScore

from onejump.data.image_set import ImageSet
from onejump.evaluation.features import PixelDetector
from onejump.judge import Judge
from onejump.model import ConsistencyModel
from onejump.networks.mlp import MLPConfig
from onejump.samplers import ODE, Multistep
from onejump.saved import SavedModel
from onejump.search_times import best_times, golden_section, search_times
from onejump.types import UserError


@pytest.mark.parametrize("best", [-1.9, 0.3, 2.9])
def test_golden_section_finds_the_minimum_with_a_score_an_iteration(best):
    asked = []

    def score(x):
        asked.append(x)
        return abs(x - best) ** 1.5

    assert golden_section(score, -2.0, 3.0, 0.01) == pytest.approx(best, abs=0.01)
    assert len(asked) == 2 + math.ceil(math.log(5 / 0.01) / math.log((1 + 5**0.5) / 2))
    assert all(-2 < x < 3 for x in asked)


@pytest.mark.parametrize("best", [(0.821,), (10.0, 1.2), (20.0, 4.0, 0.9)])
def test_a_convex_toys_optimum_is_found(best):
    """Also where times pull at each other."""

    def score(times):
        away = [math.log(t / b) for t, b in zip(times[1:], best, strict=True)]
        return sum(x * x for x in away) + 0.3 * sum(x * y for x, y in zip(away[:-1], away[1:], strict=True))

    found = best_times(score, len(best) + 1, 80.0, 0.02)
    assert found.times[0] == 80.0 and found.queries < 120
    for t, b in zip(found.times[1:], best, strict=True):
        assert math.log(t) == pytest.approx(math.log(b), abs=0.1)
    assert found.value == score(found.times)


@pytest.mark.parametrize("steps", [2, 3])
def test_nothing_below_t_prime_is_asked_and_t_prime_itself_is(steps):
    asked = []

    def score(times):
        asked.append(times)
        return times[-1]  # the lower, the better

    found = best_times(score, steps, 80.0, 1.0)
    assert found.times[-1] == 1.0 == min(t for times in asked for t in times)
    assert all(a > b for times in asked for a, b in zip(times[:-1], times[1:], strict=True))


class Exact(ConsistencyModel):
    """D of N(0, 0.5^2) as f: from 80 next to nothing is left; after t eps the spread is 0.25 t / (0.25 + t^2)."""

    asked: list

    def forward(self, x, t, s=None, cond=None, key=None):
        self.asked.append(t[0].item())
        return self.denoise(x, t)


def grey_gaussian(n=600):
    x = 0.5 * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    return ImageSet("gaussian", (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8))


def test_the_times_found_beat_the_models_own_on_other_images():
    """Of the spread after the second step, always less than that of the images, t = 0.5 leaves most."""
    net = GaussianScore(0.0, 0.5)
    net.anchor = torch.nn.Parameter(torch.zeros(1))
    model = Exact(net, t_min=0.3)
    model.asked = []
    saved = SavedModel(model, MLPConfig((1, 8, 8)), Multistep(mid=(5.0,)), (1, 8, 8))
    judge = Judge(grey_gaussian(), PixelDetector(), ("fid",))
    found = search_times(judge, saved, 2, 64, seed=3)["2"]
    assert found["times"][0] == 80 and found["times"][1] == pytest.approx(0.5, rel=0.08) and min(model.asked) >= 0.3
    assert found["search"]["seed"] == 4 and found["search"]["n"] == 64
    from onejump.evaluate import evaluate

    assert found["frechet"] < evaluate(judge, saved, (2,), 64, 3)["steps"]["2"]["frechet"]
    assert found["frechet"] != found["search"]["frechet"]


def test_models_without_mid_times_and_other_numbers_of_steps_are_refused():
    saved = SavedModel(ConsistencyModel(GaussianScore()), MLPConfig((1, 8, 8)), ODE(), (1, 8, 8))
    judge = Judge(grey_gaussian(4), PixelDetector(), ("fid",))
    with pytest.raises(UserError, match="only consistency models"):
        search_times(judge, saved, 2, 64, seed=3)
    other = SavedModel(saved.model, saved.network, Multistep(), saved.shape)
    with pytest.raises(UserError, match="--search-times 5: 2, 3 or 4"):
        search_times(judge, other, 5, 64, seed=3)
