"""What a comparison comes to: which model is best, and which cannot be told apart from it."""

from collections.abc import Sequence
from html import escape
from math import isfinite

from onejump.compare import Comparison
from onejump.compare_models import Entry
from onejump.page import number, plural


def verdict(found: Comparison) -> str:
    """Which of the comparable models is at the lowest distance, for each number of steps that several have. HTML.

    Those that are level with it, and those whose 95 % intervals overlap with its own, share the first place.
    """
    said = []
    for k in sorted({k for entry in found.comparable for k in entry.results}):
        having = [entry for entry in found.comparable if k in entry.results and isfinite(frechet(entry, k))]
        if len(having) > 1:
            order = sorted(having, key=lambda entry: frechet(entry, k))
            said.append(f"With {plural(k, 'step')}, {_told(order, k)}.")
    return "<br>".join(said) or "No two of these models have comparable results with the same number of steps."


def _told(order: Sequence[Entry], steps: int) -> str:
    """Of two or more models in the order of their distances."""
    best, second = order[:2]
    tied = [entry for entry in order if entry is best or is_tie(best, entry, steps)]
    names = [f"<strong>{escape(entry.name)}</strong>" for entry in tied]
    lowest = number(frechet(best, steps))
    if len(tied) == 1:
        before = f"before {escape(second.name)} at {digits(second, best, steps)}"
        return f"{names[0]} is at the lowest Fréchet distance, <strong>{lowest}</strong>, {before}"
    if frechet(tied[-1], steps) == frechet(best, steps):
        return f"{' and '.join(names)} are level at the lowest Fréchet distance, <strong>{lowest}</strong>"
    places = [f"{name} at {digits(entry, best, steps)}" for name, entry in zip(names, tied, strict=True)]
    return f"{' and '.join(places)} are level at the lowest Fréchet distances: their 95 % intervals overlap"


def is_tie(best: Entry, other: Entry, steps: int) -> bool:
    """The same distance, or intervals that overlap."""
    ours, theirs = (entry.results[steps].get("frechet_interval") for entry in (best, other))
    return frechet(other, steps) == frechet(best, steps) or bool(ours and theirs and theirs[0] <= ours[1])


def digits(entry: Entry, best: Entry, steps: int) -> str:
    """The distance, with more digits where the usual ones do not tell it from that of the best."""
    ours, theirs = frechet(entry, steps), frechet(best, steps)
    return f"{ours:.6g}" if ours != theirs and number(ours) == number(theirs) else number(ours)


def frechet(entry: Entry, steps: int) -> float:
    return entry.results[steps]["frechet"]
