"""The efficiency card as a page: accuracy against FLOPs of an answer on a logarithmic axis, and the table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tafkir.report.charts import percent
from tafkir.report.page import frame_page, plain_table

__all__ = ["render_card", "scatter"]

_HEAD = (
    "Model",
    "Right",
    "95 % interval",
    "Parameters",
    "FLOP a puzzle",
    "Seconds a puzzle",
    "On disk",
    "Steps or tokens",
)
_COLORS = ("c-rlvr", "c-sft", "c-second", "c-third", "c-pretrain")
_WIDTH, _HEIGHT = 600, 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 18, 18, 48
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

Row = Mapping[str, Any]


def render_card(card: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        card: what `card.json` holds.
    """
    rows: Sequence[Row] = card["rows"]
    name = str(card["task"])
    body = (
        f'<header class="hero"><p class="eyebrow">Tafkir efficiency card · <b>{escape(name)}</b></p>'
        f'<h1>{escape(_sentence(card))}</h1><div class="beside"><p>{escape(_beside(card))}</p></div></header>'
        f"<main><section><h2>Accuracy against computation</h2>{_figure(rows)}</section>"
        f"<section><h2>All figures</h2>{plain_table(_HEAD, [_cells(row) for row in rows])}{_how(card)}</section></main>"
    )
    return frame_page(f"{name} · Tafkir efficiency card", body)


# ---- words -------------------------------------------------------------------------------------------------------


def _best(rows: Sequence[Row], kind: str) -> Row | None:
    """The most accurate row of a kind; of equals the cheapest."""
    own = [row for row in rows if row["kind"] == kind]
    return max(own, key=lambda row: (row["accuracy"]["value"], -row["flops"]), default=None)


def _sentence(card: Mapping[str, Any]) -> str:
    recursive, language = (_best(card["rows"], kind) for kind in ("recursive", "language"))
    puzzles = f"{card['num_puzzles']:,} puzzles"
    if recursive is None or language is None:
        found = recursive or language
        if found is None:
            return f"Nothing was asked {puzzles}."
        return f"{found['name']} solves {percent(found['accuracy']['value'])} of {puzzles}."
    times = language["flops"] / recursive["flops"]
    cost = f"{_times(times)} the computation" if times >= 1 else f"{_times(1 / times)} less computation"
    return (
        f"{recursive['name']} solves {percent(recursive['accuracy']['value'])} of {puzzles}; "
        f"{language['name']} solves {percent(language['accuracy']['value'])} with {cost}."
    )


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:,.0f} times"


def _beside(card: Mapping[str, Any]) -> str:
    part = card["settings"]["split"]
    unseen = " that no recursive model of this recipe was trained on, in any form" if part != "train" else ""
    words = (
        f"Everyone was asked the same puzzles of the {part} part{unseen}. One grader judged all answers: by the rules "
        "where they are known, by the one right answer elsewhere."
    )
    return " ".join([words, *card["notes"]])


def _how(card: Mapping[str, Any]) -> str:
    timed, count = card["settings"]["timed"], card["settings"]["threads"]
    threads = "one thread" if count == 1 else f"{count} threads"
    words = (
        "FLOPs are counted from shapes: multiplications and additions of matrix products and attention, for a language "
        "model over its prompt and its own tokens, for a recursive one over its passes. Seconds are wall time of one "
        f"puzzle alone, the median of {timed}, with {threads} of one machine. A search by the rules stands there as a "
        "yardstick; where one is known, no network is needed."
    )
    return f"<p><small>{escape(words)}</small></p>"


def _cells(row: Row) -> list[str]:
    share = row["accuracy"]
    counted = f"{row['parameters']:,}" if row["parameters"] else "–"
    if row["active_parameters"] != row["parameters"]:
        counted += f"\n{row['active_parameters']:,} active"
    return [
        f"{row['name']}\n{row['answered']}",
        percent(share["value"]),
        f"{percent(share['low'])} to {percent(share['high'])}",
        counted,
        "–" if row["flops"] is None else _short(row["flops"]),
        f"{row['seconds']:.3g}",
        f"{row['bytes_on_disk'] / 1e6:.2f} MB" if row["bytes_on_disk"] else "–",
        f"{row['amount']:.1f}" if row["amount"] else "–",
    ]


