"""Heat maps put each number in its cell, in the strength of its value."""

import re

import pytest

from onejump.svg import LEFT, RIGHT, WIDTH
from onejump.svg_heatmap import FAINTEST, ROW, TOP, Scale, around_one, from_zero, heat_map

CELL = re.compile(r'<rect x="([\d.]+)" y="([\d.]+)" [^>]*fill:([^"]+)" fill-opacity="([\d.]+)"><title>([^<]+)</title>')


def cells(svg):
    """(x, y, colour, opacity, tooltip) of each, from the left and the top."""
    found = [
        (float(x), float(y), colour, float(opacity), note.replace("\N{NO-BREAK SPACE}", " "))
        for x, y, colour, opacity, note in CELL.findall(svg)
    ]
    return sorted(found, key=lambda cell: (cell[0], cell[1]))


def test_a_number_stands_in_its_cell_at_its_strength():
    rows = [[1.0, 4.0], [None, float("nan")], [0.0, 2.0]]
    found = cells(heat_map(rows, [1, 80], [0.002, 0.5, 3], "a < b", "from t", "to s", Scale(0, 4)))
    half = (WIDTH - LEFT - RIGHT) / 2
    places = [(LEFT, TOP), (LEFT, TOP + 2 * ROW), (LEFT + half, TOP), (LEFT + half, TOP + 2 * ROW)]
    assert [(x, y) for x, y, *_ in found] == places
    strength = [FAINTEST + (1 - FAINTEST) * share for share in (0, 0.25, 0.5, 1)]
    assert [cell[3] for cell in found] == pytest.approx(strength, abs=1e-3)
    notes = [("1", "3", "0"), ("1", "0.002", "1.00"), ("80", "3", "2.00"), ("80", "0.002", "4.00")]
    assert [cell[4] for cell in found] == [f"from t {t}, to s {s}: {value}" for t, s, value in notes]


def test_ratios_take_two_colours_that_are_as_strong_on_both_sides():
    below, one, above = cells(heat_map([[0.5, 1.0, 2.0]], [1, 2, 3], [1], "r", "x", "y", Scale(0.25, 4, 1.0)))
    assert below[2] == one[2] != above[2]
    assert below[3] == above[3] == pytest.approx(FAINTEST + (1 - FAINTEST) / 2, abs=1e-3)
    assert one[3] == pytest.approx(FAINTEST)


def test_scales_hold_all_values_and_are_round():
    assert from_zero([[0.034, None]], [[0.0, 0.107]]) == Scale(0.0, 0.11)
    assert from_zero([[float("nan"), None]]).high > 0
    assert around_one([[0.9, 1.3]]) == Scale(1 / 1.5, 1.5, 1.0)
    assert around_one([[0.3, 1.0]]) == Scale(1 / 5, 5.0, 1.0)
    assert around_one([[0.0, 100.0]]) == Scale(1 / 8, 8.0, 1.0)
    assert around_one([[None]]).high > 1
    scale = around_one([[0.3, 1.0]])
    assert [scale.at(share) for share in (0, 0.5, 1)] == pytest.approx([0.2, 1, 5])


def test_a_map_is_labelled_and_escaped():
    grid = [0.002, 0.00753, 0.0229, 80.0]
    svg = heat_map([[0.1] * 4] * 4, grid, grid, "p < q", "from t", "to s", Scale(0, 1))
    assert 'role="img" aria-label="p &lt; q"' in svg and "<title>p &lt; q</title>" in svg
    words = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert words == ["p < q".replace("<", "&lt;"), "0", "0.5", "1", "80", "0.023", "0.0075", "0.002"] + [
        *("0.002", "0.0075", "0.023", "80"),
        *("from t", "to s"),
    ]
