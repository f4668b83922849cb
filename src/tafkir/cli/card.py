"""`tafkir card CHECKPOINT... --task sudoku4`: recursive and language models in one table, with what answers cost."""

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
            metavar="[NAME=]CHECKPOINT...", help="Run directories, checkpoint folders or bundled names, of either kind."
        ),
    ],
    task: Annotated[
        str, typer.Option(help="Puzzles: sudoku4, sudoku6, maze-small, ..., or a recipe file with [trm.puzzles].")
    ],
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON on stdout.")] = False,
) -> None:
    """Set recursive and language models side by side on the same puzzles: the efficiency card.

    Accuracy with its 95 % interval, weights, FLOPs and seconds of one puzzle, bytes on disk; as a table, as card.json
    and as card.html with accuracy against FLOPs. A language model is asked in text, once and greedily, and graded by
    the same rules. Answers stay in the run directory: the same command goes on where it was stopped.

        tafkir card runs/trm-sudoku4 base-tiny mine=runs/my-sft --task sudoku4
    """
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
