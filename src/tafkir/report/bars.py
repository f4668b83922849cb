"""Bars, histograms and shares around one hundred percent, as inline SVG in the page's colours; no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from tafkir.report.charts import nice_ticks, number, percent

__all__ = ["Share", "SizeBar", "histogram", "share_plot", "size_bars"]

_WIDTH, _HEIGHT = 380, 196
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 22, 34


@dataclass(frozen=True, slots=True)
class Share:
    """One row of `share_plot`: a share of one and its interval; `high` None has no end, `value` None is unknown."""

    label: str
    note: str
    value: float | None
    low: float
    high: float | None
    color: str


@dataclass(frozen=True, slots=True)
class SizeBar:
    """One row of `size_bars`: bytes before and after."""

    label: str
    note: str
    before: int
    after: int


def share_plot(rows: Sequence[Share], limit: float, *, title: str) -> str:
    """What is kept, with intervals, on an axis around 100 %; a line at the limit, a bold one at 100 %."""
    if not rows:
        return ""
    known = [row for row in rows if row.value is not None]
    ends = [end for row in known for end in (row.value, row.low, row.high) if end is not None]
    # Far-off ends are cut, so that the space around the limit stays readable.
    low, high = (min(limit, *ends), max(1.0, *ends)) if ends else (limit, 1.0)
    low, high = max(low, 1 - 20 * (1 - limit) - 0.2), min(high, 1 + 20 * (1 - limit) + 0.2)
    ticks = nice_ticks(low, high if high > low else low + 0.01, 5)

    def place(value: float) -> float:
        return 100 * min(1.0, max(0.0, (value - ticks[0]) / (ticks[-1] - ticks[0])))

    lines = "".join(_upright("grid", place(tick)) for tick in ticks)
    lines += _upright("zero", place(1.0)) + _upright("guide", place(limit))
    body = "".join(_share_row(row, place, lines) for row in rows)
    words = "".join(f'<span style="left:{place(t):.2f}%">{_short(100 * t)}</span>' for t in ticks)
    foot = f'<div class="iv-row iv-axis"><span></span><span class="iv-ticks">{words}</span><span>%</span></div>'
    return f'<div class="intervals" role="img" aria-label="{escape(title, quote=True)}">{body}{foot}</div>'


def _upright(kind: str, place: float) -> str:
    return f'<line class="{kind}" x1="{place:.2f}%" x2="{place:.2f}%" y1="0" y2="100%"/>'


def _share_row(row: Share, place: Callable[[float], float], lines: str) -> str:
    mark, shown = "", percent(row.value)
    detail = shown
    if row.value is not None:
        end = 100.0 if row.high is None else place(row.high)
        detail += f", 95 % interval {percent(row.low)} to {'no end' if row.high is None else percent(row.high)}"
        mark = (
            f'<line class="whisker {row.color}" x1="{place(row.low):.2f}%" x2="{end:.2f}%" y1="20" y2="20"/>'
            f'<circle class="dot {row.color}" cx="{place(row.value):.2f}%" cy="20" r="5.5"/>'
        )
    return (
        f'<div class="iv-row"><span class="iv-label">{escape(row.label)}<small>{escape(row.note)}</small></span>'
        f'<svg class="iv-track" height="40"><title>{escape(row.label)}: {detail}</title>{lines}{mark}</svg>'
        f'<span class="iv-value">{shown}</span></div>'
    )


def size_bars(rows: Sequence[SizeBar], size: Callable[[float], str], *, title: str) -> str:
    """Bytes before (faint) and after (full) on one axis, one row a component."""
    if not rows:
        return ""
    most = max(1, *(row.before for row in rows), *(row.after for row in rows))
    body = []
    for row in rows:
        ratio = f"{row.before / max(1, row.after):.2f}×"
        detail = f"{escape(row.label)}: {size(row.before)} to {size(row.after)}"
        bars = "".join(
            f'<rect class="bar {kind}" x="0" y="{y}" width="{max(0.3, 100 * value / most):.2f}%" height="11" rx="2"/>'
            for kind, value, y in (("faint", row.before, 7), ("c-rlvr", row.after, 21))
        )
        body.append(
            f'<div class="iv-row"><span class="iv-label">{escape(row.label)}<small>{escape(row.note)}</small></span>'
            f'<svg class="iv-track" height="40"><title>{detail}</title>{bars}</svg>'
            f'<span class="iv-value">{ratio}</span></div>'
        )
    return f'<div class="intervals" role="img" aria-label="{escape(title, quote=True)}">{"".join(body)}</div>'


def histogram(
    bins: Sequence[tuple[float, int]], *, title: str, x_label: str, guides: Sequence[tuple[float, str]] = ()
) -> str:
    """Counts over a logarithmic axis as an SVG element; an empty string without counts.

    Args:
        bins: lower end and count of bins of equal width on that axis, in order.
        guides: values worth naming, in order: (value, word).
    """
    if len(bins) < 2 or not any(count for _, count in bins):
        return ""
    step = math.log10(bins[1][0] / bins[0][0])
    first, most = math.log10(bins[0][0]), max(count for _, count in bins)
    width = (_WIDTH - _LEFT - _RIGHT) / len(bins)
    ticks = nice_ticks(0, most, 4)
    bottom = _HEIGHT - _BOTTOM

    def x(value: float) -> float:
        return _LEFT + (math.log10(value) - first) / step * width

    def y(count: float) -> float:
        return bottom - count / ticks[-1] * (bottom - _TOP)

    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
        )
    for i, (low, count) in enumerate(bins):
        words = f"{number(low, 2)} to {number(low * 10**step, 2)}: {count:,} tokens"
        parts.append(
            f'<rect class="bar c-rlvr" x="{_LEFT + i * width + 0.5:.1f}" y="{y(count):.1f}" '
            f'width="{max(0.5, width - 1):.1f}" height="{bottom - y(count):.1f}"><title>{words}</title></rect>'
        )
    last = first + step * len(bins)
    powers = range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
    for power in powers[:: -(-len(powers) // 6)]:
        place = x(10.0**power)
        parts.append(
            f'<text class="tick" x="{place:.1f}" y="{bottom + 15}" text-anchor="middle">{_power(power)}</text>'
        )
    parts.append(
        f'<text class="tick" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 3}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    parts += [_guide(x(value), word, i) for i, (value, word) in enumerate(guides) if first <= math.log10(value) <= last]
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )


def _guide(place: float, word: str, index: int) -> str:
    """A named upright line; neighbours' names stand at two heights."""
    top = 9 + 11 * (index % 2)
    anchor = "end" if place > _WIDTH - 70 else "start"
    beside = -4 if anchor == "end" else 4
    return (
        f'<line class="guide" x1="{place:.1f}" x2="{place:.1f}" y1="{top - 7}" y2="{_HEIGHT - _BOTTOM}"/>'
        f'<text class="tick" x="{place + beside:.1f}" y="{top}" text-anchor="{anchor}">{escape(word)}</text>'
    )


def _power(power: int) -> str:
    if -3 <= power <= 3:
        return f"{10.0**power:g}"
    raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}"


def _short(value: float) -> str:
    rounded = round(value, 6)
    return f"{rounded / 1000:g}k" if abs(rounded) >= 10_000 else f"{rounded:g}".replace("-", "−")
