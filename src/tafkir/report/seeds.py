"""One recipe with several seeds: median and spread of every figure, and their curves over each other, as one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from tafkir.report.charts import Line, line_chart, number, percent
from tafkir.report.collect import RunRecord, collect, series
from tafkir.report.findings import STAGE_TITLES
from tafkir.report.page import frame_page, plain_table
from tafkir.runlog.rundir import RunDir

__all__ = ["render_seeds", "render_seeds_table", "summarize_seeds"]

_COLORS = ("c-rlvr", "c-sft", "c-second", "c-third", "c-pretrain")
_COSTS = {"wall_s": "wall time, s", "cpu_s": "CPU time, s", "peak_rss_bytes": "peak memory, MB"}
_SCORES = {"test.exact": "unseen puzzles solved", "test.halting.exact": "unseen puzzles solved, halting by itself"}
# Metrics whose last value counts where a stage has no scores of its own, and which are drawn.
_LAST = ("validation/exact", "validation/loss", "rollout/reward_mean", "train/loss")
_HEAD = ("Stage", "Figure", "Median", "Lowest to highest", "Mean ± spread")

Summary = Mapping[str, Any]


def summarize_seeds(runs: Mapping[int, Path]) -> dict[str, Any]:
    """Every figure that the results of all runs share, over the seeds.

    Args:
        runs: seed -> run directory; equal recipes but for the seed.

    Returns:
        `name`, `seeds`, and under `figures` a row for each: `stage`, `figure` (its place in `result.json`, or
        `last <metric>`), `kind` (score, cost, metric or other), `values` by seed, `median`, `low`, `high`, `mean` and
        `spread` (the sample's standard deviation; None for one seed).
    """
    records = {seed: collect(RunDir(path), num_chains=0) for seed, path in runs.items()}
    first = next(iter(records.values()))
    found = [dict(_figures(record)) for record in records.values()]
    shared = [key for key in found[0] if all(key in other for other in found)]
    rows = []
    for stage, figure, kind in shared:
        values = [figures[stage, figure, kind] for figures in found]
        rows.append(
            {
                "stage": stage,
                "figure": figure,
                "kind": kind,
                "values": values,
                "median": median(values),
                "low": min(values),
                "high": max(values),
                "mean": fmean(values),
                "spread": stdev(values) if len(values) > 1 else None,
            }
        )
    return {"name": first.name, "seeds": list(runs), "figures": rows}


def _figures(record: RunRecord) -> Iterator[tuple[tuple[str, str, str], float]]:
    """(stage, figure, kind) and its number."""
    for kind, stage in record.stages.items():
        for place, value in _leaves(stage.result):
            name = place.removesuffix(".value")
            sort = "score" if name != place else "cost" if place in _COSTS else "other"
            if not place.endswith((".low", ".high", ".num_problems")):
                yield (kind, name, sort), value
        for metric in _LAST:
            points = [value for _, value in series(stage.metrics, metric) if value is not None]
            if points:
                yield (kind, f"last {metric}", "metric"), points[-1]


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested tables, by its path; lists are no figures."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place, float(value)


# ---- words -------------------------------------------------------------------------------------------------------


def _shown(summary: Summary) -> list[Mapping[str, Any]]:
    """Scores, then for stages without any their last metrics, then costs."""
    figures = summary["figures"]
    scored = {row["stage"] for row in figures if row["kind"] == "score"}
    rows = [row for row in figures if row["kind"] == "score"]
    rows += [row for row in figures if row["kind"] == "metric" and row["stage"] not in scored]
    return rows + [row for row in figures if row["kind"] == "cost"]


def _word(row: Mapping[str, Any], value: float | None) -> str:
    if value is None:
        return "–"
    if row["kind"] == "score" and row["low"] >= -1 and row["high"] <= 1:
        return percent(value)
    if row["figure"] == "peak_rss_bytes":
        return f"{value / 1e6:,.0f}"
    return number(value, 4)


def _title(row: Mapping[str, Any]) -> str:
    return {**_COSTS, **_SCORES}.get(row["figure"], str(row["figure"]))


def _cells(row: Mapping[str, Any]) -> list[str]:
    title = _title(row)
    spread = "" if row["spread"] is None else f" ± {_word(row, row['spread'])}"
    return [
        STAGE_TITLES.get(row["stage"], row["stage"]),
        title,
        _word(row, row["median"]),
        f"{_word(row, row['low'])} to {_word(row, row['high'])}",
        f"{_word(row, row['mean'])}{spread}",
    ]


def render_seeds_table(summary: Summary) -> str:
    """The main figures as lines for a terminal."""
    lines = [list(_HEAD), *(_cells(row) for row in _shown(summary))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    text = ["  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in lines]
    seeds = ", ".join(map(str, summary["seeds"]))
    return "\n".join([f"{summary['name']}, seeds {seeds}", "", text[0], "-" * len(text[0]), *text[1:]])


# ---- the page ----------------------------------------------------------------------------------------------------


def render_seeds(summary: Summary, runs: Mapping[int, Path]) -> str:
    """The whole page.

    Args:
        summary: from `summarize_seeds`.
        runs: seed -> run directory.
    """
    name, seeds = str(summary["name"]), ", ".join(map(str, summary["seeds"]))
    records = {seed: collect(RunDir(path), num_chains=0) for seed, path in runs.items()}
    others = [row for row in summary["figures"] if row not in _shown(summary)]
    more = f"<details><summary>Every other figure</summary>{_table(others)}</details>" if others else ""
    charts = _charts(records)
    curves = f'<section><h2>Curves</h2><div class="cards">{charts}</div></section>' if charts else ""
    body = (
        f'<header class="hero"><p class="eyebrow">Tafkir report over seeds · <b>{escape(name)}</b></p>'
        f"<h1>{escape(_sentence(summary))}</h1>"
        f'<div class="beside"><p>Seeds {seeds}: everything random differs between them, the recipe is the same. The '
        "spread is the standard deviation over the seeds; intervals of a single run's test set stand in its own "
        f"report.</p></div></header><main><section><h2>Figures</h2>{_table(_shown(summary))}{more}</section>{curves}"
        "</main>"
    )
    return frame_page(f"{name} · Tafkir report over seeds", body)


def _sentence(summary: Summary) -> str:
    rows = _shown(summary)
    if not rows:
        return f"{len(summary['seeds'])} seeds have left no figure in common."
    row = rows[0]
    low, high = _word(row, row["low"]), _word(row, row["high"])
    title, seeds = _title(row), f"{len(summary['seeds'])} seeds"
    return f"{title[:1].upper()}{title[1:]}: {_word(row, row['median'])} in the median of {seeds}, {low} to {high}."


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    return plain_table(_HEAD, [_cells(row) for row in rows], words=2)


def _charts(records: Mapping[int, RunRecord]) -> str:
    figures = []
    first = next(iter(records.values()))
    for kind in first.stages:
        for metric in _LAST:
            lines = [
                Line(f"seed {seed}", series(record.stages[kind].metrics, metric), _COLORS[place % len(_COLORS)])
                for place, (seed, record) in enumerate(records.items())
                if kind in record.stages
            ]
            chart = line_chart(lines, title=f"{metric} of {kind} by seed")
            if not chart:
                continue
            keys = "".join(
                f'<span class="{line.color}"><i style="color:var(--c)"></i>{escape(line.name)}</span>' for line in lines
            )
            figures.append(
                f'<figure class="card"><h3>{escape(STAGE_TITLES.get(kind, kind))}: {escape(metric)}</h3>{chart}'
                f'<div class="legend">{keys}</div></figure>'
            )
    return "".join(figures)
