"""The charts: round ticks, no lost spike, honest gaps, and SVG that parses."""

from __future__ import annotations

import math
import random
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tafkir.report.charts import (
    HEIGHT,
    WIDTH,
    Bar,
    Line,
    heat_strip,
    interval_plot,
    line_chart,
    nice_ticks,
    number,
    percent,
    signed_points,
    smooth,
    thin,
)


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6))
@settings(max_examples=200, deadline=None)
def test_ticks_are_round_and_cover_the_range(low: float, width: float) -> None:
    high = low + width
    if not high > low or width < 1e-9 * abs(low):
        return
    ticks = nice_ticks(low, high)
    slack = 1e-6 * width
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 8
    steps = [b - a for a, b in pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)
    # Differences of ticks far from zero are exact to a millionth only: 9.99999998 is a ten.
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0] * (1 + 1e-6)))
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-5


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1234567, "1,234,567"),
        (8.84295e18, "8.8e18"),
        (0.03123, "0.0312"),
        (-2.5, "−2.5"),
        (2.4e-7, "2.4e−7"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_numbers_read_well(value: float | None, words: str) -> None:
    assert number(value) == words


def test_percent_and_points_have_a_sign_where_it_matters() -> None:
    assert percent(0.312) == "31.2\u202f%"
    assert (signed_points(0.072), signed_points(-0.004), signed_points(-0.0001)) == ("+7.2", "−0.4", "+0.0")


@given(st.lists(st.one_of(st.none(), st.floats(-1e3, 1e3)), min_size=1, max_size=900))
@settings(max_examples=60, deadline=None)
def test_thinning_keeps_the_extremes_and_the_order(values: list[float | None]) -> None:
    points = [(float(i), v) for i, v in enumerate(values)]
    kept = thin(points, 100)
    assert len(kept) <= 102
    assert all(point in points for point in kept)
    assert [s for s, _ in kept] == sorted(s for s, _ in kept)
    finite = [v for v in values if v is not None]
    if finite:
        shown = [v for _, v in kept if v is not None]
        assert (min(shown), max(shown)) == (min(finite), max(finite))


def test_smoothing_leaves_a_slope_as_it_is_and_calms_noise() -> None:
    slope = [(float(i), 3.0 - 0.5 * i) for i in range(60)]
    assert [v for _, v in smooth(slope)] == pytest.approx([v for _, v in slope])
    generator = random.Random(0)
    noise = [(float(i), generator.gauss(0, 1)) for i in range(400)]
    calm = [v for _, v in smooth(noise) if v is not None]
    assert sum(v * v for v in calm) < 0.2 * sum(v * v for _, v in noise if v is not None)


def test_smoothing_passes_over_gaps() -> None:
    points = [(float(i), None if i % 3 else float(i)) for i in range(60)]
    assert [v for _, v in smooth(points)] == pytest.approx([float(i) for i in range(60)])


def _parse(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def test_a_line_chart_stays_inside_its_frame() -> None:
    generator = random.Random(1)
    points = [(float(i), generator.gauss(5, 2)) for i in range(500)]
    tree = _parse(line_chart([Line("loss", points, "c-sft")], title="Loss"))
    for path in tree.iter("path"):
        numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", path.attrib["d"])]
        assert all(0 <= x <= WIDTH for x in numbers[::2])
        assert all(0 <= y <= HEIGHT for y in numbers[1::2])


def test_a_higher_value_is_drawn_higher() -> None:
    tree = _parse(line_chart([Line("x", [(0.0, 1.0), (1.0, 3.0)], "c-sft")], title="x"))
    (path,) = list(tree.iter("path"))
    (_, first), (_, second) = [tuple(map(float, p.split())) for p in re.split("[ML]", path.attrib["d"])[1:]]
    assert second < first


def test_a_value_that_was_not_finite_breaks_the_line() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, None), (3.0, 1.0), (4.0, 2.0)]
    tree = _parse(line_chart([Line("x", points, "c-sft")], title="x"))
    (path,) = list(tree.iter("path"))
    assert path.attrib["d"].count("M") == 2


def test_a_chart_without_a_finite_value_is_left_out() -> None:
    assert line_chart([Line("x", [(0.0, None)], "c-sft")], title="x") == ""
    assert line_chart([], title="x") == ""


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-13, 7e9])
def test_a_flat_line_and_a_single_point_have_an_axis(value: float) -> None:
    flat = _parse(line_chart([Line("x", [(0.0, value), (9.0, value)], "c-sft")], title="x"))
    single = _parse(line_chart([Line("x", [(5.0, value)], "c-sft")], title="x"))
    assert list(flat.iter("path")) and list(single.iter("circle"))


def test_shares_at_their_limit_do_not_reach_beyond_it() -> None:
    svg = line_chart([Line("x", [(0.0, 1.0), (9.0, 1.0)], "c")], title="x", y_max=1.0, y_format=lambda v: f"{v:g}!")
    assert max(float(t) for t in re.findall(r">([\d.]+)!<", svg)) == 1.0
    svg = line_chart([Line("x", [(0.0, 0.0)], "c")], title="x", y_min=0.0, y_max=0.001, y_format=lambda v: f"{v:g}!")
    assert min(float(t) for t in re.findall(r">(-?[\d.]+)!<", svg)) == 0.0


def test_a_log_chart_takes_zeros() -> None:
    svg = line_chart([Line("x", [(0.0, 0.0), (1.0, 1e-6), (2.0, 0.1)], "c")], title="x", log=True)
    assert "1e−6" in svg
    assert _parse(svg) is not None


def test_names_from_outside_are_escaped() -> None:
    svg = line_chart([Line("<script>", [(0.0, 1.0), (1.0, 2.0)], "c-sft")], title='"><script>')
    assert "<script>" not in svg
    assert _parse(svg) is not None


def test_an_interval_plot_puts_dots_inside_their_intervals() -> None:
    html = interval_plot([Bar("SFT", 0.3, 0.25, 0.36, "c-sft", second=(0.31, 0.2, 0.4))], title="Accuracy")
    assert "95 % interval 25.0\u202f% to 36.0\u202f%" in html
    whisker = re.search(r'whisker c-sft" x1="([\d.]+)%" x2="([\d.]+)%"', html)
    dot = re.search(r'dot c-sft" cx="([\d.]+)%"', html)
    assert whisker and dot
    assert float(whisker[1]) < float(dot[1]) < float(whisker[2])


def test_a_signed_plot_holds_zero() -> None:
    html = interval_plot([Bar("A", -0.05, -0.08, -0.02, "c-rlvr")], title="Differences", signed=True)
    assert 'class="zero"' in html and "−5.0" in html


def test_heat_follows_the_share() -> None:
    html = heat_strip([("Layer 1", [0.5, 0.25, 0.25, 0.0])], title="Load")
    assert re.findall(r'fill-opacity="([\d.]+)"', html) == ["1.00", "0.50", "0.50", "0.00"]
    assert "2.0×" in html
