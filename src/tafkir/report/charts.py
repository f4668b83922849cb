"""Small inline-SVG charts: lines, intervals and heat strips that follow the page's colours in light and dark.

No script and no outside resource: the read-out under the pointer is plain CSS. Colours come from CSS classes
(`c-sft`, `c-rlvr` ...) that the page defines, so that one chart serves both themes and print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from statistics import fmean

__all__ = [
    "Bar",
    "Line",
    "heat_strip",
    "interval_plot",
    "light_strip",
    "line_chart",
    "number",
    "percent",
    "signed_points",
]

Point = tuple[float, float | None]

WIDTH, HEIGHT = 380, 196
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 22, 22
MAX_HOVER_COLUMNS = 60
MAX_RAW_POINTS = 360


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: its points (y None where there is no finite value), legend name and colour class."""

    name: str
    points: Sequence[Point]
    color: str
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of an interval plot, in shares of one; `low` and `high` None draw a bare mark.

    `second` is another (value, low, high) for the same row, drawn hollow below the first.
    """

    label: str
    value: float
    low: float | None
    high: float | None
    color: str
    note: str = ""
    second: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps data to pixels; logarithmic on the y axis where asked."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    ticks: Sequence[float] = field(default_factory=tuple)

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        place = math.log10(max(value, self.low)) if self.log else value
        share = (place - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


# ---- numbers as words --------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """A number for reading: `1,234`, `0.0312`, `3.1e-6`, `8.8e18`, with a true minus sign; a dash for None."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e15:
        text = f"{value:.1e}".replace("e+", "e")
    elif size >= 1000 or value == int(value):
        text = f"{value:,.0f}"
    elif size < 1e-4:
        text = f"{value:.1e}".replace("e-0", "e-")
    else:
        text = f"{value:.{digits}g}"
    return text.replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str:
    """`0.312` -> `31.2 %`, with a space that does not break."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}\u202f%".replace("-", "−")


def signed_points(share: float, digits: int = 1) -> str:
    """`0.072` -> `+7.2`, in points of a hundred."""
    points = round(100 * share, digits) + 0.0
    return f"{points:+.{digits}f}".replace("-", "−")


def _tick_label(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scaled = value / (1e3 if suffix == "k" else limit)
            return f"{scaled:g}{suffix}".replace("-", "−")
    return (f"{value:.2g}".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else f"{value:g}").replace("-", "−")


# ---- axes --------------------------------------------------------------------------------------------------------


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from at or below `low` to at or above `high`, `low` < `high`."""
    raw = (high - low) / wanted
    exponent = math.floor(math.log10(raw))
    power = 10.0**exponent
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 2 - exponent) for i in range(first, last + 1)]


def _y_scale(values: Sequence[float], log: bool, limits: tuple[float | None, float | None]) -> _Scale:
    if log:
        return _log_scale([v for v in values if v > 0])
    low = min(values) if limits[0] is None else min(limits[0], *values)
    high = max(values) if limits[1] is None else max(limits[1], *values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        # A flat line gets room on the sides where no limit stands.
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad * (limits[0] is None), high + pad * (limits[1] is None)
    ticks = nice_ticks(low, high)
    return _Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, False, ticks)


def _log_scale(positive: Sequence[float]) -> _Scale:
    bottom = math.floor(math.log10(min(positive))) if positive else -1
    top = max(bottom + 1, math.ceil(math.log10(max(positive)) - 1e-9)) if positive else 0
    stride = math.ceil((top - bottom) / 4)
    ticks = [10.0**exponent for exponent in range(bottom, top + 1, stride)]
    return _Scale(10.0**bottom, 10.0**top, HEIGHT - BOTTOM, TOP, True, ticks)


def _x_scale(values: Sequence[float]) -> _Scale:
    low, high = min(values), max(values)
    if high == low:
        return _Scale(low - 1, high + 1, LEFT, WIDTH - RIGHT, False, [low])
    inside = [t for t in nice_ticks(low, high, 5) if low - 1e-9 <= t <= high + 1e-9]
    if all(value == int(value) for value in values):
        inside = [t for t in inside if t == int(t)]
    return _Scale(low, high, LEFT, WIDTH - RIGHT, False, inside)


