"""Pieces of an HTML page: numbers as text, tables, pictures held in the page itself. Names in _html hold markup."""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

DASH = "\N{EN DASH}"  # stands for a number that does not exist


def number(value: float | None) -> str:
    """Three significant digits; whole numbers in full, in groups of three."""
    if value is None or not math.isfinite(value):
        return DASH
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-")
    return f"{value:#.3g}".rstrip(".") if value else "0"


def percent(value: float | None) -> str:
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def duration(seconds: float | None) -> str:
    """The two largest units: 45 s, 12 min 30 s, 3 h 5 min."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{number(float(seconds))}\N{NO-BREAK SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    parts = (minutes // 60, "h", minutes % 60, "min") if minutes >= 60 else (minutes, "min", rest, "s")
    return "\N{NO-BREAK SPACE}".join(str(part) for part in parts)


def plural(n: int, word: str) -> str:
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}s"


def guidance_in(record: Mapping[str, Any]) -> str:
    """What the record of an evaluation says of its guidance, in words."""
    guide = "" if record["guide"] is None else f" by {record['guide']}"
    return f"guidance {record['scale']:g}{guide}"


def section(title: str, intro: str, *parts_html: str) -> str:
    lead = f'<p class="intro">{escape(intro)}</p>' if intro else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{''.join(parts_html)}</section>"


def missing(what: str, command: str) -> str:
    """A note in place of what a run does not have yet, and the command that makes it."""
    return f'<p class="missing">{escape(what)} The run goes on with <code>{escape(command)}</code></p>'


def figure(image: Path, alt: str, caption_html: str) -> str:
    """A PNG as a data URI. Nothing is fetched when the page is opened."""
    data = base64.b64encode(image.read_bytes()).decode()
    source = f"data:image/png;base64,{data}"
    return f'<figure><img src="{source}" alt="{escape(alt)}"><figcaption>{caption_html}</figcaption></figure>'


def charts(*svg: str) -> str:
    figures = "".join(f'<figure class="chart">{drawing}</figure>' for drawing in svg)
    return f'<div class="charts">{figures}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], classes: Mapping[int, str] | None = None) -> str:
    """The first column is text, the others are numbers. `classes` names rows that look different."""
    head = "".join(f'<th scope="col">{_two_lines(name)}</th>' for name in header)
    body = ""
    for i, row in enumerate(rows):
        look = (classes or {}).get(i)
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body += f'<tr class="{look}">{cells}</tr>' if look else f"<tr>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _two_lines(name: str) -> str:
    """A header, its unit or comment after the comma on a line of its own."""
    first, _, second = name.partition(", ")
    return escape(first) + (f"<small>{escape(second)}</small>" if second else "")


def definitions(pairs: Mapping[str, str], look: str) -> str:
    rows = [f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in pairs.items()]
    return f'<dl class="{look}">{"".join(f"<div>{row}</div>" if look == "terms" else row for row in rows)}</dl>'


def page(title: str, body_html: str) -> str:
    """A whole HTML5 document with its style inside."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body_html}\n</body>\n</html>\n"
    )
