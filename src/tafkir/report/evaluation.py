"""The report of an evaluation: scores, what a changed model keeps, and what answers cost; in English or Arabic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tafkir.report.card import row_colors, scatter
from tafkir.report.charts import Bar, interval_plot, number, percent, signed_points
from tafkir.report.page import frame_page, plain_table
from tafkir.report.words import EVALUATION_WORDS

__all__ = ["card_body", "render_evaluation"]

_TONES = {"better": "c-good", "worse": "c-bad", "equivalent": "c-sft", "undecided": "c-baseline"}

Row = Mapping[str, Any]
Words = Mapping[str, str]


def render_evaluation(data: Row, language: str = "en") -> str:
    """The whole page; it runs no script.

    Args:
        data: `name`; `scores` (a row a model and task, as `tafkir eval --json` prints them), `comparison` (as
            `tafkir compare --json` prints it; None for a single model) and `card` (as `tafkir card --json` does).
        language: "en" or "ar", which is written from right to left.
    """
    words = EVALUATION_WORDS[language]
    parts = [("evaluation", _scores(data["scores"], words))]
    if data["comparison"]:
        parts.append(("retention", _kept(data["comparison"], words)))
    parts.append(("card", card_body(data["card"], language)))
    links = "".join(f'<a href="#{anchor}">{escape(words[anchor])}</a>' for anchor, _ in parts)
    sections = "".join(f'<section id="{a}"><h2>{escape(words[a])}</h2>{body}</section>' for a, body in parts)
    name, models = str(data["name"]), list(dict.fromkeys(row["model"] for row in data["scores"]))
    tasks = list(dict.fromkeys(row["task"] for row in data["scores"]))
    body = (
        f'<header class="hero"><p class="eyebrow">{escape(words["title"])} · <b><bdi>{escape(name)}</bdi></b></p>'
        f"<h1>{_list(models)}</h1>"
        f'<div class="beside"><p>{escape(words["tasks"])}: {_list(tasks)}</p></div>'
        f'<nav aria-label="{escape(words["sections"], quote=True)}">{links}</nav></header><main>{sections}</main>'
        f"<footer>{escape(words['footer'])}</footer>"
    )
    return frame_page(f"{name} · {words['title']}", body, language=language)


def _list(names: Sequence[str]) -> str:
    return " · ".join(f"<bdi>{escape(name)}</bdi>" for name in names)


def _heads(words: Words, *keys: str) -> list[str]:
    return [words[key] for key in keys]


def _left_to_right(text: str) -> str:
    """Held together against the direction around it, so that a sign stays before its number."""
    return f"\u2066{text}\u2069"


def _percent(value: float) -> str:
    return _left_to_right(percent(value))


def _signed(value: float) -> str:
    return _left_to_right(signed_points(value))


def _interval(estimate: Row, words: Words) -> str:
    return f"{_percent(estimate['value'])}\n{_percent(estimate['low'])} {words['to']} {_percent(estimate['high'])}"


def _scores(rows: Sequence[Row], words: Words) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    colors = row_colors([{"name": row["model"]} for row in rows])
    plots = ""
    for task in tasks:
        bars = [_score_bar(row, colors) for row in rows if row["task"] == task and row["accuracy"]]
        plot = interval_plot(bars, title=task, reach=max((bar.high or 0.0 for bar in bars), default=0.01))
        plots += f"<h3><bdi>{escape(task)}</bdi></h3>{plot}"
    table = plain_table(
        _heads(words, "model", "task", "right", "items", "cut", "none", "failed", "tokens"),
        [_score_cells(row, words) for row in rows],
        words=2,
    )
    look = f"<figcaption>{escape(words['look_scores'])}</figcaption>"
    return f'<figure class="card split">{plots}{look}</figure>{table}'


def _score_bar(row: Row, colors: Mapping[str, str]) -> Bar:
    found = row["accuracy"]
    return Bar(row["model"], found["value"], found["low"], found["high"], colors[row["model"]])


def _score_cells(row: Row, words: Words) -> list[str]:
    return [
        row["model"],
        row["task"],
        _interval(row["accuracy"], words) + _beside(row, words) if row["accuracy"] else "–",
        _left_to_right(f"{row['items']:,} × {row['repeats']}"),
        _percent(row["length"]),
        _percent(row["no_answer"]),
        _percent(row["failed"]),
        f"{row['mean_tokens']:,.0f}",
    ]


def _beside(row: Row, words: Words) -> str:
    """What else is quoted of a task: its steps, its rating."""
    parts = []
    if steps := row.get("steps"):
        parts.append(f" · {words['steps']} {_percent(steps['value'])}")
    if rating := row.get("rating"):
        ends = _left_to_right(f"{rating['value']:,.0f} [{rating['low']:,.0f}, {rating['high']:,.0f}]")
        parts.append(f" · {words['rating']} {ends}")
    return "".join(parts)


def _kept(comparison: Row, words: Words) -> str:
    margin = f"{100 * comparison['margin']:g}"
    parts = [f'<p class="lead">{escape(words["lead_kept"].format(margin=margin))}</p>']
    for pair in comparison["pairs"]:
        bars = [
            Bar(row["task"], d["value"], d["low"], d["high"], _TONES[verdict], words[verdict])
            for row in pair["tasks"]
            for d, verdict in [(row["judgement"]["difference"], row["judgement"]["verdict"])]
        ]
        title = words["beside"].format(second=f"\u2068{pair['second']}\u2069", first=f"\u2068{pair['first']}\u2069")
        plot = interval_plot(bars, title=title, signed=True, unit=words["points"])
        head = _heads(words, "task", "verdict", "kept", "difference", "flips", "seen")
        table = plain_table(head, [_kept_cells(row, words) for row in pair["tasks"]], words=2)
        parts.append(f'<h3 class="group">{escape(title)}</h3><figure class="card">{plot}</figure>{table}')
    return "".join(parts)


def _kept_cells(row: Row, words: Words) -> list[str]:
    judged, share = row["judgement"], row["judgement"]["retention"]
    kept = "–"
    if share:
        high = words["no_end"] if share["high"] is None else _percent(share["high"])
        kept = f"{_percent(share['value'])}\n{_percent(share['low'])} {words['to']} {high}"
    difference = judged["difference"]
    ends = f"{_signed(difference['low'])} {words['to']} {_signed(difference['high'])}"
    return [
        row["task"],
        words[judged["verdict"]],
        kept,
        f"{_signed(difference['value'])}\n{ends}",
        _left_to_right(f"{row['lost']:,} / {row['gained']:,}"),
        f"{100 * difference['min_detectable']:.1f}",
    ]


def card_body(card: Row, language: str = "en") -> str:
    """The card's plots and tables, task by task, without a heading of their own."""
    words, parts = EVALUATION_WORDS[language], []
    for each in card["cards"]:
        rows = each["rows"]
        cost = "flops" if any(row["flops"] for row in rows) else "tokens"
        plot = scatter(rows, cost=cost, title=words[f"axis_{cost}"])
        keys = "".join(
            f'<span class="{color} key-dot"><i style="color:var(--c)"></i><bdi>{escape(name)}</bdi></span>'
            for name, color in row_colors(rows).items()
        )
        head = _heads(words, "model", "right", "parameters", "bytes", "tokens", "axis_flops", "speed", "dollars")
        table = plain_table(head, [_card_cells(row, words) for row in rows])
        parts.append(
            f'<h3 class="group"><bdi>{escape(each["task"])}</bdi></h3><figure class="card">{plot}'
            f'<div class="legend">{keys}</div><figcaption>{escape(words["look_card"])}</figcaption></figure>{table}'
        )
    return f'<p class="lead">{escape(words["lead_card"])}</p>{"".join(parts)}'


def _card_cells(row: Row, words: Words) -> list[str]:
    active = "" if row["active_parameters"] is None else f"{number(row['active_parameters'])} {words['active']}"
    keys = ("bytes", "tokens", "flops", "tokens_per_s", "dollars")
    return [
        row["name"] + (" ★" if row["best"] else ""),
        _interval(row["accuracy"], words),
        f"{_known(row['parameters'])}\n{active}",
        *(_known(row[key]) for key in keys),
    ]


def _known(value: float | None) -> str:
    return "–" if value is None else number(value)
