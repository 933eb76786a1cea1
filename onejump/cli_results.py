"""The table of results that `run` and `evaluate` print."""

from typing import Any

LINE = "  {:<12}{:>6}{:>7}{:>9}{:>8}{:>10}{:>13}"


def print_results(reference: dict[str, Any], stages: dict[str, Any]) -> None:
    """One line for each stage and number of steps, within 80 columns; what they mean below."""
    print(f"\nFrechet distance ({reference['detector']}, {reference['n']} real images)")
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
