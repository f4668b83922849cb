"""Answers to puzzles in text: a recursive model thinks, and the rules, where known, say whether it is right."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from tafkir.checkpoint.trm import TrmCheckpoint, load_trm
from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.maze import maze_format
from tafkir.data.puzzles.rules import has_rules, is_right, solve_by_rules
from tafkir.errors import CheckpointError, RequestError
from tafkir.models.search import Accept, Runs, Search, search_puzzles
from tafkir.recipe.bundled import bundled_solvers
from tafkir.runlog.atomic import read_json
from tafkir.runlog.rundir import RunDir

__all__ = ["PuzzleAnswer", "find_solver", "fit_to_grid", "solve", "split_puzzles"]

Verdict = Literal["solved", "unsolved", "unchecked"]

_ONE_RUN = Search()


@dataclass(frozen=True, slots=True)
class PuzzleAnswer:
    """What a model made of a puzzle.

    Attributes:
        verdict: "solved" by the rules; "unsolved" where no step's answer keeps them; "unchecked" where none are known.
        grid: rows of signs; None where the puzzle is unsolved, so that no wrong answer is ever shown.
        steps: supervision steps up to the answer, or all that were taken.
        q: the model's own probability that its answer is right.
        seconds: wall time of the thinking.
        run: which of the runs the answer is from, counted from 1.
        runs: how many runs there were.
    """

    verdict: Verdict
    grid: tuple[str, ...] | None
    steps: int
    q: float
    seconds: float
    run: int = 1
    runs: int = 1

    def __str__(self) -> str:
        """The grid on lines, or the word "unsolved"."""
        return self.verdict if self.grid is None else "\n".join(self.grid)


def solve(
    puzzle: str,
    model: str | Path | TrmCheckpoint | None = None,
    *,
    max_steps: int | None = None,
    halt_threshold: float | None = 0.0,
    search: Search = _ONE_RUN,
    where: str | None = None,
) -> PuzzleAnswer:
    """Solve one puzzle in text, such as `solve("1..4.2.....3....", "runs/trm-sudoku4")`.

    Where rules are known, the first supervision step counts whose answer keeps them, in whatever run; else the answers
    at the first step with q above the threshold, of which `search.pick` takes one.

    Args:
        puzzle: rows on lines or all cells on one; a Sudoku's blanks are `.` or `0`.
        model: a checkpoint folder, a run directory with a stage `trm`, a name, or a loaded one; None takes the bundled
            model for grids of this size.
        max_steps: supervision steps at most; more than N_sup are allowed. None takes N_sup, and so many times that on
            a larger grid than the model's as it has more cells.
        halt_threshold: on the halting head's logit, for puzzles without known rules; None takes all steps.
        search: how many runs, and how they differ.
        where: named in errors.

    Raises:
        DataError: not a grid of the model's symbols and of a size that it takes, or not exactly one answer.
        CheckpointError: the model is missing or damaged, or none is bundled for this size.
        RequestError: `max_steps` is below one, or no other form of such a puzzle is known for the runs.
    """
    if max_steps is not None and max_steps < 1:
        raise RequestError(f"max_steps is {max_steps}", expected="at least 1")
    trained = model if isinstance(model, TrmCheckpoint) else load_trm(find_solver(model, puzzle))
    solver = fit_to_grid(trained, puzzle)
    format = solver.puzzles
    if max_steps is None and format.num_cells > trained.puzzles.num_cells:
        max_steps = solver.model.shape.max_supervision_steps * math.ceil(format.num_cells / trained.puzzles.num_cells)
    question = format.read(puzzle, where)
    if has_rules(format):
        solve_by_rules(format, question, where)
    accept = _check(format, question) if has_rules(format) else None
    threshold = None if accept else halt_threshold
    began = time.perf_counter()
    found = search_puzzles(
        solver.model, format, question[None], search, steps=max_steps, halt_threshold=threshold, accept=accept
    )
    seconds = time.perf_counter() - began
    verdict, step, run = _choose(found, search, threshold, accept)
    grid = None if verdict == "unsolved" else tuple(format.show(found.answers[step, run, 0]).split("\n"))
    q = float(1 / (1 + np.exp(-found.q_halt[step, run, 0])))
    return PuzzleAnswer(verdict, grid, step + 1, q, seconds, run + 1, search.runs)


def _check(format: PuzzleFormat, question: Cells) -> Accept:
    return lambda _, answer: is_right(format, question, answer)


def _choose(found: Runs, search: Search, threshold: float | None, accept: Accept | None) -> tuple[Verdict, int, int]:
    """The verdict, and the step and the run (from 0) whose answer counts."""
    if accept is not None and (first := found.first(accept)):
        return "solved", *first
    run = int(found.pick(search.pick, threshold)[0])
    return "unchecked" if accept is None else "unsolved", int(found.ends(threshold)[run, 0]), run


def fit_to_grid(solver: TrmCheckpoint, puzzle: str) -> TrmCheckpoint:
    """The solver for the size of a maze in text, where its weights are tied to none; else as it is."""
    sides = _maze_sides(puzzle)
    format = solver.puzzles
    if sides is None or format.kind != "maze" or sides == (format.rows, format.columns):
        return solver
    if not solver.model.takes_any_grid:
        return solver
    return replace(solver, model=solver.model.resized(*sides), puzzles=maze_format(*sides))


def _maze_sides(text: str) -> tuple[int, int] | None:
    """Rows and columns of the first maze of a text; None where it is something else, or all on one line."""
    lines = [line for line in text.replace("\r", "").split("\n\n")[0].split("\n") if line]
    signs = "".join(lines)
    is_maze = len(lines) > 2 and set(signs) <= set("# SG") and signs.count("S") == signs.count("G") == 1
    return (len(lines), max(map(len, lines))) if is_maze else None


def find_solver(
    model: str | Path | None, puzzle: str, bundled: Callable[[], dict[str, Path]] = bundled_solvers
) -> Path:
    """The folder of a recursive model: as named, of a run directory's stage `trm`, or the bundled one for a grid.

    Raises:
        CheckpointError: there is none.
    """
    if model is None:
        for folder in bundled().values():
            format = PuzzleFormat.model_validate(read_json(folder / "config.json")["puzzles"])
            if format.kind == "maze" and _maze_sides(puzzle):
                return folder
            if any(len(format.signs(grid)) == format.num_cells for grid in split_puzzles(puzzle, format.num_cells)[:1]):
                return folder
        num_cells = sum(not sign.isspace() for sign in puzzle)
        raise CheckpointError(
            f"no bundled model solves grids of {num_cells} cells",
            fix="train one, such as with `tafkir run trm-sudoku4`, and name its run directory",
        )
    path = Path(model)
    of_run = RunDir(path).stage("trm").checkpoint_dir
    if of_run.is_dir():
        return of_run
    named = bundled()
    if not path.is_dir() and str(model) not in named:
        raise CheckpointError("no such checkpoint or run directory", where=str(model))
    return path if path.is_dir() else named[str(model)]


def split_puzzles(text: str, num_cells: int) -> list[str]:
    """The puzzles of a text: each line that is a whole grid, or grids on several lines with empty lines between."""
    blocks = [block.strip("\n") for block in text.replace("\r", "").split("\n\n") if block.strip()]
    puzzles: list[str] = []
    for block in blocks:
        lines = block.split("\n")
        # In a maze spaces are cells, elsewhere they are not.
        whole = all(num_cells in (len(line), len("".join(line.split()))) for line in lines)
        puzzles += lines if whole else [block]
    return puzzles
