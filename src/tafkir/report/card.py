"""The efficiency card as a page: accuracy against FLOPs of an answer on a logarithmic axis, and the table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tafkir.report.charts import percent
from tafkir.report.page import frame_page, plain_table

__all__ = ["render_card", "render_results_card", "results_section", "row_colors", "scatter"]

_HEAD = (
    "Model",
    "Right",
    "95 % interval",
    "Parameters",
    "FLOP a puzzle",
    "Seconds a puzzle",
    "On disk",
    "Steps or tokens",
    "Tokens/s",
    "Joules a puzzle",
    "Peak memory",
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


# ---- of results files ----------------------------------------------------------------------------------------------

_RESULTS_HEAD = (
    "Model",
    "Right",
    "Parameters",
    "On disk",
    "Tokens an answer",
    "FLOP an answer",
    "Tokens/s",
    "$ per 1,000",
)
_PUBLISHED_HEAD = ("Published elsewhere", "Right", "Parameters", "On disk", "Date", "Source")


def render_results_card(card: Mapping[str, Any]) -> str:
    """The card of results files as a page.

    Args:
        card: what `tafkir card RESULTS --json` prints.
    """
    cards = card["cards"]
    models = list(dict.fromkeys(row["name"] for each in cards for row in each["rows"]))
    body = (
        f'<header class="hero"><p class="eyebrow">Tafkir efficiency card · <b>{len(cards)} tasks</b></p>'
        f'<h1 dir="auto">{escape(", ".join(models))}</h1></header><main>{results_section(card)}</main>'
    )
    return frame_page(f"{', '.join(models)} · Tafkir efficiency card", body)


def results_section(card: Mapping[str, Any]) -> str:
    """A section for each task: plots and tables."""
    return "".join(_task_section(each) for each in card["cards"])


def _task_section(card: Mapping[str, Any]) -> str:
    rows, others = card["rows"], card["published"]
    keys = "".join(
        f'<span class="{color} key-dot"><i style="color:var(--c)"></i>{escape(name)}</span>'
        for name, color in row_colors(rows).items()
    )
    plots = [
        scatter(rows, title="FLOP an answer"),
        scatter(rows, cost="active_parameters", title="active parameters", others=others),
    ]
    figures = "".join(f'<figure class="card">{plot}<div class="legend">{keys}</div></figure>' for plot in plots if plot)
    theirs = ""
    if others:
        cells = [_published_cells(row) for row in others]
        theirs = plain_table(_PUBLISHED_HEAD, cells) + (
            "<p><small>Squares in the plot. Other harnesses, prompts and budgets; without intervals; nothing of it was "
            "measured here.</small></p>"
        )
    words = (
        "FLOPs are of an answer with its prompt, counted from the shape; of an older file without it. Tokens/s are of "
        "one answer with its waiting. A "
        "star stands on Pareto's front: no other model here is as right for fewer FLOPs."
    )
    return (
        f"<section><h2>{escape(card['task'])}</h2>"
        f'<div class="cards pairs">{figures}</div>{plain_table(_RESULTS_HEAD, [_result_cells(row) for row in rows])}'
        f"<p><small>{escape(words)}</small></p>{theirs}</section>"
    )


def _result_cells(row: Row) -> list[str]:
    share = row["accuracy"]
    return [
        f"{row['name']}{' ★' if row['best'] else ''}\n{row['num_items']:,} items × {row['samples']}",
        f"{percent(share['value'])}\n{percent(share['low'])} to {percent(share['high'])}",
        _known(row["parameters"]) + (f"\n{_known(active)} active" if (active := row["active_parameters"]) else ""),
        _known(row["bytes"], "B"),
        _known(row["tokens"]),
        _known(row["flops"]),
        _known(row["tokens_per_s"]),
        "–" if row["dollars"] is None else f"{row['dollars']:.3g}",
    ]


def _published_cells(row: Row) -> list[str]:
    return [
        f"{row['name']}\n{row['note'] or ''}",
        percent(row["score"]),
        _known(row["parameters"]),
        _known(row["bytes"], "B"),
        f"{row['date'] or ''}\nread {row['read']}",
        row["source"].removeprefix("https://"),
    ]


def _known(value: float | None, unit: str = "") -> str:
    return "–" if value is None else _short(value) + unit


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
        "yardstick; where one is known, no network is needed. Joules are the whole machine's while it answered those, "
        "where its processor counts them; memory is this process's, with all that it had loaded before."
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
        f"{row['amount'] / row['seconds']:,.0f}" if row["kind"] == "language" and row["seconds"] else "–",
        "–" if row.get("joules") is None else f"{row['joules']:.3g}",
        "–" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e6:,.0f} MB",
    ]


def _short(value: float) -> str:
    size, sign = next(((size, sign) for size, sign in _PREFIXES if value >= size), (1.0, ""))
    return f"{value / size:.3g}\u202f{sign}"


# ---- the figure --------------------------------------------------------------------------------------------------


def _figure(rows: Sequence[Row]) -> str:
    drawn = [row for row in rows if row["flops"]]
    colors = row_colors(drawn)
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


def row_colors(rows: Sequence[Row]) -> dict[str, str]:
    """Name -> colour class, in the order of the rows."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    return {name: _COLORS[place % len(_COLORS)] for place, name in enumerate(names)}


