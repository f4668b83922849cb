"""Answers to puzzles in text: a recursive model thinks, and the rules, where known, say whether it is right."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tafkir.checkpoint.trm import TrmCheckpoint, load_trm
from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.rules import has_rules, is_right, solve_by_rules
from tafkir.errors import CheckpointError, RequestError
from tafkir.models.solving import solve_puzzles
from tafkir.recipe.bundled import bundled_checkpoints
from tafkir.runlog.atomic import read_json
from tafkir.runlog.rundir import RunDir

__all__ = ["PuzzleAnswer", "bundled_solvers", "find_solver", "solve", "split_puzzles"]

Verdict = Literal["solved", "unsolved", "unchecked"]


@dataclass(frozen=True, slots=True)
class PuzzleAnswer:
    """What a model made of a puzzle.

    Attributes:
        verdict: "solved" by the rules; "unsolved" where no step's answer keeps them; "unchecked" where none are known.
        grid: rows of signs; None where the puzzle is unsolved, so that no wrong answer is ever shown.
        steps: supervision steps up to the answer, or all that were taken.
        q: the model's own probability that its answer is right.
        seconds: wall time of the thinking.
    """

    verdict: Verdict
    grid: tuple[str, ...] | None
    steps: int
    q: float
    seconds: float

    def __str__(self) -> str:
        """The grid on lines, or the word "unsolved"."""
        return self.verdict if self.grid is None else "\n".join(self.grid)


def solve(
    puzzle: str,
    model: str | Path | TrmCheckpoint | None = None,
    *,
    max_steps: int | None = None,
    halt_threshold: float = 0.0,
    where: str | None = None,
) -> PuzzleAnswer:
    """Solve one puzzle in text, such as `solve("1..4.2.....3....", "runs/trm-sudoku4")`.

    Where rules are known, the first supervision step counts whose answer keeps them; else the first with q above the
    threshold.

    Args:
        puzzle: rows on lines or all cells on one; a Sudoku's blanks are `.` or `0`.
        model: a checkpoint folder, a run directory with a stage `trm`, a name, or a loaded one; None takes the bundled
            model for grids of this size.
        max_steps: supervision steps at most; more than N_sup are allowed.
        halt_threshold: on the halting head's logit.
        where: named in errors.

    Raises:
        DataError: not a grid of the model's size and symbols, or a puzzle without exactly one answer.
        CheckpointError: the model is missing or damaged, or none is bundled for this size.
        RequestError: `max_steps` is below one.
    """
    if max_steps is not None and max_steps < 1:
        raise RequestError(f"max_steps is {max_steps}", expected="at least 1")
    solver = model if isinstance(model, TrmCheckpoint) else load_trm(find_solver(model, puzzle))
    format = solver.puzzles
    question = format.read(puzzle, where)
    if has_rules(format):
        solve_by_rules(format, question, where)
    began = time.perf_counter()
    found = solve_puzzles(solver.model, question[None], steps=max_steps)
    seconds = time.perf_counter() - began
    answers, q = found.answers[:, 0], found.q_halt[:, 0]
    verdict, step = _choose(format, question, answers, int(found.halts(halt_threshold)[0]))
    grid = None if verdict == "unsolved" else tuple(format.show(answers[step]).split("\n"))
    return PuzzleAnswer(verdict, grid, step + 1, float(1 / (1 + np.exp(-q[step]))), seconds)


def _choose(format: PuzzleFormat, question: Cells, answers: Cells, halted: int) -> tuple[Verdict, int]:
    """The verdict, and the step (from 0) whose answer counts."""
    if not has_rules(format):
        return "unchecked", halted
    right = [step for step, answer in enumerate(answers) if is_right(format, question, answer)]
    return ("solved", right[0]) if right else ("unsolved", len(answers) - 1)


def find_solver(
    model: str | Path | None, puzzle: str, bundled: Callable[[], dict[str, Path]] = bundled_checkpoints
) -> Path:
    """The folder of a recursive model: as named, of a run directory's stage `trm`, or the bundled one for a grid.

    Raises:
        CheckpointError: there is none.
    """
    if model is None:
        num_cells = sum(not sign.isspace() for sign in puzzle)
        for folder in bundled_solvers(bundled).values():
            if read_json(folder / "config.json")["shape"]["sequence_length"] == num_cells:
                return folder
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


def bundled_solvers(bundled: Callable[[], dict[str, Path]] = bundled_checkpoints) -> dict[str, Path]:
    """The bundled checkpoints that are recursive models, by name."""
    found = bundled().items()
    return {name: folder for name, folder in found if read_json(folder / "config.json").get("model_type") == "trm"}


def split_puzzles(text: str, num_cells: int) -> list[str]:
    """The puzzles of a text: each line that is a whole grid, or grids on several lines with empty lines between."""
    blocks = [block.strip("\n") for block in text.replace("\r", "").split("\n\n") if block.strip()]
    puzzles: list[str] = []
    for block in blocks:
        lines = block.split("\n")
        whole = all(len("".join(line.split())) == num_cells for line in lines)
        puzzles += lines if whole else [block]
    return puzzles
