"""What an evaluation leaves: its record, and the table that `run` and `evaluate` print of whatever that holds."""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onejump.page import guidance_in, number

if TYPE_CHECKING:
    import torch

MORE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("precision", "recall"), "precision {:.3f}, recall {:.3f}"),
    (("density", "coverage"), "density {:.3f}, coverage {:.3f}"),
    (("spatial_frechet",), "spatial Frechet distance {:.3f}"),
    (("inception_score",), "inception score {0[mean]:.3f} (+- {0[std]:.3f} over {0[splits]} splits)"),
    (("kid_subsets",), "kernel distance {0[mean]:.5f} (+- {0[std]:.5f} over subsets)"),
    (("clip_score",), "CLIP score {:.3f}"),
)
HALVES = "real half"  # the row of real images: one half against the other
EXPLAINED = (
    ("95 %", "95 %: where the distances of other samples of the same model would lie."),
    ("KID", "KID: kernel distance, near 0 (also below) is best."),
    ("sure", "Sure: a classifier's mean confidence. As asked: it reads the class asked for."),
    ("sure", "Off balance: samples that would have to change class to match the real shares."),
)


def print_results(reference: dict[str, Any], stages: dict[str, Any]) -> None:
    """One line for each stage and number of steps; columns of which the record holds nothing are left out."""
    real = "published statistics" if reference["n"] is None else f"{reference['n']} real images"
    print(f"\nFrechet distance ({reference['detector']}, {judged(stages)} against {real})")
    for name, stage in stages.items():
        if "guidance" in stage:
            print(f"{name}: {guidance_in(stage['guidance'])}, which doubles the network calls")
    rows = [row_of(name, steps, found) for name, stage in stages.items() for steps, found in stage["steps"].items()]
    if reference["real_half_frechet"] is not None:
        rows.append({"stage": HALVES, "Frechet": f"{reference['real_half_frechet']:.3f}"})
    titles = [title for title in row_of("", "-", {"nfe": 0, "frechet": 0}) if any(row.get(title) for row in rows)]
    print_columns(titles, rows)
    for title, text in EXPLAINED:
        if title in titles:
            print(text)
    for name, stage in stages.items():
        for text in more_lines(stage):
            print(f"{name}: {text}")


def judged(stages: dict[str, Any]) -> str:
    """How many samples: one number, or from the least to the most."""
    n = [found["n"] for stage in stages.values() for found in stage["steps"].values()]
    return f"{max(n)} sample{'s' if max(n) != 1 else ''}" if min(n) == max(n) else f"{min(n)} to {max(n)} samples"


def row_of(name: str, steps: str, found: dict[str, Any]) -> dict[str, str]:
    """Cells by their title, "" for what is not there."""
    low, high = found.get("frechet_interval") or (None, None)
    # As many places in the interval, so that it holds the value as printed.
    places = 3 if found["frechet"] < 10 else 2 if found["frechet"] < 100 else 1
    sure = found.get("confidence", {})
    shares = {"sure": sure.get("mean"), "as asked": sure.get("as_asked"), "off balance": found.get("balance_distance")}
    return {
        "stage": name,
        "steps": steps,
        "calls": str(found["nfe"]),
        "Frechet": f"{found['frechet']:.{places}f}",
        "95 %": "" if low is None else f"{low:.{places}f}..{high:.{places}f}",
        "KID": number(found["kid"]) if "kid" in found else "",
        **{title: "" if share is None else f"{share:.1%}" for title, share in shares.items()},
    }


def print_columns(titles: list[str], rows: list[dict[str, str]]) -> None:
    """Titles of two words on two lines, so that the usual table is 80 columns wide at most."""
    heads = [title.rpartition(" ")[::2] if title[0].isalpha() else ("", title) for title in titles]
    lines = [[first for first, _ in heads], [last for _, last in heads]]
    lines += [[row.get(title) or "-" for title in titles] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines if any(lines[0]) else lines[1:]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join(["", first.ljust(widths[0]), *cells]).rstrip())


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


def print_search(model: str, search: dict[str, dict[str, Any]]) -> None:
    """The times found, what they gain over the model's own, and how to use them."""
    print("\nBest times (searched on one seed, measured on another)")
    print(f"  {'steps':>5}{'Frechet':>10}{'own times':>11}  times")
    for steps, found in search.items():
        before = f"{found['own']['frechet']:.3f}" if found["own"] else "-"
        after = " (the model's own: those found are no better)" if found["kept_own"] else ""
        print(f"  {steps:>5}{found['frechet']:>10.3f}{before:>11}  {option(found['times'])}{after}")
    steps, best = min(search.items(), key=lambda item: item[1]["frechet"])
    use = f"--steps {steps}" if best["kept_own"] else f"--times {option(best['times'])}"
    print(f"{'Keep its own' if best['kept_own'] else 'Use them with'}:  onejump sample {model} {use}")


def option(times: list[float]) -> str:
    """All digits: a time that is rounded may lie below t'."""
    return ",".join(str(t).removesuffix(".0") for t in times)


def refuse_over(out: Path | None, question: dict[str, Any]) -> None:
    """Raises UserError if a file is there already that is not the record of this very evaluation, or an empty one."""
    from onejump.types import UserError

    if out is None or not out.exists() or not out.stat().st_size:
        return
    try:
        known = json.loads(out.read_bytes())["question"]
        differ = [name for name in {**known, **question} if known.get(name) != question.get(name)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        differ = [""]
    if differ:
        name = differ[0]
        told = f" ({name}: {_short(known.get(name))} there, now {_short(question.get(name))})" if name else ""
        way_out = "name a new file, or remove it"
        raise UserError(f"--out {out}: holds something else than a record of this evaluation{told}; {way_out}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}..."


def finish(args: argparse.Namespace, record: dict[str, Any], name: str, device: "torch.device", began: float) -> None:
    """Writes the record and tells it."""
    import torch

    from onejump.run_record import device_name, versions
    from onejump.saved import write_json

    threads = torch.get_num_threads()
    record |= {
        "device": f"{device_name(device)}, {threads} thread{'s' if threads > 1 else ''}",
        "processes": int(os.environ.get("WORLD_SIZE", args.processes)),
        "minutes": round((time.monotonic() - began) / 60, 3),
        "versions": versions(),
    }
    if args.out:
        write_json(args.out, record)
    if args.json:
        print(json.dumps(record, indent=1))
        return
    print_results(record["reference"], {name: record})
    if "search" in record:
        print_search(args.model, record["search"])
