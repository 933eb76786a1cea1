"""The page of a teacher's Analytic-Precond table: its jumps beside CTM's and CM's, and the statistics they are from."""

import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from onejump.analytic_table import Table
from onejump.page import charts, definitions, duration, number, page, section, table
from onejump.precond import CM, EDM, Euler, Jump
from onejump.svg import GREY, Points, Style, line_chart
from onejump.times import karras_grid

EULER, BACKWARD, FORWARD = "CTM (Euler)", "Analytic, backward", "Analytic, forward"
LINES = 240  # points of a curve
FIXED = (80.0, 5.0)  # starts of the jumps drawn against their end
EXAMPLES = ((80.0, 0.002), (80.0, 0.66), (10.0, 2.0), (5.0, 0.5), (0.5, 0.05))
STYLES = {
    BACKWARD: Style(0),
    FORWARD: Style(2, dash=True),
    "CTM = BCM (Euler)": Style(1, dash=True),
    "CM": Style(3, dash=True),
}

PAPER = 200_000, 256, 17  # CIFAR-10: iterations, batch, most ODE steps (Zheng et al. 2025, table 3)
STUDENT_PASSES = 11  # CTM's 5 calls of the student a sample, 3 of them with gradients, which count as 3 passes


def cost(table: Table) -> str:
    """The passes, and their share of those of a training at the paper's scale."""
    iterations, batch, M = PAPER
    teacher = 2 * (2 * M + 1) / 3  # two calls a Heun step, k of them with P(k) ~ k: E[k] = (2 M + 1) / 3
    whole = iterations * batch * (teacher + STUDENT_PASSES)
    share, each = (
        100 * table.network_passes / whole,
        f"({teacher:.1f} of the teacher + {STUDENT_PASSES} of the student)",
    )
    return (
        f"{table.network_passes:,} network passes, {share:.2g} % of a training at the paper's scale: "
        f"{iterations:,} iterations x {batch} images x {each} = {whole / 1e9:.2f} billion"
    )


def write_page(path: Path, title: str, verdict_html: str, sections: Sequence[str]) -> None:
    head = f'<header><h1>{escape(title)}</h1><p class="verdict">{verdict_html}</p></header>\n<main>\n'
    draft = path.with_name(f".{path.name}")
    draft.write_text(page(title, head + "\n".join(sections) + "\n</main>"), encoding="utf-8")
    os.replace(draft, path)


def write_table_page(path: Path, found: Table, precond: EDM, cost: str) -> None:
    """The pictures of the paper's figure 2 for this teacher, its statistics, and where they come from."""
    title = f"Analytic-Precond of a teacher on {found.data}"
    sections = [to_data(found, precond), between(found, precond), statistics(found, precond), examples(found)]
    write_page(path, title, difference(found), [*sections, origin(found, cost)])


def difference(found: Table) -> str:
    """Where the backward form's b is furthest from CTM's, over the jumps of the 18-node Karras grid."""
    low, high = found.estimator.sigma_min, found.estimator.sigma_max
    grid = karras_grid(18, low, high)
    i, j = torch.ones(18, 18).tril(-1).nonzero(as_tuple=True)
    b, euler = (jump(grid[i], grid[j])[1] for jump in (found.jump(), Euler(low)))
    off, to_eps = (b - euler).abs(), j == 0
    k = int(off.argmax())
    t, s = grid[i[k]].item(), grid[j[k]].item()
    return (
        "Jumps fitted to this teacher weigh its estimate of the image up to "
        f"<strong>{number(off[k].item())}</strong> {'more' if b[k] > euler[k] else 'less'} than CTM"
        f"'s (b at t = {number(t)}, s = {number(s)}); jumps to the data, "
        f"s = {low:g}, differ by <strong>{number(off[to_eps].max().item())}</strong> at most."
    )


def to_data(found: Table, precond: EDM) -> str:
    low, high = found.estimator.sigma_min, found.estimator.sigma_max
    t = torch.logspace(math.log10(low), math.log10(high), LINES, dtype=torch.float64)
    jumps = {**_jumps(found), "CM": CM(low, precond.sigma_data)}
    intro = (
        f"What a jump from t to s = {low:g} makes of x and of the raw network output F, EDM's wrapper included. "
        "CTM's and BCM's are one function; of curves that coincide the dashed ones lie on top."
    )
    return section("Jumps to the data", intro, charts(*_pair(jumps, precond, t, torch.full_like(t, low), t, "start t")))


def between(found: Table, precond: EDM) -> str:
    low, drawn = found.estimator.sigma_min, []
    for start in FIXED:
        if low < start <= found.estimator.sigma_max:
            s = torch.logspace(math.log10(low), math.log10(start), LINES, dtype=torch.float64)
            where = f" from t = {start:g}"
            drawn += _pair(_jumps(found), precond, torch.full_like(s, start), s, s, "end s", where)
    drawn += [apart(found, k, name) for k, name in enumerate("ab")]
    intro = "The same against the end s of a jump; last, how far a and b themselves are from CTM's."
    return section("Jumps in between", intro, charts(*drawn))