def _axes(x: _Scale, y: _Scale, x_label: str, y_format: Callable[[float], str]) -> str:
    parts = []
    for tick in y.ticks:
        place = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{y_format(tick)}</text>')
    for tick in x.ticks:
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - 5}" text-anchor="middle">{_tick_label(tick)}</text>'
        )
    # Clear of a first tick that stands right at the axis.
    parts.append(f'<text class="tick" x="{LEFT - 12}" y="{HEIGHT - 5}" text-anchor="end">{escape(x_label)}</text>')
    return "".join(parts)


# ---- lines -------------------------------------------------------------------------------------------------------


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str = "step",
    y_format: Callable[[float], str] = _tick_label,
    value_format: Callable[[float], str] = lambda value: number(value, 4),
    log: bool = False,
    y_min: float | None = None,
    y_max: float | None = None,
    guide: tuple[float, str] | None = None,
) -> str:
    """Curves over one x axis as an SVG element; an empty string where no line has a finite point.

    A noisy curve of 40 points or more is drawn twice: faint as it is, and bold as it runs when smoothed.

    Args:
        title: what a screen reader says of the chart.
        y_format, value_format: how the axis and the read-out write a value.
        y_min, y_max: values that the y axis reaches at least.
        guide: a horizontal line worth naming, as (value, words).
    """
    kept = [line for line in lines if any(v is not None for _, v in line.points)]
    if not kept:
        return ""
    values = [v for line in kept for _, v in line.points if v is not None]
    values += [guide[0]] if guide else []
    x = _x_scale([step for line in kept for step, _ in line.points])
    y = _y_scale(values, log, (y_min, y_max))
    body = _axes(x, y, x_label, y_format) + _guide(guide, y)
    body += "".join(_curve(line, x, y) for line in kept) + _hover(kept, x, y, (x_label, value_format))
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{body}</svg>"
    )


def _guide(guide: tuple[float, str] | None, y: _Scale) -> str:
    if guide is None:
        return ""
    place = y(guide[0])
    return (
        f'<line class="guide" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
        f'<text class="tick" x="{WIDTH - RIGHT - 2}" y="{place - 4:.1f}" text-anchor="end">{escape(guide[1])}</text>'
    )


