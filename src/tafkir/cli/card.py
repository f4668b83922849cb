"""`tafkir card`: models in one table with what answers cost, from results files, or measured on puzzles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from tafkir.eval.efficiency import Contestant

__all__ = ["card", "show_card"]

_BATCH = 64


def card(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="RESULTS | [NAME=]CHECKPOINT...",
            help="Results of `tafkir eval --tasks`; or, with --task, run directories, checkpoint folders or bundled "
            "names, of either kind.",
        ),
    ],
    task: Annotated[
        str, typer.Option(help="Puzzles: sudoku4, sudoku6, maze-small, ..., or a recipe file with [trm.puzzles].")
    ] = "",
    split: Annotated[
        Literal["test", "validation", "train"], typer.Option(help="Part of the puzzles; answers to train can teach.")
    ] = "test",
    limit: Annotated[int, typer.Option(min=0, help="At most so many puzzles; 0 is all of the part.")] = 0,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Most tokens of a language model's answer; 0 is two a cell and 32.")
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the arithmetic, for all alike.")] = 1,
    name: Annotated[str | None, typer.Option(help="Name of the run directory instead of card-<task>.")] = None,
    runs_dir: Annotated[Path, typer.Option(envvar="TAFKIR_RUNS_DIR", help="Where run directories are made.")] = Path(
        "runs"
    ),
    shapes: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NAME=CHECKPOINT", help="Results: weights of a model, or qwen3-32b, ..."),
    ] = None,
    prices: Annotated[
        list[str] | None,
        typer.Option("--price", metavar="NAME=[IN,]OUT", help="Results: dollars for a million prompt and new tokens."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Results: beside what others have published on the same task.")
    ] = False,
    html: Annotated[Path, typer.Option(help="Results: where the page goes.")] = Path("card.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON on stdout.")] = False,
) -> None:
    """Set models side by side with what their answers cost: the efficiency card.

    \b
    tafkir card results/ --shape small=base-tiny --published         of answers that are there
    tafkir card runs/trm-sudoku4 base-tiny mine=runs/my-sft --task sudoku4

    Of results: accuracy with its 95 % interval against parameters, bytes, and FLOPs, tokens, seconds and dollars of an
    answer, with Pareto's front; figures that others published are marked as theirs, with date and source.

    On puzzles: accuracy with its 95 % interval, weights, FLOPs, seconds and joules of one puzzle, bytes on disk, as a
    table, as card.json and as card.html with accuracy against FLOPs. A language model is asked in text, once and
    greedily, and graded by the same rules. Answers stay in the run directory: the same command goes on where it was
    stopped.
    """
    if not task:
        _show_results(checkpoints, shapes or [], prices or [], published, html, as_json)
        return
    show_card(
        checkpoints,
        task,
        name=name,
        runs_dir=runs_dir,
        as_json=as_json,
        threads=threads,
        split=split,
        limit=limit,
        max_tokens=max_tokens,
    )


def show_card(
    checkpoints: Sequence[str],
    task: str,
    *,
    name: str | None,
    runs_dir: Path,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure, write `card.json` and `card.html`, and print.

    Args:
        settings: of `CardSettings`.
    """
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.eval.efficiency import CardSettings, measure_card, render_card_table
    from tafkir.report.card import render_card
    from tafkir.runlog.atomic import write_json, write_text
    from tafkir.runlog.rundir import RunDir
    from tafkir.serve.loading import build_engine
    from tafkir.tasks.puzzle_sets import load_puzzle_task

    puzzles = load_puzzle_task(task)
    contestants = [_contestant(checkpoint) for checkpoint in checkpoints]
    run = RunDir.create(runs_dir / (name or _run_name(puzzles.name, contestants)))
    with run.lock():
        result = measure_card(
            puzzles,
            contestants,
            CardSettings(**settings),
            build_completer=lambda path: build_engine(path, Tokenizer.load(path), None, max_batch=_BATCH),
            folder=run.path,
        )
        write_json(run.path / "card.json", result)
        write_text(run.path / "card.html", render_card(result))
    if as_json:
        print(json.dumps({"run": str(run.path), **result}, indent=2))
        return
    print(render_card_table(result))
    print(f"\nCard: {run.path / 'card.html'}")


def _show_results(
    places: Sequence[str], shapes: Sequence[str], prices: Sequence[str], published: bool, html: Path, as_json: bool
) -> None:
    """The card of results files."""
    from tafkir.cli.completer import checkpoint_of
    from tafkir.errors import RecipeError, TafkirError
    from tafkir.eval.results_card import render_results_table, results_card, shape_of_model
    from tafkir.eval.samples import load_samples, samples_file
    from tafkir.report.card import render_results_card
    from tafkir.runlog.atomic import write_text

    for place in places:
        if not samples_file(Path(place)).is_file():
            raise RecipeError(
                "there are no results",
                where=place,
                expected="a folder of `tafkir eval --tasks`, or checkpoints with --task",
                fix=f"tafkir card {place} --task sudoku4",
            )

    def shape(given: str) -> Any:
        try:
            return shape_of_model(str(checkpoint_of(given)))
        except TafkirError:
            return shape_of_model(given)

    try:
        costs = {name: _price(price) for name, price in (_named(given, "--price") for given in prices)}
    except ValueError as error:
        raise RecipeError("a price is no number", where="--price", expected="NAME=DOLLARS or NAME=IN,OUT") from error
    found = results_card(
        [sample for place in places for sample in load_samples(Path(place))],
        shapes={name: shape(place) for name, place in (_named(given, "--shape") for given in shapes)},
        prices=costs,
        published=published,
    )
    write_text(html, render_results_card(found))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(render_results_table(found))
    print(f"\nCard: {html}")


def _price(given: str) -> tuple[float, float]:
    """Of prompt tokens and of new ones, from `OUT` or `IN,OUT`."""
    first, comma, second = given.partition(",")
    return (float(first), float(second)) if comma else (0.0, float(first))


def _named(given: str, option: str) -> tuple[str, str]:
    """From `NAME=VALUE`."""
    from tafkir.errors import RecipeError

    name, equals, value = given.partition("=")
    if not equals or not value:
        raise RecipeError(f"{given!r} names no model", where=option, expected="NAME=VALUE")
    return name, value


def _contestant(given: str) -> Contestant:
    """From `[NAME=]CHECKPOINT`; a run directory stands for the checkpoint of its stage `trm`, or of its last policy."""
    from tafkir.cli.completer import checkpoint_of
    from tafkir.eval.efficiency import Contestant
    from tafkir.runlog.rundir import RunDir
    from tafkir.serve.loading import name_of

    label, equals, place = given.partition("=")
    if not equals or Path(given).exists():
        label, place = "", given
    of_trm = RunDir(Path(place)).stage("trm").checkpoint_dir
    folder = of_trm if of_trm.is_dir() else checkpoint_of(place)
    return Contestant(label or name_of(folder), folder)


def _run_name(task: str, contestants: Sequence[Contestant]) -> str:
    """Of one contestant's own, or of all of them together."""
    return f"{task}-{contestants[0].name}" if len(contestants) == 1 else f"card-{task}"
