"""Line charts as inline SVG, with no dependency. Text and grid take the colour of the page around them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, PLOT = 480, 200  # of the drawing and of the height between its axes, in its own units
LEFT, RIGHT, BOTTOM = 52, 16, 46  # margins around the plot
INSET = 8  # keeps markers at the first and last x off the frame
ROW, GLYPH = 18, 6.6  # height of a row of the legend, and about the width of a letter
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")  # Okabe & Ito's, and grey
GREY = 6

Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Style:
    """How one series is drawn. A page may redefine a colour in CSS as --series-0, --series-1, ..."""

    colour: int = 0  # index into PALETTE
    dash: bool = False
    markers: bool = False
    opacity: float = 1.0

    @property
    def ink(self) -> str:
        return f"var(--series-{self.colour}, {PALETTE[self.colour]})"


@dataclass(frozen=True)
class Axis:
    """A map from values in [low, high] to pixels from `start` to `end`, linear or in the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, v = (math.log(u) if self.log else u for u in (self.low, self.high, value))
        return self.start + (v - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values in [low, high]: multiples of 1, 2 or 5 times a power of ten; on a log scale these numbers."""
        slack = 1e-9 * (self.high - self.low)
        if not self.log:
            step = round_step(self.high - self.low)
            first, last = math.ceil((self.low - slack) / step), math.floor((self.high + slack) / step)
            return [float(f"{k * step:.12g}") for k in range(first, last + 1)]
        decades = decades_around(self.low, self.high)
        short = math.log10(self.high / self.low) <= 2.5
        values = [m * 10.0**k for k in decades[:: 1 + len(decades) // 9] for m in ((1, 2, 5) if short else (1,))]
        return [v for v in values if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]


def decades_around(low: float, high: float) -> range:
    """The powers k with 10^k around and between low and high."""
    return range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)


def round_step(span: float) -> float:
    """The largest step of 1, 2 or 5 times a power of ten that divides the span into 3 parts or more (up to 7)."""
    power = 10.0 ** math.floor(math.log10(span / 3))
    return power * max(m for m in (1, 2, 5) if 3 * m * power <= span * (1 + 1e-9))


def round_outwards(low: float, high: float, log: bool) -> tuple[float, float]:
    """The nearest ticks around [low, high]."""
    if not log:
        step = round_step(high - low)
        return step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
    numbers = [m * 10.0**k for k in decades_around(low, high) for m in (1, 2, 5)]
    return max(v for v in numbers if v <= low * (1 + 1e-9)), min(v for v in numbers if v >= high * (1 - 1e-9))


def fit(values: Sequence[float], start: float, end: float, log: bool, outwards: bool = False) -> Axis:
    """The axis that holds these values; one value alone gets room on both sides."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * abs(high):
        low, high = (low / 2, high * 2) if log else (low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1))
    if outwards:
        low, high = round_outwards(low, high, log)
    return Axis(low, high, start, end, log)


def tick_text(value: float) -> str:
    """Short: 25k, 1.5M, 0.02, 1e-5."""
    for unit, letter in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e6 if letter == 'M' else 1e3):g}{letter}"
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e")


def line_chart(
    series: Mapping[str, Points],
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    styles: Mapping[str, Style] | None = None,
) -> str:
    """One <svg> with a line for each series of (x, y), a legend above and round ticks; it scales with its width.

    Where each x is an int, ticks are whole.

    Points that are None, infinite, or not positive on a log axis are left out, and so are series without any. A single
    point is drawn as a marker. `styles` names the look of some series; the others take the colours in turn.
    """
    known = {name: [p for p in points if _visible(p, log_x, log_y)] for name, points in series.items()}
    lines = {name: points for name, points in known.items() if points}
    looks = {name: (styles or {}).get(name, Style(i % len(PALETTE))) for i, name in enumerate(series)}
    legend, rows = _legend({name: looks[name] for name in lines})
    top = 24 + ROW * rows + 30
    parts = [f'<text x="4" y="17" font-size="14" font-weight="600">{escape(title)}</text>', *legend]
    if lines:
        points = [p for line in lines.values() for p in line]
        x = fit([p[0] for p in points], LEFT + INSET, WIDTH - RIGHT - INSET, log_x)
        y = fit([p[1] for p in points if p[1] is not None], top + PLOT, top, log_y, outwards=True)
        whole = all(isinstance(p[0], int) for p in points)
        ticks = [value for value in x.ticks() if not whole or value == round(value)]
        parts += _frame(x, ticks, y, top, x_label, y_label)
        parts += [part for name, line in lines.items() for part in _series(name, line, x, y, looks[name])]
    else:
        parts.append(f'<text x="{WIDTH / 2}" y="{top + PLOT / 2}" text-anchor="middle">no finite values</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + PLOT + BOTTOM}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="12" fill="currentColor">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _visible(point: tuple[float, float | None], log_x: bool, log_y: bool) -> bool:
    x, y = point
    return y is not None and math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)


def _legend(looks: Mapping[str, Style]) -> tuple[list[str], int]:
    """The entries, set in rows, and the number of rows."""
    parts, x, row = [], 4.0, 0
    for name, style in looks.items():
        width = 40 + GLYPH * len(name)
        if x > 4 and x + width > WIDTH:
            x, row = 4.0, row + 1
        y = 24 + ROW * row + ROW / 2
        parts.append(f'<path d="M{x:.1f} {y:g}h20" {_stroke(style)}/>')
        if style.markers:
            parts.append(f'<circle cx="{x + 10:.1f}" cy="{y:g}" r="3" style="fill:{style.ink}"/>')
        parts.append(f'<text x="{x + 26:.1f}" y="{y + 4:g}">{escape(name)}</text>')
        x += width
    return parts, row + 1 if parts else 0


def _stroke(style: Style) -> str:
    dash = ' stroke-dasharray="6 4"' if style.dash else ""
    return f'fill="none" stroke-width="2" stroke-opacity="{style.opacity:g}"{dash} style="stroke:{style.ink}"'


def _frame(x: Axis, ticks: Sequence[float], y: Axis, top: float, x_label: str, y_label: str) -> Iterable[str]:
    bottom = top + PLOT
    for value in y.ticks():
        at = y.at(value)
        yield f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity=".14"/>'
        yield f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end" opacity=".75">{tick_text(value)}</text>'
    for value in ticks:
        at = x.at(value)
        yield f'<path d="M{at:.1f} {bottom}v5" stroke="currentColor" stroke-opacity=".6"/>'
        yield f'<text x="{at:.1f}" y="{bottom + 19}" text-anchor="middle" opacity=".75">{tick_text(value)}</text>'
    yield f'<path d="M{LEFT} {bottom}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity=".6"/>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{bottom + 39}" text-anchor="middle">{escape(x_label)}</text>'
    yield f'<text x="4" y="{top - 14}" opacity=".75">{escape(y_label)}</text>'


def _series(name: str, points: Points, x: Axis, y: Axis, style: Style) -> Iterable[str]:
    spots = [(x.at(u), y.at(v), u, v) for u, v in points if v is not None]
    if len(spots) > 1:
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py, _, _ in spots)
        yield f'<path d="M{path}" stroke-linejoin="round" {_stroke(style)}/>'
    if style.markers or len(spots) == 1:
        for px, py, u, v in spots:
            note = f"<title>{escape(name)}: {v:.3g} at {u:g}</title>"
            yield f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" style="fill:{style.ink}">{note}</circle>'
