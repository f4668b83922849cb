"""Answers to ARC tasks by majority: equal grids are counted, ranked by votes and then by the model's own confidence.

Ranking, pass@K and the two attempts of a submission as in the official TRM code (`evaluators/arc.py` at e7b6871).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from tafkir.data.puzzles.arc import ArcGrid, ArcTask
from tafkir.errors import DataError

__all__ = ["ATTEMPTS", "Candidate", "Ranking", "build_submission", "pass_at", "rank_candidates"]

ATTEMPTS = 2
"""Answers to a test input that may be handed in."""


class Candidate(NamedTuple):
    """A grid, how many predictions it has, and the mean of their confidence (0 to 1)."""

    grid: ArcGrid
    votes: int
    q: float


Ranking = Sequence[Candidate]
"""Candidates for one test input, the best first."""


def rank_candidates(predictions: Iterable[tuple[ArcGrid, float]]) -> list[Candidate]:
    """Equal grids as one candidate each, by votes, then by mean confidence; empty grids are no answer.

    Of candidates that are alike in both the one that came first leads.
    """
    found: dict[tuple[tuple[int, ...], bytes], tuple[ArcGrid, list[float]]] = {}
    for grid, q in predictions:
        if grid.size:
            found.setdefault((grid.shape, grid.tobytes()), (grid, []))[1].append(q)
    candidates = [Candidate(grid, len(qs), fmean(qs)) for grid, qs in found.values()]
    return sorted(candidates, key=lambda candidate: (-candidate.votes, -candidate.q))


def pass_at(rankings: Sequence[Ranking], outputs: Sequence[ArcGrid], attempts: int) -> float:
    """The share of a task's test inputs whose output is among the first candidates."""
    if not outputs:
        raise DataError("there is no test output to score by", expected="at least one")
    solved = [
        any(np.array_equal(candidate.grid, output) for candidate in ranking[:attempts])
        for ranking, output in zip(rankings, outputs, strict=True)
    ]
    return fmean(solved)


def build_submission(answers: Mapping[str, Sequence[Ranking]], tasks: Sequence[ArcTask]) -> dict[str, Any]:
    """Two attempts for every test input, as ARC Prize takes them: `{id: [{"attempt_1": grid, "attempt_2": grid}]}`.

    Where there is one candidate alone it is handed in twice; where there is none, a single black cell.

    Raises:
        DataError: a task has not as many answers as test inputs.
    """
    submission: dict[str, Any] = {}
    for task in tasks:
        rankings = answers.get(task.id, ())
        if len(rankings) != len(task.test):
            raise DataError(f"{len(rankings)} of {len(task.test)} test inputs are answered", where=task.where)
        rows = []
        for ranking in rankings:
            grids = [candidate.grid.tolist() for candidate in ranking[:ATTEMPTS]] or [[[0]]]
            rows.append({f"attempt_{i + 1}": grids[min(i, len(grids) - 1)] for i in range(ATTEMPTS)})
        submission[task.id] = rows
    return submission
