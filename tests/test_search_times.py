"""The search finds known optima, and never asks below t'."""

import math
from dataclasses import replace

import pytest
import torch
from test_samplers import GaussianScore

from onejump.data.image_set import ImageSet
from onejump.evaluate import How
from onejump.evaluation.features import PixelDetector
from onejump.judge import Judge
from onejump.model import ConsistencyModel
from onejump.networks.mlp import MLPConfig
from onejump.parts import Workers
from onejump.samplers import ODE, Multistep
from onejump.saved import SavedModel
from onejump.search_times import best_times, golden_section, rounded_up, search_times
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

    own = evaluate(judge, saved, (2,), 64, 3)["steps"]["2"]
    assert found["frechet"] < own["frechet"] == found["own"]["frechet"] and not found["kept_own"]
    assert found["frechet"] != found["search"]["frechet"]
    best = replace(saved, sampler=Multistep(mid=tuple(found["times"][1:])))
    assert evaluate(judge, best, (2,), 64, 3)["steps"]["2"]["frechet"] == found["frechet"]  # of the times as told


def test_times_that_are_no_better_on_other_images_are_not_taken():
    """The model's own times are the best for the very images on which those found on others are measured."""
    net = GaussianScore(0.0, 0.5)
    net.anchor = torch.nn.Parameter(torch.zeros(1))
    model = Exact(net)
    model.asked = []
    saved = SavedModel(model, MLPConfig((1, 8, 8)), Multistep(mid=(5.0,)), (1, 8, 8))
    judge = Judge(grey_gaussian(), PixelDetector(), ("fid",))
    best = search_times(judge, saved, 2, 20, seed=2)["2"]["times"]  # searched on images of seed 3
    found = search_times(judge, replace(saved, sampler=Multistep(mid=(best[1],))), 2, 20, seed=3)["2"]
    assert found["kept_own"] and found["times"] == best
    assert found["frechet"] == found["own"]["frechet"] < found["search"]["measured"]


def test_times_are_rounded_to_what_can_be_told_and_never_down():
    rounded = {1.0: 1.0, 1.23401: 1.235, 0.02: 0.02, 0.0200001: 0.02001, 9.99999: 10.0, 79.9: 79.9}
    assert [rounded_up(t) for t in rounded] == list(rounded.values())


def test_models_without_mid_times_and_other_numbers_of_steps_are_refused():
    saved = SavedModel(ConsistencyModel(GaussianScore()), MLPConfig((1, 8, 8)), ODE(), (1, 8, 8))
    judge = Judge(grey_gaussian(4), PixelDetector(), ("fid",))
    with pytest.raises(UserError, match="only consistency models"):
        search_times(judge, saved, 2, 64, seed=3)
    other = SavedModel(saved.model, saved.network, Multistep(), saved.shape)
    with pytest.raises(UserError, match="--search-times 5: 2, 3 or 4"):
        search_times(judge, other, 5, 64, seed=3)


def test_a_search_that_was_stopped_goes_on_to_the_same_times(tmp_path):
    """What was scored is not made again, and what it was scored on is not kept."""
    net = GaussianScore(0.0, 0.5)
    net.anchor = torch.nn.Parameter(torch.zeros(1))
    model = Exact(net, t_min=0.3)
    saved = SavedModel(model, MLPConfig((1, 8, 8)), Multistep(mid=(5.0,)), (1, 8, 8))
    judge = Judge(grey_gaussian(100), PixelDetector(), ("fid",))
    model.asked = []
    plain = search_times(judge, saved, 2, 30, seed=3)["2"]
    calls, how = len(model.asked), How(workers=Workers(tmp_path))

    class Full(list):
        def append(self, item):
            if len(self) >= calls // 2:
                raise KeyboardInterrupt
            super().append(item)

    model.asked = Full()
    with pytest.raises(KeyboardInterrupt):
        search_times(judge, saved, 2, 30, seed=3, how=how)
    done = len(list(tmp_path.glob("*.safetensors")))
    assert done > 2
    model.asked = []
    resumed = search_times(judge, saved, 2, 30, seed=3, how=how)["2"]
    assert {**resumed, "seconds": 0} == {**plain, "seconds": 0}
    assert len(model.asked) == calls - done * calls // (plain["search"]["queries"] + 2)  # and two measurements
    assert len(list(tmp_path.glob("*.safetensors"))) == plain["search"]["queries"]
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2  # the measurements
