"""`tafkir compare A B`: what a change does to the scores, question by question."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tafkir.eval.sides import Side

__all__ = ["compare"]


_Places = Annotated[
    list[Path],
    typer.Argument(
        metavar="A B...",
        help="Results of `tafkir eval --tasks` (a file may hold several models), run directories with an "
        "evaluation, or folders of lm-evaluation-harness or Every Eval Ever. All are set against the first.",
    ),
]
_Tasks = Annotated[
    list[str] | None, typer.Option("--task", "--stage", help="Only this task, or stage of runs; repeatable.")
]
_Margin = Annotated[
    float, typer.Option(min=0.01, max=50, metavar="POINTS", help="Differences within it count as none.")
]
_TrainedOn = Annotated[
    list[Path] | None,
    typer.Option(help="Training text (.jsonl or .txt): questions that share 13 words in a row are set apart."),
]
_Common = Annotated[bool, typer.Option("--common", help="Leave out items that one side lacks.")]
_Flips = Annotated[int, typer.Option(min=0, help="Changed answers to show, for each task (--json, --html).")]
_Plan = Annotated[
    bool, typer.Option("--plan", help="Say how many samples an item the margin takes; one place is enough.")
]
_Html = Annotated[Path | None, typer.Option(help="Also write a page to look at.")]
_Pooled = Annotated[
    bool, typer.Option("--pool", help="Pool the change from sft to rlvr over runs, such as several seeds.")
]
_Pairs = Annotated[
    bool, typer.Option("--pairs", help="Let --judge rate the models by pairs of texts (creative-writing-v3).")
]
_PairsData = Annotated[Path | None, typer.Option(help="With --pairs: the benchmark's checkout.")]
_Anchor = Annotated[str | None, typer.Option(help="With --pairs: the model whose rating is 1500.")]
_Labels = Annotated[
    bool,
    typer.Option("--labels", help="A is MT-Bench's file of human votes: how often --judge agrees with people."),
]
_Limit = Annotated[int, typer.Option(min=0, help="With --labels: only the first so many pairs.")]
_JudgeName = Annotated[
    str, typer.Option(metavar="URL#MODEL", help="The judge of --pairs and --labels; its key: TAFKIR_JUDGE_KEY.")
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def compare(
    places: _Places,
    task: _Tasks = None,
    margin: _Margin = 1.0,
    trained_on: _TrainedOn = None,
    common: _Common = False,
    flips: _Flips = 12,
    plan: _Plan = False,
    html: _Html = None,
    pool: _Pooled = False,
    pairs: _Pairs = False,
    data: _PairsData = None,
    anchor: _Anchor = None,
    labels: _Labels = False,
    limit: _Limit = 0,
    judge: _JudgeName = "",
    as_json: _AsJson = False,
) -> None:
    """Compare models on the same questions: better, worse, equivalent, or undecided.

    \b
    tafkir compare results/ --html compare.html           the models of one results file
    tafkir compare runs/base runs/quantized --margin 2    two runs
    tafkir compare results/ --plan --margin 0.5           what half a point would take
    tafkir compare results/ --pairs --data creative-writing-bench --judge URL#MODEL      Elo and Glicko
    tafkir compare human.parquet --labels --judge URL#MODEL                              a judge beside people

    Equivalent means that two one-sided tests put the difference within the margin (TOST at 5 %); only that, and never
    "no significant difference", supports the word lossless. Beside each difference stands the one that could have been
    seen with 80 % power; p-values are corrected for being several (Holm).
    """
    from tafkir.errors import RecipeError
    from tafkir.eval.compare import compare_sides, plan_lines
    from tafkir.eval.sides import load_sides
    from tafkir.tasks.catalog import list_tasks

    if pool:
        _pool(places, as_json)
        return
    if pairs or labels:
        _judge(places, judge, data, anchor, limit, labels=labels, as_json=as_json)
        return
    sides = load_sides(places)
    if plan:
        print("\n".join(plan_lines(sides, margin=margin / 100)))
        return
    if html and html.suffix != ".html":
        raise RecipeError(f"{html.name} is no page", where="--html", expected="a name that ends in .html")
    seen = _seen(sides, trained_on) if trained_on else None
    given: dict[str, Any] = {"margin": margin / 100, "tasks": task, "common": common, "num_flips": flips}
    compared = compare_sides(sides, seen=seen, metrics={card.name: card.metric for card in list_tasks()}, **given)
    if html:
        from tafkir.report.comparison import render_comparison
        from tafkir.runlog.atomic import write_text

        write_text(html, render_comparison(compared.to_dict()))
    print(json.dumps(compared.to_dict(), indent=2) if as_json else "\n".join(compared.lines()))
    if html and not as_json:
        print(f"Page: {html}")


def _pool(places: Sequence[Path], as_json: bool) -> None:
    from tafkir.eval.pooling import pool_runs

    pooled = pool_runs(places)
    print(json.dumps(pooled.to_dict(), indent=2) if as_json else "\n".join(pooled.lines()))


def _judge(
    places: Sequence[Path],
    judge: str,
    data: Path | None,
    anchor: str | None,
    limit: int,
    *,
    labels: bool,
    as_json: bool,
) -> None:
    """Ratings by pairs, or a judge beside people; judgements lie beside the first place, and are asked for once."""
    from tafkir.errors import DataError
    from tafkir.eval.pairs import CREATIVE, LABELS_HOW, judge_labels, judge_pairs
    from tafkir.eval.sides import load_sides
    from tafkir.tasks.backends import Backends, choose_backends, default_judge

    if labels and not places[0].is_file():
        raise DataError("there is no such file", where=str(places[0]), expected="human votes", fix=LABELS_HOW)
    if not labels and data is None:
        raise DataError(
            "the judge's prompt for pairs is not in the package",
            where=CREATIVE,
            fix="git clone https://github.com/EQ-bench/creative-writing-bench, then --data creative-writing-bench",
        )
    folder = places[0] if places[0].is_dir() else places[0].parent
    with choose_backends(Backends(judge=judge, judge_cache=folder / "judged.jsonl")):
        opened = default_judge()
        if labels:
            found = judge_labels(places[0], opened, limit=limit)
        else:
            assert data is not None
            found = judge_pairs(load_sides(places), data, opened, anchor=anchor)
    print(json.dumps(found, indent=2) if as_json else "\n".join(_judged_lines(found)))


def _judged_lines(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for row in found.get("models", ()):
        lines.append(
            f"{row['name']:<24} Elo {row['elo']:7,.0f}   Glicko {row['glicko']:7,.0f} ± {1.96 * row['deviation']:,.0f}"
            f"   {100 * row['won']:.1f} % of the points"
        )
    for name, words in (("all", "all votes"), ("without_ties", "without ties")):
        if own := found.get(name):
            people = "" if own["people"] is None else f", people with each other {100 * own['people']:.1f} %"
            lines.append(f"{words}: judge with people {100 * own['judge']:.1f} %{people}; {own['pairs']:,} pairs")
    games = f"{found['games']:,} games in both orders; " if "games" in found else ""
    return [*lines, f"{games}{found['unjudged']:,} judgements were of no use; run again to ask for them"]


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