def _short(value: float) -> str:
    size, sign = next(((size, sign) for size, sign in _PREFIXES if value >= size), (1.0, ""))
    return f"{value / size:.3g}\u202f{sign}"


# ---- the figure --------------------------------------------------------------------------------------------------


def _figure(rows: Sequence[Row]) -> str:
    drawn = [row for row in rows if row["flops"]]
    colors = _colors(drawn)
    keys = "".join(
        f'<span class="{color} key-dot"><i style="color:var(--c)"></i>{escape(name)}</span>'
        for name, color in colors.items()
    )
    look = (
        "<b>Look for</b> the upper left corner: right answers for little computation. A line follows a recursive model "
        "from step to step, the ring is where it halts by itself; bars are 95 % intervals. Each mark on the axis "
        "below is ten times the one before."
    )
    return (
        f'<figure class="card">{scatter(drawn)}<div class="legend">{keys}</div><figcaption>{look}</figcaption></figure>'
    )


def _colors(rows: Sequence[Row]) -> dict[str, str]:
    names = list(dict.fromkeys(row["name"] for row in rows))
    return {name: _COLORS[place % len(_COLORS)] for place, name in enumerate(names)}


def scatter(rows: Sequence[Row]) -> str:
    """Accuracy over FLOPs as an SVG element; an empty string where no row has FLOPs."""
    drawn = [row for row in rows if row["flops"]]
    if not drawn:
        return ""
    costs = [row["flops"] for row in drawn] + [flops for row in drawn for flops, _ in row["curve"]]
    low, high = math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs)))
    high = max(high, low + 1)

    def x(flops: float) -> float:
        return _LEFT + (math.log10(flops) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(share: float) -> float:
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    colors = _colors(drawn)
    parts = [_axes([10.0**power for power in range(low, high + 1)], x, y)]
    for row in drawn:
        color = colors[row["name"]]
        if row["curve"]:
            path = " ".join(f"{x(flops):.1f},{y(share):.1f}" for flops, share in row["curve"])
            parts.append(f'<polyline class="thin {color}" points="{path}"/>')
            parts += [_dot(x(flops), y(share), color, 2.5, "") for flops, share in row["curve"][:-1]]
        share, at = row["accuracy"], x(row["flops"])
        hollow = row["kind"] == "recursive" and not row["curve"]
        whisker = f'y1="{y(share["low"]):.1f}" y2="{y(share["high"]):.1f}"'
        parts.append(f'<line class="whisker {color}" x1="{at:.1f}" x2="{at:.1f}" {whisker}/>')
        title = f"{row['name']}, {row['answered']}: {percent(share['value'])} at {_short(row['flops'])}FLOP"
        parts.append(_dot(at, y(share["value"]), color, 6, title, hollow=hollow))
    return (
        f'<svg class="chart" style="max-width: 860px" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Accuracy over FLOPs of a puzzle">{"".join(parts)}</svg>'
    )


def _dot(x: float, y: float, color: str, radius: float, title: str, *, hollow: bool = False) -> str:
    words = f"<title>{escape(title)}</title>" if title else ""
    kind = "dot hollow" if hollow else "dot"
    return f'<circle class="{kind} {color}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}">{words}</circle>'


def _axes(powers: Sequence[float], x: Any, y: Any) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        place = y(share)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{percent(share, 0)}</text>'
        )
    for power in powers:
        place = x(power)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{place:.1f}" y="{bottom + 18}" text-anchor="middle">{_short(power)}</text>'
        )
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="tick" x="{middle:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">FLOP a puzzle</text>')
    return "".join(parts)
