"""The best times of a sampler's further steps, found by the Frechet distance of what they give."""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from onejump.config_json import to_json
from onejump.evaluate import How, Judge, evaluate, job_of
from onejump.evaluation.reading import FEATURES, Reader
from onejump.evaluation.statistics import GaussianStatistics, frechet_distance
from onejump.generate import balanced_labels, block_on
from onejump.judge import told
from onejump.parts import Generated, Job
from onejump.reference import Tell, read_checked, write_checked
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


def rounded_up(t: float) -> float:
    """To four digits, never below: what is measured is what a command line can be told in full."""
    shown = float(f"{t:.4g}")
    return shown if shown >= t else float(f"{shown + 10.0 ** (math.floor(math.log10(t)) - 3):.4g}")


def search_times(
    judge: Judge, saved: SavedModel, most: int, n: int, seed: int, batch: int = 512, how: How | None = None
) -> dict[str, Any]:
    """For 2 to `most` steps the best times, their Frechet distance on n images, and what the search was.

    Searched on images of one seed (seed + 1) and measured on others (of `seed`), so that the distance told is not that
    of a lucky choice. Where those found are no better there than the model's own (`own`, None if it has none for these
    steps), its own are kept (`kept_own`). No time below t'. Raises UserError for another number of steps, and for
    models that are no consistency models. With a folder of workers, what was scored is kept there, so that a search
    that was stopped goes on.
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
        times = best.times[0], *map(rounded_up, best.times[1:])

        def measured(sampler: Multistep, steps: int = steps) -> dict[str, Any]:
            there = evaluate(judge, saved, [steps], n, seed, batch, replace(how, sampler=sampler))["steps"][str(steps)]
            return {name: there[name] for name in ("times", "frechet", "frechet_interval")}

        there = measured(Multistep(times[0], times[1:]))
        own = measured(sampler) if steps <= sampler.max_steps else None
        keep = own is not None and own["frechet"] <= there["frechet"]
        about = {"times": list(times), "measured": there["frechet"], "frechet": best.value, "queries": best.queries}
        kept = own if own is not None and keep else there
        found[str(steps)] = kept | {"own": own, "kept_own": keep, "search": about | {"n": few, "seed": seed + 1}}
    return found


def score_of(judge: Judge, saved: SavedModel, n: int, seed: int, batch: int, how: How, tell: Tell) -> Score:
    """The Frechet distance of n images of this seed, by the times that make them."""
    labels, asked = balanced_labels(n, len(saved.class_names)), 0
    reader = Reader(judge.detector)
    how = replace(how, block=how.block or block_on(next(saved.model.parameters()).device))

    def score(times: tuple[float, ...]) -> float:
        nonlocal asked
        sampler = Multistep(times[0], times[1:])
        source = Generated(saved, sampler, len(times), labels, seed, batch, how.block, how.rounding)
        about = {"times": list(times), "sampler": to_json(sampler)}
        distance = scored(job_of(reader, source, n, how, about, seed), judge)
        asked += 1
        tell(asked, max(asked, USUAL * (2 * len(times) - 3)))
        return distance

    return score


def scored(job: Job, judge: Judge) -> float:
    """The Frechet distance of what a job gives. In a folder of workers it is kept in place of the job's parts, which
    would be gigabytes for a search."""

    def distance() -> float:
        own = GaussianStatistics.of_batches(part[FEATURES] for part in job.run())
        return frechet_distance(own, judge.statistics)

    if job.workers.folder is None:
        return distance()
    real = judge.given.file_sha256 if judge.given else judge.data.fingerprint
    kept, about = job.folder.with_suffix(".safetensors"), {**job.about, "n": job.n, "real": real}
    found = read_checked(kept, about)
    if found is None:
        found = {"frechet": torch.tensor([distance()], dtype=torch.float64)}
        write_checked(kept, found, about)
        shutil.rmtree(job.folder, ignore_errors=True)
    return found["frechet"].item()
