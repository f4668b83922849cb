"""Which puzzles a recursive model fails: accuracy by givens, by length of the way, or by cells to fill in.

Shapes: N puzzles, L cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.parts import PuzzleSet
from tafkir.intervals import Estimate, accuracy
from tafkir.models.solving import solve_puzzles
from tafkir.models.trm import Trm

__all__ = ["DifficultyRow", "DifficultyTable", "measure_by_difficulty", "puzzle_difficulty"]

_MAX_ROWS = 8


@dataclass(frozen=True, slots=True)
class DifficultyRow:
    """Puzzles whose measure lies from `low` to `high`.

    Attributes:
        exact: share of whole grids that are right after the last step.
        cells: share of the labelled cells that are right.
        steps: mean supervision step after which the grid is right for good; None where none is.
    """

    low: int
    high: int
    exact: Estimate
    cells: float
    steps: float | None


@dataclass(frozen=True, slots=True)
class DifficultyTable:
    """Rows from the easiest puzzles to the hardest; `measure` says by what, `total` is all of them."""

    measure: str
    rows: tuple[DifficultyRow, ...]
    total: DifficultyRow

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def puzzle_difficulty(format: PuzzleFormat, inputs: Cells, labels: Cells) -> tuple[str, NDArray[np.int64]]:
    """What makes puzzles of a kind hard, in words, and how much of it each has: [N].

    For a Sudoku its givens, of which fewer are harder; for a maze the moves from S to G; else the cells to change.
    """
    if format.kind == "sudoku" and format.blank is not None:
        return "givens", (inputs != format.symbols.index(format.blank)).sum(1)
    if format.kind == "maze":
        return "moves from S to G", (labels == format.symbols.index("o")).sum(1) + 1
    return "cells to change", ((labels != inputs) & (labels != 0)).sum(1)


def measure_by_difficulty(
    model: Trm, format: PuzzleFormat, puzzles: PuzzleSet, *, steps: int | None = None
) -> DifficultyTable:
    """Solve puzzles and sort what is right by difficulty, in at most eight groups of about equal size.

    Args:
        puzzles: questions and answers; cells of 0 in an answer have no label.
        steps: supervision steps; N_sup where not given.
    """
    inputs, labels = puzzles.inputs, puzzles.labels
    right_KNL = solve_puzzles(model, inputs, puzzle_ids=puzzles.puzzle_ids, steps=steps).right(labels)
    measure, amount_N = puzzle_difficulty(format, inputs, labels)
    labelled_NL = labels != 0
    groups = _groups(amount_N)
    if measure == "givens":
        groups = groups[::-1]
    rows = tuple(
        _row(np.flatnonzero((amount_N >= low) & (amount_N <= high)), amount_N, right_KNL, labelled_NL)
        for low, high in groups
    )
    return DifficultyTable(measure, rows, _row(np.arange(len(inputs)), amount_N, right_KNL, labelled_NL))


def _groups(amount_N: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Neighbouring amounts that make groups of about equal size."""
    values, counts = np.unique(amount_N, return_counts=True)
    groups: list[list[int]] = []
    room, seen = len(amount_N) / _MAX_ROWS, 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if len(values) <= _MAX_ROWS or not groups or seen >= room * len(groups):
            groups.append([])
        groups[-1].append(value)
        seen += count
    return [(group[0], group[-1]) for group in groups]


def _row(
    chosen: NDArray[np.int64], amount_N: NDArray[np.int64], right_KNL: NDArray[np.bool_], labelled_NL: NDArray[np.bool_]
) -> DifficultyRow:
    whole_KN: NDArray[np.bool_] = np.all(right_KNL[:, chosen], axis=-1)
    labelled = labelled_NL[chosen]
    cells = float((right_KNL[-1, chosen] & labelled).sum() / max(1, labelled.sum()))
    settled = [_settled(column) for column in whole_KN.T.tolist() if column[-1]]
    steps = float(np.mean(settled)) if settled else None
    amounts = amount_N[chosen]
    return DifficultyRow(int(amounts.min()), int(amounts.max()), accuracy(whole_KN[-1].tolist()), cells, steps)


def _settled(right_K: Sequence[bool]) -> int:
    """The step, from 1, from which on the grid is right."""
    wrong = [step for step, right in enumerate(right_K) if not right]
    return wrong[-1] + 2 if wrong else 1
