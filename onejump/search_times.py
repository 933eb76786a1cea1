"""The best times of a sampler's further steps, found by the Frechet distance of what they give."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onejump.evaluate import How, Judge, evaluate
from onejump.generate import balanced_labels, generate
from onejump.judge import told
from onejump.reference import Tell
from onejump.samplers import Multistep
from onejump.saved import SavedModel
from onejump.types import UserError

GOLDEN = (math.sqrt(5) - 1) / 2
LOWEST = 0.02  # where a search begins for models that know all times: below it one jump changes nothing visible
WITHIN = 0.05  # of ln t: times are found to 5 %
SWEEPS = 3  # over all times but the first, at most
STEPS = (2, 3, 4)
USUAL = 14  # scores that one time takes
MOST = 5000  # images of the search; what it finds is measured on all

Score = Callable[[tuple[float, ...]], float]


@dataclass(frozen=True)
class Best:
    """times: the first and the found ones. value: the score there. queries: how many scores that took."""

    times: tuple[float, ...]
    value: float
    queries: int


def golden_section(score: Callable[[float], float], low: float, high: float, within: float) -> float:
    """Where a function with one minimum between low and high has it, to `within` (Kiefer 1953); a score an iteration.

    Never asks at the ends themselves.
    """
    a, b = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_a, at_b = score(a), score(b)
    while high - low > within:
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - GOLDEN * (high - low)
            at_a = score(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + GOLDEN * (high - low)
            at_b = score(b)
    return a if at_a <= at_b else b


def best_times(score: Score, steps: int, sigma_max: float, low: float, within: float = WITHIN) -> Best:
    """Falling times (sigma_max, t_1, ..) of `steps` jumps with a small score, each of them `low` or more.

    One time after the other by golden section in ln t between its neighbours, with the others held, until a sweep over
    all moves none by more than `within`; `low` itself is tried for the last. A score that has several minima, as
    distances of few images may, yields one of them.
    """
    known: dict[tuple[float, ...], float] = {}

    def ask(logs: Sequence[float]) -> float:
        times = (sigma_max, *(max(math.exp(x), low) for x in logs))
        if times not in known:
            known[times] = score(times)
        return known[times]

    top, bottom = math.log(sigma_max), math.log(low)
    logs = [top + (bottom - top) * (i + 1) / steps for i in range(steps - 1)]
    for _ in range(SWEEPS if steps > 2 else 1):
        before = list(logs)
        for i in range(steps - 1):
            upper, lower = (top, *logs)[i], (*logs, bottom)[i + 1]

            def along(x: float, i: int = i) -> float:
                return ask([*logs[:i], x, *logs[i + 1 :]])

            logs[i] = golden_section(along, lower, upper, within)
        if max(abs(x - y) for x, y in zip(logs, before, strict=True)) <= within:
            break
    if logs[-1] - bottom <= 2 * within:
        ask([*logs[:-1], bottom])
    times = min(known, key=lambda times: known[times])
    return Best(times, known[times], len(known))


def search_times(
    judge: Judge, saved: SavedModel, most: int, n: int, seed: int, batch: int = 512, how: How | None = None
) -> dict[str, Any]:
    """For 2 to `most` steps the times, their Frechet distance on n images, and what the search was.

    Searched on images of one seed (seed + 1) and measured on others (of `seed`), so that the distance told is not that
    of a lucky choice. No time below t'. Raises UserError for another number of steps, and for models that are no
    consistency models.
    """
    sampler, how = saved.sampler, how or How()
    if not isinstance(sampler, Multistep):
        raise UserError("--search-times: only consistency models add noise and jump again; this model has no mid times")
    if most not in STEPS:
        raise UserError(f"--search-times {most}: 2, 3 or 4 steps")
    low, few, found = max(saved.model.t_min, LOWEST), min(n, MOST), {}
    if low >= sampler.sigma_max:
        raise UserError(f"--search-times: nothing lies between t' = {low:g} and {sampler.sigma_max:g}")
    for steps in range(2, most + 1):
        with told(f"search for {steps} steps", judge.show) as tell:
            score = score_of(judge, saved, few, seed + 1, batch, how, tell)
            best = best_times(score, steps, sampler.sigma_max, low)
        measured = replace(how, sampler=Multistep(best.times[0], best.times[1:]))
        there = evaluate(judge, saved, [steps], n, seed, batch, measured)["steps"][str(steps)]
        found[str(steps)] = {
            "times": list(best.times),
            "frechet": there["frechet"],
            "frechet_interval": there["frechet_interval"],
            "search": {"frechet": best.value, "queries": best.queries, "n": few, "seed": seed + 1},
        }
    return found


def score_of(judge: Judge, saved: SavedModel, n: int, seed: int, batch: int, how: How, tell: Tell) -> Score:
    """The Frechet distance of n images of this seed, by the times that make them."""
    labels, asked = balanced_labels(n, len(saved.class_names)), 0

    def score(times: tuple[float, ...]) -> float:
        nonlocal asked
        sampler = Multistep(times[0], times[1:])
        about = (saved.shape, labels, seed, batch, how.block, how.rounding)
        distance = judge.frechet(generate(saved.model, sampler, len(times), range(n), *about))
        asked += 1
        tell(asked, max(asked, USUAL * (2 * len(times) - 3)))
        return distance

    return score