def scatter(
    rows: Sequence[Row], *, cost: str = "flops", title: str = "FLOP a puzzle", others: Sequence[Row] = ()
) -> str:
    """Accuracy over what it costs as an SVG element; an empty string where no row's cost is known.

    A dashed line runs along Pareto's front: nothing to its left is as accurate.

    Args:
        cost: key of the cost, such as "flops" or "active_parameters".
        title: of the axis.
        others: published figures, drawn as small squares without intervals: `name`, `score` and the cost.
    """
    drawn, others = [row for row in rows if row[cost]], [row for row in others if row[cost]]
    if not drawn and not others:
        return ""
    curves = [point for row in drawn for point in row.get("curve", ())] if cost == "flops" else []
    costs = [row[cost] for row in (*drawn, *others)] + [flops for flops, _ in curves]
    low, high = math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs)))
    high = max(high, low + 1)

    def x(flops: float) -> float:
        return _LEFT + (math.log10(flops) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    reached = [row["accuracy"]["high"] for row in drawn] + [row["score"] for row in others] + [y for _, y in curves]
    top = next((top for top in (0.2, 0.4, 0.6, 0.8) if max(reached) <= top), 1.0)

    def y(share: float) -> float:
        return _HEIGHT - _BOTTOM - share / top * (_HEIGHT - _BOTTOM - _TOP)

    colors = row_colors(drawn)
    parts = [_axes([10.0**power for power in range(low, high + 1)], x, y, title, top), _front(drawn, cost, x, y)]
    parts += [_square(x(row[cost]), y(row["score"]), f"{row['name']}: {percent(row['score'])}") for row in others]
    for row in drawn:
        color = colors[row["name"]]
        if curves and row.get("curve"):
            path = " ".join(f"{x(flops):.1f},{y(share):.1f}" for flops, share in row["curve"])
            parts.append(f'<polyline class="thin {color}" points="{path}"/>')
            parts += [_dot(x(flops), y(share), color, 2.5, "") for flops, share in row["curve"][:-1]]
        share, at = row["accuracy"], x(row[cost])
        hollow = row.get("kind") == "recursive" and not row["curve"]
        whisker = f'y1="{y(share["low"]):.1f}" y2="{y(share["high"]):.1f}"'
        parts.append(f'<line class="whisker {color}" x1="{at:.1f}" x2="{at:.1f}" {whisker}/>')
        words = ", ".join(filter(None, (row["name"], row.get("answered"))))
        words = f"{words}: {percent(share['value'])} at {_short(row[cost])} {title}"
        parts.append(_dot(at, y(share["value"]), color, 6, words, hollow=hollow))
    return (
        f'<svg class="chart broad" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Accuracy over {escape(title, quote=True)}">{"".join(parts)}</svg>'
    )


def _dot(x: float, y: float, color: str, radius: float, title: str, *, hollow: bool = False) -> str:
    words = f"<title>{escape(title)}</title>" if title else ""
    kind = "dot hollow" if hollow else "dot"
    return f'<circle class="{kind} {color}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}">{words}</circle>'


def _front(rows: Sequence[Row], cost: str, x: Any, y: Any) -> str:
    """Steps along the rows that no other one beats in both."""
    best = 0.0
    points: list[str] = []
    for row in sorted(rows, key=lambda row: (row[cost], -row["accuracy"]["value"])):
        value = row["accuracy"]["value"]
        if value > best:
            points += [f"{x(row[cost]):.1f},{y(best if points else value):.1f}", f"{x(row[cost]):.1f},{y(value):.1f}"]
            best = value
    return f'<polyline class="guide" fill="none" points="{" ".join(points)} {_WIDTH - _RIGHT},{y(best):.1f}"/>'


def _square(x: float, y: float, title: str) -> str:
    return (
        f'<rect class="dot hollow c-baseline" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8">'
        f"<title>{escape(title)}</title></rect>"
    )


def _axes(powers: Sequence[float], x: Any, y: Any, title: str, top: float) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for share in (0.0, top / 4, top / 2, 3 * top / 4, top):
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
    place = f'x="{middle:.0f}" y="{_HEIGHT - 8}" text-anchor="middle"'
    parts.append(f'<text class="tick" {place}>{escape(title)}</text>')
    return "".join(parts)