def apart(found: Table, k: int, name: str) -> str:
    """The backward form's a (k = 0) or b less CTM's, from a few times t."""
    low, lines = found.estimator.sigma_min, {}
    for start in (*FIXED, 0.5):
        if low < start <= found.estimator.sigma_max:
            s = torch.logspace(math.log10(low), math.log10(start), LINES, dtype=torch.float64)
            t = torch.full_like(s, start)
            lines[f"from t = {start:g}"] = _points(s, found.jump()(t, s)[k] - Euler(low)(t, s)[k])
    return line_chart(lines, f"{BACKWARD}: {name} less CTM's", "end s", f"difference of {name}", log_x=True)


def _jumps(found: Table) -> dict[str, Jump]:
    low = found.estimator.sigma_min
    return {BACKWARD: found.jump(), FORWARD: found.jump("forward"), "CTM = BCM (Euler)": Euler(low)}


def _pair(
    jumps: Mapping[str, Jump], precond: EDM, t: Tensor, s: Tensor, x: Tensor, x_label: str, where: str = ""
) -> list[str]:
    """Charts of a + b c_skip and of b c_out."""
    c_skip, c_out, _, _ = precond(t)
    values = {name: jump(t, s) for name, jump in jumps.items()}
    skip = {name: _points(x, a + b * c_skip) for name, (a, b) in values.items()}
    out = {name: _points(x, b * c_out) for name, (_, b) in values.items()}
    drawn = ((skip, f"Skip{where}", "a + b c_skip"), (out, f"Output{where}", "b c_out"))
    return [line_chart(_tame(lines), name, x_label, y, log_x=True, styles=STYLES) for lines, name, y in drawn]


def _points(x: Tensor, y: Tensor) -> Points:
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _tame(lines: Mapping[str, Points]) -> dict[str, Points]:
    """The forward form as far as it goes twice as high as the others; long jumps may take it out of any frame."""
    most = 2 * max(abs(v) for name, line in lines.items() for _, v in line if name != FORWARD and v is not None)
    return {name: [(x, y) for x, y in line if y is not None and abs(y) <= most] for name, line in lines.items()}


def statistics(found: Table, precond: EDM) -> str:
    """l_t and s_t against t, beside those of Gaussian data."""
    low, high, cells = found.estimator.sigma_min, found.estimator.sigma_max, len(found.l_t) - 1
    t = [high * (low / high) ** (k / cells) for k in range(cells + 1)]
    c = precond.sigma_data
    gaussian = [c**2 / (c**2 + u**2) for u in t]
    name = f"Gaussian data, std {c:g}"
    styles = {"teacher": Style(0), name: Style(GREY, dash=True)}
    lines = {
        "l_t: how much of D is a multiple of x": (found.l_t, gaussian, "l_t"),
        "s_t: growth of the rest against ln 1/t": (found.s_t, [-2 * u for u in gaussian], "s_t"),
    }
    drawn = [
        line_chart(
            {"teacher": list(zip(t, ours, strict=True)), name: list(zip(t, theirs, strict=True))},
            *(title, "noise level t", label),
            log_x=True,
            styles=styles,
        )
        for title, (ours, theirs, label) in lines.items()
    ]
    intro = (
        "All that is measured of the teacher: l_t, the mean slope of its denoiser (the trace of its Jacobian over the "
        "number of coordinates), and s_t, how fast the rest D \N{MINUS SIGN} l_t x grows along its trajectories."
    )
    return section("The teacher", intro, charts(*drawn))


def examples(found: Table) -> str:
    """a and b themselves, to compare other code with."""
    low, high = found.estimator.sigma_min, found.estimator.sigma_max
    rows = []
    for t, s in EXAMPLES:
        if low <= s < t <= high:
            times = torch.tensor([t], dtype=torch.float64), torch.tensor([s], dtype=torch.float64)
            jumps = (Euler(low), found.jump(), found.jump("forward"))
            rows.append((f"{t:g} to {s:g}", *(f"{c.item():.4f}" for jump in jumps for c in jump(*times))))
    header = ("t to s", *(f"{c}, {name}" for name in ("CTM", "backward", "forward") for c in "ab"))
    return section("Some jumps in numbers", "f = a x + b D, without EDM's wrapper.", table(header, rows))


def origin(found: Table, cost: str) -> str:
    estimator = found.estimator
    facts = {
        "Teacher": f"sha256 {found.teacher}",
        "Images": f"{estimator.samples:,} of {found.data}, fingerprint {found.data_fingerprint}",
        "Times": f"{estimator.times + 1}, even in ln t from {estimator.sigma_max:g} to {estimator.sigma_min:g}",
        "Method": f"l_t: {estimator.trace}; s_t: {estimator.slope}; seed {estimator.seed}",
        "Cost": f"{duration(found.seconds)}; {cost}",
    }
    return section("Origin", "", definitions(facts, "facts"))
