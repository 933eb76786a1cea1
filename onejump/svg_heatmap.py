"""Heat maps as inline SVG: a number for each pair of columns and rows. Cells take the series' colours of the page."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from onejump.page import number
from onejump.svg import GLYPH, LEFT, RIGHT, WIDTH, round_step, tick_text

ROW, TOP, BOTTOM = 17, 64, 46  # height of a row of cells, and the margins above and below them
BAR, STEPS = 120, 24  # width of the scale in the margin above, and the number of its colours
FAINTEST = 0.05  # opacity of the least value: a cell that holds a number is never blank
Rows = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Scale:
    """Values from low to high as strengths of one colour; around `middle`, if there is one, of two colours.

    With a middle low and high are as far from it, in the logarithm, as the values reach on either side.
    """

    low: float
    high: float
    middle: float | None = None
    colours: tuple[str, str] = ("var(--series-0, #0072b2)", "var(--series-1, #d55e00)")  # up to the middle, above it

    def share(self, value: float) -> float:
        """0 at low (or the middle), 1 at high."""
        if self.middle is None:
            return (value - self.low) / (self.high - self.low)
        return abs(math.log(value / self.middle)) / math.log(self.high / self.middle)

    def ink(self, value: float) -> str:
        colour = self.colours[self.middle is not None and value > self.middle]
        strength = FAINTEST + (1 - FAINTEST) * min(max(self.share(value), 0.0), 1.0)
        return f'style="fill:{colour}" fill-opacity="{strength:.3f}"'

    def at(self, share: float) -> float:
        """The value at this share of the way from low to high."""
        if self.middle is None:
            return self.low + share * (self.high - self.low)
        return self.low * (self.high / self.low) ** share


def from_zero(*tables: Rows) -> Scale:
    """One scale from 0 to the largest value of all these tables, rounded up."""
    most = max(_known(tables), default=0.0) or 1.0
    step = round_step(most) / 2
    return Scale(0.0, step * math.ceil(most / step - 1e-9))


def around_one(*tables: Rows) -> Scale:
    """A scale for ratios, as far below 1 as above it: to the furthest, and 8 at most."""
    furthest = max((max(v, 1 / v) if v > 0 else 8.0 for v in _known(tables)), default=2.0)
    high = next((limit for limit in (1.1, 1.25, 1.5, 2.0, 3.0, 5.0) if furthest <= limit), 8.0)
    return Scale(1 / high, high, 1.0)


def _known(tables: Iterable[Rows]) -> list[float]:
    return [v for rows in tables for row in rows for v in row if v is not None and math.isfinite(v)]


def heat_map(
    rows: Rows, x: Sequence[float], y: Sequence[float], title: str, x_label: str, y_label: str, scale: Scale
) -> str:
    """One <svg> of equal cells: rows[i][k] at y[i] (the first row lowest) and x[k]; None and NaN stay empty.

    The scale lies above the cells; a cell tells its value in a tooltip.
    """
    assert len(rows) == len(y) and all(len(row) == len(x) for row in rows), "a row for each y, a cell for each x"
    width, bottom = (WIDTH - LEFT - RIGHT) / len(x), TOP + ROW * len(y)
    parts = [f'<text x="4" y="17" font-size="14" font-weight="600">{escape(title)}</text>', *_bar(scale)]
    for i, row in enumerate(rows):
        for k, value in enumerate(row):
            if value is not None and math.isfinite(value):
                note = f"{x_label} {_short(x[k])}, {y_label} {_short(y[i])}: {number(value)}"
                size = f'width="{width - 1:.2f}" height="{ROW - 1}" {scale.ink(value)}'
                at = f'x="{LEFT + k * width:.2f}" y="{bottom - (i + 1) * ROW}"'
                parts.append(f"<rect {at} {size}><title>{escape(note)}</title></rect>")
    parts += _labels(x, y, width, bottom)
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{bottom + 39}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(f'<text x="4" y="{TOP - 10}" opacity=".75">{escape(y_label)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="12" fill="currentColor">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _bar(scale: Scale) -> Iterable[str]:
    """The colours from low to high, with the values at both ends and midway."""
    left = WIDTH - RIGHT - BAR
    for k in range(STEPS):
        ink = scale.ink(scale.at((k + 0.5) / STEPS))
        size = f'width="{BAR / STEPS:g}" height="10" shape-rendering="crispEdges"'
        yield f'<rect x="{left + k * BAR / STEPS:g}" y="30" {size} {ink}/>'
    for share in (0, 0.5, 1):
        text = f"{scale.at(share):.3g}"
        yield f'<text x="{left + share * BAR:g}" y="54" text-anchor="middle" opacity=".75">{text}</text>'


def _labels(x: Sequence[float], y: Sequence[float], width: float, bottom: float) -> Iterable[str]:
    """As many of the values as there is room for, the last x and the first y among them."""
    every = math.ceil(7 * GLYPH / width)
    for k in range(len(x) - 1, -1, -every):
        at = LEFT + (k + 0.5) * width
        yield f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle" opacity=".75">{_short(x[k])}</text>'
    for i in range(0, len(y), 2 if len(y) > 10 else 1):
        at = bottom - (i + 0.5) * ROW + 4
        yield f'<text x="{LEFT - 7}" y="{at:g}" text-anchor="end" opacity=".75">{_short(y[i])}</text>'


def _short(value: float) -> str:
    return tick_text(float(f"{value:.2g}"))
