"""`tafkir solve PUZZLE`: puzzles in text, solved by a recursive model and checked by their rules; `--arc`: ARC."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from tafkir.models.search import Search

__all__ = ["read_puzzles", "solve"]


_Puzzle = Annotated[
    str | None, typer.Argument(metavar="PUZZLE", help="A text file of grids, `-` for stdin, or one grid.")
]
_Model = Annotated[
    str | None, typer.Option("--model", metavar="RUN|CHECKPOINT", help="Who solves it; else the bundled one.")
]
_Steps = Annotated[
    int | None, typer.Option("--steps", help="Supervision steps at most; else as in training. More are allowed.")
]
_Halt = Annotated[
    float | None,
    typer.Option(help="Take an answer at the first step with q above this; rules, where known, go first. [0]"),
]
_AllSteps = Annotated[bool, typer.Option("--all-steps", help="Take answers after all steps, whatever q is.")]
_Runs = Annotated[int, typer.Option(min=1, help="Solve each puzzle so often.")]
_Noise = Annotated[float, typer.Option(min=0, help="Noise on the latent, such as 0.3, in runs 2, 3, ...")]
_Permute = Annotated[bool, typer.Option("--permute", help="Runs 2, 3, ... see other forms of it.")]
_Pick = Annotated[
    Literal["q", "vote"],
    typer.Option(help="Without rules: the most confident run's answer, or the most frequent."),
]
_Seed = Annotated[int, typer.Option(help="Of noise and forms.")]
_Arc = Annotated[
    str | None,
    typer.Option(metavar="TASKS", help="Answer ARC tasks: of a JSON file, a folder, or a set by name."),
]
_Submission = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Of --arc: write two attempts for each test input there."),
]
_Forms = Annotated[int, typer.Option(min=0, help="Of --arc: forms of each task that vote; 0 is all.")]
_TrainSteps = Annotated[int, typer.Option(min=0, help="Of --arc: first learn unknown tasks, for so many steps.")]
_TrainWeights = Annotated[bool, typer.Option("--train-weights", help="Of --train-steps: the network learns along.")]


def solve(
    puzzle: _Puzzle = None,
    model: _Model = None,
    steps: _Steps = None,
    halt: _Halt = None,
    all_steps: _AllSteps = False,
    runs: _Runs = 1,
    noise: _Noise = 0.0,
    permute: _Permute = False,
    pick: _Pick = "q",
    seed: _Seed = 0,
    arc: _Arc = None,
    submission: _Submission = None,
    forms: _Forms = 0,
    train_steps: _TrainSteps = 0,
    train_weights: _TrainWeights = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each puzzle.")] = False,
) -> None:
    """Solve Sudoku, mazes or puzzles of one's own with a trained recursive model, or answer ARC tasks.

    A puzzle whose answer does not keep the rules is reported as unsolved; the exit code is then 1.

        tafkir solve sudoku.txt --model runs/trm-sudoku6 --runs 16 --noise 0.3
        tafkir solve --arc tasks.json --model runs/trm-arc-mini --submission out.json
        tafkir solve --arc new.json --model runs/trm-arc-mini --train-steps 200
    """
    from tafkir.errors import RequestError
    from tafkir.models.search import Search

    search = Search(runs=runs, noise=noise, permute=permute, pick=pick, seed=seed)
    if (puzzle is None) == (arc is None):
        raise RequestError("there is nothing to solve, or two things", expected="a PUZZLE, or --arc TASKS")
    if arc is not None:
        from tafkir.cli.solve_arc import Adaptation, solve_tasks

        if model is None or permute:
            raise RequestError("--arc needs --model, and its forms take the place of --permute")
        adaptation = Adaptation(train_steps, train_weights)
        threshold = halt if not all_steps else None
        solve_tasks(arc, model, steps, threshold, search, forms, adaptation, submission, as_json)
        return
    assert puzzle is not None
    threshold = None if all_steps else 0.0 if halt is None else halt
    if _solve_puzzles(puzzle, model, steps, threshold, search, as_json):
        raise typer.Exit(1)


def _solve_puzzles(
    puzzle: str, model: str | None, steps: int | None, threshold: float | None, search: Search, as_json: bool
) -> int:
    """Print answers to the puzzles of a text; returns how many are unsolved."""
    from tafkir.checkpoint.trm import load_trm
    from tafkir.engine.puzzles import find_solver, split_puzzles
    from tafkir.engine.puzzles import solve as solve_one

    text, where = read_puzzles(puzzle)
    solver = load_trm(find_solver(model, text))
    puzzles = split_puzzles(text, solver.puzzles.num_cells)
    unsolved = 0
    for number, grid in enumerate(puzzles, start=1):
        place = f"{where}: puzzle {number}" if len(puzzles) > 1 else where
        answer = solve_one(grid, solver, max_steps=steps, halt_threshold=threshold, search=search, where=place)
        unsolved += answer.verdict == "unsolved"
        if as_json:
            print(json.dumps(asdict(answer)))
        else:
            print(answer, end="\n\n" if number < len(puzzles) else "\n")
            of = f" of run {answer.run}" if answer.runs > 1 else ""
            print(f"{answer.verdict} after {answer.steps} steps{of}, q = {answer.q:.3f}", file=sys.stderr)
    return unsolved


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
