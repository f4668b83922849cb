"""`tafkir solve PUZZLE`: puzzles in text, solved by a recursive model and checked by their rules."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["read_puzzles", "solve"]


def solve(
    puzzle: Annotated[str, typer.Argument(metavar="PUZZLE", help="A text file of grids, `-` for stdin, or one grid.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="RUN|CHECKPOINT", help="Who solves it; else the bundled one.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Supervision steps at most; else as in training.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each puzzle.")] = False,
) -> None:
    """Solve Sudoku, mazes or puzzles of one's own with a trained recursive model.

    A puzzle whose answer does not keep the rules is reported as unsolved; the exit code is then 1.
    """
    from tafkir.checkpoint.trm import load_trm
    from tafkir.engine.puzzles import find_solver, split_puzzles
    from tafkir.engine.puzzles import solve as solve_one

    text, where = read_puzzles(puzzle)
    solver = load_trm(find_solver(model, text))
    puzzles = split_puzzles(text, solver.puzzles.num_cells)
    unsolved = 0
    for number, grid in enumerate(puzzles, start=1):
        place = f"{where}: puzzle {number}" if len(puzzles) > 1 else where
        answer = solve_one(grid, solver, max_steps=steps, where=place)
        unsolved += answer.verdict == "unsolved"
        if as_json:
            print(json.dumps(asdict(answer)))
        else:
            print(answer, end="\n\n" if number < len(puzzles) else "\n")
            print(f"{answer.verdict} after {answer.steps} steps, q = {answer.q:.3f}", file=sys.stderr)
    if unsolved:
        raise typer.Exit(1)


def read_puzzles(puzzle: str) -> tuple[str, str]:
    """The text of puzzles, and how to call it in errors."""
    from tafkir.errors import DataError

    if puzzle == "-":
        return sys.stdin.read(), "stdin"
    path = Path(puzzle)
    try:
        # A grid may be longer than a file's name can be.
        if len(puzzle) < 250 and path.is_file():
            return path.read_text(encoding="utf-8"), puzzle
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as UTF-8 text ({error})", where=puzzle) from error
    if path.suffix:
        raise DataError("no such file", where=puzzle)
    return puzzle, "the grid"