def smooth(points: Sequence[Point]) -> list[Point]:
    """A straight line fitted around each point, over about a tenth of the points.

    Unlike a moving average it neither bends the ends of a slope nor gets noisy there. Gaps are left out.
    """
    reach = max(5, len(points) // 20)
    return [(step, _local_fit(points[max(0, i - reach) : i + reach + 1], step)) for i, (step, _) in enumerate(points)]


def _local_fit(window: Sequence[Point], step: float) -> float | None:
    known = [(s - step, v) for s, v in window if v is not None]
    if not known:
        return None
    centre, mean = fmean(s for s, _ in known), fmean(v for _, v in known)
    spread = sum((s - centre) ** 2 for s, _ in known)
    slope = sum((s - centre) * (v - mean) for s, v in known) / spread if spread else 0.0
    return mean - slope * centre


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most about `limit` points that keep each stretch's lowest and highest value, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = sorted((value, i) for i, (_, value) in enumerate(stretch) if value is not None)
        if not finite:
            kept.append(stretch[0])
            continue
        kept.extend(stretch[i] for i in sorted({finite[0][1], finite[-1][1]}))
    return kept


def _curve(line: Line, x: _Scale, y: _Scale) -> str:
    if line.dots or len([p for p in line.points if p[1] is not None]) == 1:
        return _dots(line, x, y)
    noisy = len(line.points) >= 40
    raw = f'<path class="raw {line.color}" d="{_path(thin(line.points, MAX_RAW_POINTS), x, y)}"/>' if noisy else ""
    bold = thin(smooth(line.points), MAX_RAW_POINTS) if noisy else line.points
    return f'{raw}<path class="line {line.color}" d="{_path(bold, x, y)}"/>'


def _dots(line: Line, x: _Scale, y: _Scale) -> str:
    marks = "".join(
        f'<circle class="dot {line.color}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>'
        for step, value in line.points
        if value is not None
    )
    return f'<path class="thin {line.color}" d="{_path(line.points, x, y)}"/>{marks}'


def _path(points: Sequence[Point], x: _Scale, y: _Scale) -> str:
    parts, pen = [], "M"
    for step, value in points:
        if value is None:
            pen = "M"
            continue
        parts.append(f"{pen}{x(step):.1f} {y(value):.1f}")
        pen = "L"
    return "".join(parts)


def _hover(lines: Sequence[Line], x: _Scale, y: _Scale, words_of: tuple[str, Callable[[float], str]]) -> str:
    """Invisible columns, each with the read-out that shows while the pointer or a finger is on it."""
    x_label, value_format = words_of
    steps = sorted({step for line in lines for step, value in line.points if value is not None})
    stride = math.ceil(len(steps) / MAX_HOVER_COLUMNS)
    shown = steps[::stride]
    lookup = [(line, {step: value for step, value in line.points}) for line in lines]
    edges = [LEFT, *((x(a) + x(b)) / 2 for a, b in pairwise(shown)), WIDTH - RIGHT]
    columns = []
    for step, left, right in zip(shown, edges, edges[1:], strict=False):
        here = [(line, values.get(step)) for line, values in lookup]
        words = " · ".join(f"{line.name} {value_format(v)}" for line, v in here if v is not None)
        dots = "".join(
            f'<circle class="dot {line.color}" cx="{x(step):.1f}" cy="{y(v):.1f}" r="3.5"/>'
            for line, v in here
            if v is not None
        )
        columns.append(
            f'<g class="hit"><rect x="{left:.1f}" y="0" width="{max(0.5, right - left):.1f}" height="{HEIGHT}"/>'
            f'<g class="tip"><line x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>{dots}'
            f'<text x="{WIDTH - RIGHT}" y="12" text-anchor="end">{escape(x_label)} {number(step)} · {escape(words)}'
            "</text></g></g>"
        )
    return "".join(columns)


# ---- intervals and heat ------------------------------------------------------------------------------------------


def interval_plot(bars: Sequence[Bar], *, title: str, signed: bool = False, reach: float = 0.01, unit: str = "") -> str:
    """Dots with their intervals on one axis that holds zero, as HTML rows with fluid SVG tracks.

    Args:
        signed: the values are differences, written with their sign; otherwise shares, written in percent.
        reach: value that the axis reaches at least, so that several plots can share one.
        unit: below the values, instead of "points" or "%".
    """
    if not bars:
        return ""
    ends = [v for bar in bars for v in (bar.value, bar.low, bar.high, *(bar.second or ())) if v is not None]
    low, high = min(0.0, *ends), max(reach, *ends)
    ticks = nice_ticks(low, high if signed else min(1.0, high), 5)
    axis = _Scale(ticks[0], ticks[-1], 0.0, 100.0)
    rows = "".join(_interval_row(bar, axis, ticks, signed) for bar in bars)
    words = [f"{'+' if signed and t > 0 else ''}{_tick_label(round(100 * t, 9))}" for t in ticks]
    labels = "".join(f'<span style="left:{axis(t):.2f}%">{w}</span>' for t, w in zip(ticks, words, strict=True))
    unit = escape(unit) or ("points" if signed else "%")
    foot = f'<div class="iv-row iv-axis"><span></span><span class="iv-ticks">{labels}</span><span>{unit}</span></div>'
    return f'<div class="intervals" role="img" aria-label="{escape(title, quote=True)}">{rows}{foot}</div>'


def _interval_row(bar: Bar, axis: _Scale, ticks: Sequence[float], signed: bool) -> str:
    def shown(value: float) -> str:
        return signed_points(value) if signed else percent(value)

    lines = "".join(
        f'<line class="{"zero" if t == 0 else "grid"}" x1="{axis(t):.2f}%" x2="{axis(t):.2f}%" y1="0" y2="100%"/>'
        for t in ticks
    )
    detail = shown(bar.value)
    if bar.low is None or bar.high is None:
        place = f"{axis(bar.value):.2f}%"
        mark = f'<line class="bare {bar.color}" x1="{place}" x2="{place}" y1="10" y2="30"/>'
    else:
        mark = _interval_mark((bar.value, bar.low, bar.high), axis, bar.color, 15 if bar.second else 20)
        detail += f", 95 % interval {shown(bar.low)} to {shown(bar.high)}"
    if bar.second:
        mark += _interval_mark(bar.second, axis, f"hollow {bar.color}", 28)
        detail += f"; hollow: {shown(bar.second[0])}, {shown(bar.second[1])} to {shown(bar.second[2])}"
    note = f"<small>{escape(bar.note)}</small>" if bar.note else ""
    return (
        f'<div class="iv-row"><span class="iv-label">{escape(bar.label)}{note}</span>'
        f'<svg class="iv-track" height="40"><title>{escape(bar.label)}: {detail}</title>{lines}{mark}</svg>'
        f'<span class="iv-value">{shown(bar.value)}</span></div>'
    )


def _interval_mark(estimate: tuple[float, float, float], axis: _Scale, color: str, y: int) -> str:
    value, low, high = estimate
    return (
        f'<line class="whisker {color}" x1="{axis(low):.2f}%" x2="{axis(high):.2f}%" y1="{y}" y2="{y}"/>'
        f'<circle class="dot {color}" cx="{axis(value):.2f}%" cy="{y}" r="{4 if "hollow" in color else 5.5}"/>'
    )


def heat_strip(rows: Sequence[tuple[str, Sequence[float | None]]], *, title: str) -> str:
    """One strip a row: each cell's strength is its value against the row's even share, full at twice that share.

    Args:
        rows: (label, shares that sum to one) per layer.
    """
    strips = []
    for label, shares in rows:
        size = len(shares)
        cells = []
        for i, share in enumerate(shares):
            relative = (share or 0.0) * size
            cells.append(
                f'<rect class="heat" x="{100 * i / size:.2f}%" width="{92 / size:.2f}%" height="26" '
                f'fill-opacity="{min(1.0, relative / 2):.2f}"><title>{escape(label)}, expert {i}: '
                f"{percent(share)} of the tokens, {relative:.2f} times the even share</title></rect>"
            )
        busiest = max((s or 0.0) for s in shares) * size if shares else 0.0
        strips.append(
            f'<div class="iv-row heat-row"><span class="iv-label">{escape(label)}</span>'
            f'<svg class="heat-track" height="26">{"".join(cells)}</svg>'
            f'<span class="iv-value">{busiest:.1f}×</span></div>'
        )
    return f'<div class="intervals" role="img" aria-label="{escape(title, quote=True)}">{"".join(strips)}</div>'


def light_strip(cells: Sequence[tuple[int, int, int]], names: Sequence[str], *, title: str) -> str:
    """One strip over the steps of a stage, one cell a stretch of them in the colour of its light.

    Args:
        cells: first step, last step and light of each stretch.
        names: what the lights are called; a cell's CSS class is `light-<name>`.
    """
    width = 100 / max(1, len(cells))
    marks = "".join(
        f'<rect class="light-{names[light]}" x="{i * width:.3f}%" width="{0.92 * width:.3f}%" height="26">'
        f"<title>{f'step {first}' if first == last else f'steps {first} to {last}'}: {names[light]}</title></rect>"
        for i, (first, last, light) in enumerate(cells)
    )
    svg = f'<svg class="heat-track" height="26">{marks}</svg>'
    return f'<div class="intervals" role="img" aria-label="{escape(title, quote=True)}">{svg}</div>'
