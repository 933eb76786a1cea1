"""The table of results that `run` and `evaluate` print."""

from collections.abc import Iterator
from typing import Any

MORE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("precision", "recall"), "precision {:.3f}, recall {:.3f}"),
    (("density", "coverage"), "density {:.3f}, coverage {:.3f}"),
    (("spatial_frechet",), "spatial Frechet distance {:.3f}"),
    (("inception_score",), "inception score {0[mean]:.3f} (+- {0[std]:.3f} over {0[splits]} splits)"),
    (("kid_subsets",), "kernel distance {0[mean]:.5f} (+- {0[std]:.5f} over subsets)"),
)
LINE = "  {:<12}{:>6}{:>7}{:>9}{:>8}{:>10}{:>13}"


def print_results(reference: dict[str, Any], stages: dict[str, Any]) -> None:
    """One line for each stage and number of steps, within 80 columns; what they mean below."""
    real = "published statistics" if reference["n"] is None else f"{reference['n']} real images"
    print(f"\nFrechet distance ({reference['detector']}, {real})")
    print(LINE.format("stage", "steps", "calls", "Frechet", "sure", "as asked", "off balance"))
    read = False
    for name, stage in stages.items():
        for steps, found in stage["steps"].items():
            sure = found.get("confidence", {})
            shares = (sure.get("mean"), sure.get("as_asked"), found.get("balance_distance"))
            cells = ("-" if share is None else f"{share:.1%}" for share in shares)
            print(LINE.format(name, steps, found["nfe"], f"{found['frechet']:.3f}", *cells))
            read = read or bool(sure)
    if reference["real_half_frechet"] is not None:
        half = f"{reference['real_half_frechet']:.3f}"
        print(LINE.format("real images", "-", "-", half, "-", "-", "-") + "  (half against half)")
    if read:
        print("Sure: a classifier's mean confidence. As asked: it reads the class asked for. Off balance: samples that")
        print("would have to change class to match the real shares.")
    for name, stage in stages.items():
        for text in more_lines(stage):
            print(f"{name}: {text}")


def more_lines(stage: dict[str, Any]) -> Iterator[str]:
    """What was asked for beside the numbers of the table, a line for each number of steps and metric."""
    for steps, found in stage["steps"].items():
        start = "" if steps == "-" else f"{steps} step{'s' if steps != '1' else ''}, "
        for keys, text in MORE:
            if all(key in found for key in keys):
                yield start + text.format(*(found[key] for key in keys))
        if "per_class" in found:
            known = [distance for distance in found["per_class"]["classes"] if distance is not None]
            spread = f", {min(known):.3f} to {max(known):.3f}" if known else ""
            yield f"{start}Frechet distance within classes {found['per_class']['mean'] or 0:.3f}{spread}"
    if denoising := stage.get("denoising"):
        levels = ", ".join(f"{distance:.3f} at t = {t}" for t, distance in denoising["frechet"].items())
        yield f"denoising Frechet distance {levels}"


def print_search(model: str, search: dict[str, dict[str, Any]], own: dict[str, dict[str, Any]]) -> None:
    """The times found, what they gain, and how to use them."""
    print("\nBest times (searched on one seed, measured on another)")
    print(f"  {'steps':>5}{'Frechet':>10}{'own times':>11}  times")
    for steps, found in search.items():
        before = f"{own[steps]['frechet']:.3f}" if steps in own else "-"
        print(f"  {steps:>5}{found['frechet']:>10.3f}{before:>11}  {option(found)}")
    best = min(search.values(), key=lambda found: found["frechet"])
    print(f"Use them with:  onejump sample {model} --times {option(best)}")


def option(found: dict[str, Any]) -> str:
    return ",".join(f"{t:.4g}" for t in found["times"])
