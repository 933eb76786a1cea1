"""Charts put known points on known pixels, under round ticks."""

import re

import pytest

from onejump.svg import INSET, LEFT, PLOT, RIGHT, WIDTH, Axis, Style, fit, line_chart, tick_text


def spots(svg):
    """Pixels of the drawn lines, without frame, grid and legend."""
    return [
        [tuple(map(float, p.split())) for p in path.split("L")]
        for path in re.findall(r'<path d="M([^"]*)" stroke-linejoin', svg)
    ]


def test_chart_draws_known_points_at_known_pixels():
    left, right, top = LEFT + INSET, WIDTH - RIGHT - INSET, 24 + 18 + 30
    points = [(0, 0), (50, 5), (75, None), (80, float("nan")), (100, 10)]
    (line,) = spots(line_chart({"a": points}, "title", "x", "y"))
    assert line == [(left, top + PLOT), ((left + right) / 2, top + PLOT / 2), (right, top)]
    decades = [(0.01, 1), (1, 10), (100, 100), (10, 0.0), (float("inf"), 2)]
    (line,) = spots(line_chart({"a": decades}, "title", "x", "y", log_x=True, log_y=True))
    assert line == [(left, top + PLOT), ((left + right) / 2, top + PLOT / 2), (right, top)]


def test_single_point_and_marked_series_get_markers():
    svg = line_chart({"one": [(3, 4)], "two": [(1, 2), (2, 3)]}, "t", "x", "y", styles={"two": Style(1, markers=True)})
    assert len(spots(svg)) == 1
    assert svg.count('r="3.5"') == 3
    assert "<title>one: 4 at 3</title>" in svg


def test_chart_without_a_finite_value_says_so():
    assert "no finite values" in line_chart({"a": [(1, None)], "b": []}, "t", "x", "y")


def test_chart_is_labelled_and_escaped():
    svg = line_chart({"<a>": [(1, 1), (2, 2)]}, "p < q", "x & y", "z")
    assert 'role="img" aria-label="p &lt; q"' in svg
    assert "<title>p &lt; q</title>" in svg
    assert "&lt;a&gt;" in svg and "x &amp; y" in svg


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0, 1200, 0, 1), [0, 200, 400, 600, 800, 1000, 1200]),
        (Axis(-0.3, 0.3, 0, 1), [-0.2, 0, 0.2]),
        (Axis(25, 2600, 0, 1), [500, 1000, 1500, 2000, 2500]),
        (Axis(0.002, 80, 0, 1, log=True), [0.01, 0.1, 1, 10]),
        (Axis(1, 18, 0, 1, log=True), [1, 2, 5, 10]),
        (Axis(0.05, 5, 0, 1, log=True), [0.05, 0.1, 0.2, 0.5, 1, 2, 5]),
    ],
)
def test_ticks_are_round_and_inside_the_axis(axis, ticks):
    assert axis.ticks() == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("values", "log", "ends"),
    [
        ([3.2, 41.0], True, (2, 50)),
        ([2.0, 50.0], True, (2, 50)),
        ([0.0007, 0.0011], True, (0.0005, 0.002)),
        ([0.13, 0.88], False, (0.0, 1.0)),
        ([-7.0, 13.0], False, (-10.0, 15.0)),
        ([4.0], False, (2.0, 6.0)),
        ([4.0], True, (2.0, 10.0)),
        ([0.0], False, (-1.0, 1.0)),
    ],
)
def test_axis_ends_at_round_values_around_the_data(values, log, ends):
    axis = fit(values, 0, 1, log, outwards=True)
    assert (axis.low, axis.high) == pytest.approx(ends)


def test_tick_labels_are_short():
    assert [tick_text(v) for v in (0, 0.02, 1e-5, 2500, 25_000, 1.5e6)] == ["0", "0.02", "1e-5", "2500", "25k", "1.5M"]


def test_an_axis_of_whole_numbers_has_whole_ticks():
    for x, whole in (((2, 4), True), ((2.0, 4.0), False)):
        found = re.findall(
            r'text-anchor="middle" opacity="[^"]*">([^<]*)<', line_chart({"a": [(k, 1.0) for k in x]}, *"txy")
        )
        assert ("2.5" not in found) is whole and {"2", "3", "4"} <= set(found)
