"""The page of `onejump alignment`: consistency gaps and jump errors as tables and heat maps, and a verdict."""

import math
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path

from onejump.alignment import NEAR, Alignment, Square, kinds, mean_by_kind
from onejump.analytic_page import BACKWARD, EULER, FORWARD, write_page
from onejump.page import charts, definitions, number, percent, plural, section, table
from onejump.svg import Points, Style, line_chart
from onejump.svg_heatmap import Rows, Scale, around_one, from_zero, heat_map

ENDS = {"to_end": "D(x_s, s)", "to_start": "D(x_t, t)"}
FREEZES = {BACKWARD: "to_end", FORWARD: "to_start"}  # which of them each form takes for constant along the jump
KINDS = {"all": "all jumps", "near": "near", "mid": "intermediate", "to eps": "to eps"}
TERMS = {
    "D*": "the optimal student's D_theta(x_t, t, s), with which the jump f = a x_t + b D* "
    "ends exactly where the teacher's own trajectory is at s; a and b are the "
    "preconditioning",
    "Consistency gap": "distance of D* from the teacher's denoiser at the end of the jump, "
    "D(x_s, s), or at its start, D(x_t, t): what is left for the student to learn, lower is better. The backward form "
    "takes D for constant at its value at the end, the forward form at the start, CTM (Euler) is both",
    "Jump error": "distance of f from the teacher's trajectory. An untrained student is "
    "its teacher, D_theta = D(x_t, t)",
    "Unit": "root mean square a coordinate over the trajectories, then the mean over jumps; pixels are "
    "\N{MINUS SIGN}1 to 1",
    "Kinds of jump": f"to eps: s is the last time; of the others near: t / s up to {NEAR:g}, and intermediate: longer",
}


def write_alignment_page(path: Path, found: Alignment, about: Mapping[str, str]) -> None:
    """about: what was compared, for the last section; "Teacher" is among it."""
    sections = [gaps(found), errors(found), section("Terms", "", definitions(TERMS, "terms"))]
    origin = section("Origin", "", definitions(about, "facts"))
    write_page(path, "Alignment of preconditionings with a teacher", verdict(found), [*sections, origin])


def verdict(found: Alignment) -> str:
    """What the preconditionings mean for this teacher, as HTML."""
    strong = r"<strong>\g<0></strong>"
    return "<br>".join(re.sub(r"[\d.]+\s% \w+", strong, escape(line), count=1) for line in summary(found))


def summary(found: Alignment) -> list[str]:
    """The same, a sentence a line."""
    said = []
    for name, kind in FREEZES.items():
        if name in found.gaps:
            change = changes(found, name)
            detail = ", ".join(f"{KINDS[k]} {more_or_less(change[k])}" for k in ("near", "mid", "to eps"))
            said.append(
                f"{name}: for this teacher the mean consistency gap to {ENDS[kind]} is {more_or_less(change['all'])} "
                f"than CTM's ({detail})."
            )
    if not said:
        mean = mean_by_kind(found.gaps[EULER].to_end, found.grid)["all"]
        said.append(f"{EULER}: for this teacher the mean consistency gap to {ENDS['to_end']} is {number(mean)}.")
    if found.student is not None:
        made = found.student.isfinite()
        error, before = (v[made].mean().item() for v in (found.student, found.gaps[EULER].untrained))
        said.append(
            f"The student's {int(made.sum())} jumps miss the teacher's trajectory by {number(error)} on average; "
            f"before training, with CTM's preconditioning, it would be {number(before)}."
        )
    return said


def changes(found: Alignment, name: str) -> dict[str, float]:
    """By kind of jump: this form's mean gap to what it freezes, over CTM's to the same, less 1."""
    ours, theirs = (mean_by_kind(getattr(found.gaps[n], FREEZES[name]), found.grid) for n in (name, EULER))
    return {kind: ours[kind] / theirs[kind] - 1 if theirs[kind] else math.nan for kind in ours}


def more_or_less(change: float) -> str:
    return f"{percent(abs(change))} {'larger' if change > 0 else 'smaller'}"


def gaps(found: Alignment) -> str:
    """A table and heat maps for each of the two ends."""
    parts = []
    for kind, end in ENDS.items():
        values = {name: getattr(gap, kind) for name, gap in found.gaps.items()}
        parts.append(f"<h3>To {end}, the teacher at the {kind.removeprefix('to_')} of the jump</h3>")
        parts.append(means(values, found))
        shown = {name: v for name, v in values.items() if FREEZES.get(name, kind) == kind}
        drawn = maps({f"{name}: gap to {end}": v for name, v in shown.items()}, found)
        for name in shown.keys() - {EULER}:
            ratio = cells(shown[name] / shown[EULER], found)
            drawn.append(heat_map(ratio, *axes(found), f"{name}, over CTM", *LABELS, around_one(ratio)))
        parts.append(charts(*drawn))
    intro = (
        "How far the optimal student is from its teacher's denoiser, for every jump from t "
        "down to s. The two maps of gaps share one scale; in a map over CTM blue is a smaller gap than CTM's, orange "
        "a larger one."
    )
    return section("Consistency gap", intro, *parts)


def errors(found: Alignment) -> str:
    """Of an untrained student under each preconditioning, and of the student given."""
    values = {f"untrained, {name}": gap.untrained for name, gap in found.gaps.items()}
    drawn = dict(values)
    if found.student is not None:
        values["the student"] = found.student
        if found.student[:, 1:].isfinite().any():
            drawn["the student"] = found.student
    first: dict[str, Points] = {
        name: list(zip(found.grid.tolist(), v[:, 0].tolist(), strict=True)) for name, v in values.items()
    }
    styles = {name: Style(k, dash=name.startswith("untrained"), markers=True) for k, name in enumerate(values)}
    labels = (f"Jumps to s = {found.grid[0].item():g}", "start t", "RMS a coordinate")
    chart = line_chart(first, *labels, log_x=True, log_y=True, styles=styles)
    intro = "How far jumps end from where the teacher's own trajectory is."
    return section("Jump error", intro, means(values, found), charts(*maps(drawn, found), chart))


LABELS = ("from t", "to s")


def axes(found: Alignment) -> tuple[list[float], list[float]]:
    """The starts t and the ends s of all jumps."""
    grid = found.grid.tolist()
    return grid[1:], grid[:-1]


def cells(values: Square, found: Alignment) -> Rows:
    """A row for each s, a column for each t, empty where there is no jump."""
    return [[v if math.isfinite(v) else None for v in row] for row in values[1:, :-1].T.tolist()]


def maps(values: Mapping[str, Square], found: Alignment) -> list[str]:
    """Heat maps under one scale."""
    rows = {name: cells(v, found) for name, v in values.items()}
    scale: Scale = from_zero(*rows.values())
    return [heat_map(row, *axes(found), name, *LABELS, scale) for name, row in rows.items()]


def means(values: Mapping[str, Square], found: Alignment) -> str:
    """A row for each, a column for each kind of jump."""
    counts = {kind: int(mask.sum()) for kind, mask in kinds(found.grid).items()}
    header = ("Preconditioning", *(f"{name}, {plural(counts[kind], 'jump')}" for kind, name in KINDS.items()))
    rows = []
    for name, v in values.items():
        by_kind = mean_by_kind(v, found.grid)
        rows.append((name, *(number(by_kind[kind]) for kind in KINDS)))
    return table(header, rows)
