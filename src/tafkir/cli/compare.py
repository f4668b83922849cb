"""`tafkir compare A B`: what a change does to the scores, question by question."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tafkir.eval.sides import Side

__all__ = ["compare"]


def compare(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B...",
            help="Results of `tafkir eval --tasks` (a file may hold several models), run directories with an "
            "evaluation, or folders of lm-evaluation-harness or Every Eval Ever. All are set against the first.",
        ),
    ],
    task: Annotated[
        list[str] | None, typer.Option("--task", "--stage", help="Only this task, or stage of runs; repeatable.")
    ] = None,
    margin: Annotated[
        float, typer.Option(min=0.01, max=50, metavar="POINTS", help="Differences within it count as none.")
    ] = 1.0,
    trained_on: Annotated[
        list[Path] | None,
        typer.Option(help="Training text (.jsonl or .txt): questions that share 13 words in a row are set apart."),
    ] = None,
    common: Annotated[bool, typer.Option("--common", help="Leave out items that one side lacks.")] = False,
    flips: Annotated[int, typer.Option(min=0, help="Changed answers to show, for each task (--json, --html).")] = 12,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say how many samples an item the margin takes; one place is enough.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page to look at.")] = None,
    pool: Annotated[
        bool, typer.Option("--pool", help="Pool the change from sft to rlvr over runs, such as several seeds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare models on the same questions: better, worse, equivalent, or undecided.

    \b
    tafkir compare results/ --html compare.html           the models of one results file
    tafkir compare runs/base runs/quantized --margin 2    two runs
    tafkir compare results/ --plan --margin 0.5           what half a point would take

    Equivalent means that two one-sided tests put the difference within the margin (TOST at 5 %); only that, and never
    "no significant difference", supports the word lossless. Beside each difference stands the one that could have been
    seen with 80 % power; p-values are corrected for being several (Holm).
    """
    from tafkir.errors import RecipeError
    from tafkir.eval.compare import compare_sides, plan_lines
    from tafkir.eval.sides import load_sides
    from tafkir.tasks.catalog import list_tasks

    if pool:
        from tafkir.eval.pooling import pool_runs

        pooled = pool_runs(places)
        print(json.dumps(pooled.to_dict(), indent=2) if as_json else "\n".join(pooled.lines()))
        return
    sides = load_sides(places)
    if plan:
        print("\n".join(plan_lines(sides, margin=margin / 100)))
        return
    if html and html.suffix != ".html":
        raise RecipeError(f"{html.name} is no page", where="--html", expected="a name that ends in .html")
    seen = _seen(sides, trained_on) if trained_on else None
    metrics = {card.name: card.metric for card in list_tasks()}
    compared = compare_sides(
        sides, margin=margin / 100, tasks=task, common=common, seen=seen, num_flips=flips, metrics=metrics
    )
    if html:
        from tafkir.report.comparison import render_comparison
        from tafkir.runlog.atomic import write_text

        write_text(html, render_comparison(compared.to_dict()))
    print(json.dumps(compared.to_dict(), indent=2) if as_json else "\n".join(compared.lines()))
    if html and not as_json:
        print(f"Page: {html}")


def _seen(sides: Sequence[Side], files: Sequence[Path]) -> dict[str, Mapping[str, str]]:
    """Task -> items whose question stands in the training text, with the words that they share."""
    from tafkir.data.contamination import seen_in

    return {
        task: seen_in({sample.item: sample.question for sample in samples}, _texts(files))
        for task, samples in sides[0].answers.items()
    }


def _texts(files: Sequence[Path]) -> Iterator[str]:
    """Every string in the rows of .jsonl files, and every line of others."""
    from tafkir.errors import DataError
    from tafkir.runlog.metrics import read_jsonl

    for file in files:
        if not file.is_file():
            raise DataError("there is no such file", where=str(file), expected="training text: .jsonl or .txt")
        if file.suffix == ".jsonl":
            for row in read_jsonl(file):
                yield from _strings(row)
        else:
            with file.open(encoding="utf-8") as lines:
                yield from lines


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
