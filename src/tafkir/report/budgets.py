"""Accuracy by token budget as a page: what each model would score with fewer tokens an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tafkir.report.charts import Line, line_chart, percent
from tafkir.report.page import frame_page, plain_table

__all__ = ["render_budget_curve"]

_COLORS = ("c-rlvr", "c-sft", "c-second", "c-third", "c-pretrain")
_LOOK = (
    "<b>Look for</b> where a curve levels off: tokens beyond that buy nothing. An answer that is longer than a budget "
    "is cut there, and what it has boxed by then counts."
)

Row = Mapping[str, Any]


def render_budget_curve(rows: Sequence[Row]) -> str:
    """The whole page.

    Args:
        rows: what `budget_curve` returns.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    sections = "".join(_section(task, [row for row in rows if row["task"] == task], models) for task in tasks)
    body = (
        '<header class="hero"><p class="eyebrow">Tafkir evaluation</p>'
        f"<h1>Accuracy by tokens an answer</h1></header><main>{sections}</main>"
    )
    return frame_page("Accuracy by tokens · Tafkir", body)


def _section(task: str, rows: Sequence[Row], models: Sequence[str]) -> str:
    scored = [row for row in rows if row["accuracy"]]
    lines = [
        Line(
            model,
            [(row["budget"], row["accuracy"]["value"]) for row in scored if row["model"] == model],
            _COLORS[place % len(_COLORS)],
        )
        for place, model in enumerate(models)
    ]
    chart = line_chart(
        lines,
        title=f"Accuracy on {task} by tokens an answer",
        x_label="tok.",
        y_format=lambda value: percent(value, 0),
        value_format=percent,
        y_min=0.0,
    )
    keys = "".join(
        f'<span class="{line.color}"><i style="color:var(--c)"></i><bdi>{escape(line.name)}</bdi></span>'
        for line in lines
    )
    table = plain_table(
        ("Model", "Tokens", "Accuracy", "95 % interval", "Cut"),
        [
            [
                row["model"],
                f"{row['budget']:,}",
                percent(row["accuracy"]["value"]),
                f"{percent(row['accuracy']['low'])} to {percent(row['accuracy']['high'])}",
                percent(row["cut"]),
            ]
            for row in scored
        ],
    )
    return (
        f'<section><h2><bdi>{escape(task)}</bdi></h2><div class="cards"><figure class="card">{chart}'
        f'<div class="legend">{keys}</div><figcaption>{_LOOK}</figcaption></figure></div>{table}</section>'
    )
