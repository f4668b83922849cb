"""Answers of a recursive model to ARC tasks: it solves every form of every test input, and the forms vote.

Shapes: N predictions, L cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tafkir.data.puzzles.arc import ArcTask
from tafkir.data.puzzles.arc_sets import TaskForms
from tafkir.data.puzzles.canvas import Form, crop, place
from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.votes import Candidate, rank_candidates
from tafkir.errors import DataError
from tafkir.models.solving import halt_above, solve_puzzles
from tafkir.models.trm import Trm

__all__ = ["vote"]

# Forms that are solved before their answers are counted: what limits memory.
_MAX_ROWS = 2048


class _Row(NamedTuple):
    """One form of one test input."""

    task: int
    test: int
    form: Form
    puzzle_id: int
    cells: Cells


def vote(
    model: Trm,
    format: PuzzleFormat,
    tasks: Sequence[TaskForms],
    *,
    steps: int | None = None,
    halt_threshold: float | None = None,
    max_forms: int = 0,
    runs: int = 1,
    noise: float = 0.0,
    batch_size: int = 256,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[list[Candidate]]]:
    """Ranked candidates for every test input of every task.

    Args:
        format: of the model's canvas.
        tasks: with rows of the model's table of puzzle vectors.
        steps: supervision steps, N_sup where not given.
        halt_threshold: take each answer at the first step with q above this; not given, after all steps, as the
            reference does.
        max_forms: forms of each test input that vote, at most; 0 is all.
        runs: each form is solved so often, with noise in all but the first.
        noise: see `solve_puzzles`.
        batch_size: forms at once.
        seed: of the noise.
        on_progress: told how many of how many predictions are made.

    Raises:
        DataError: a test input does not fit the canvas.
    """
    predictions: list[list[list[tuple[np.ndarray, float]]]] = [[[] for _ in task.task.test] for task in tasks]
    total = sum(len(task.task.test) * len(_voters(task, max_forms)) for task in tasks) * runs
    done = 0
    for rows in _chunks(_rows(format, tasks, max_forms, runs), _MAX_ROWS):
        levels = np.array([noise if run else 0.0 for run, _ in rows], dtype=np.float32)
        solved = solve_puzzles(
            model,
            np.stack([row.cells for _, row in rows]),
            puzzle_ids=np.array([row.puzzle_id for _, row in rows], dtype=np.int64),
            steps=steps,
            batch_size=batch_size,
            noise=levels,
            seed=seed + done,
            stop=None if halt_threshold is None else halt_above(halt_threshold),
        )
        q = 1 / (1 + np.exp(-solved.q_halt[-1].astype(np.float64)))
        for (_, row), cells, confidence in zip(rows, solved.answers[-1], q, strict=True):
            grid = crop(cells, format.rows, format.columns)
            answer = row.form.undo(grid) if grid.size else grid
            predictions[row.task][row.test].append((np.ascontiguousarray(answer), float(confidence)))
        done += len(rows)
        on_progress(done, total)
    return [[rank_candidates(found) for found in tests] for tests in predictions]


def _voters(task: TaskForms, max_forms: int) -> Sequence[Form]:
    return task.forms[: max_forms or None]


def _rows(format: PuzzleFormat, tasks: Sequence[TaskForms], max_forms: int, runs: int) -> Iterator[tuple[int, _Row]]:
    """Every form of every test input, each `runs` times, with the number of the run."""
    for index, task in enumerate(tasks):
        for number, form in enumerate(_voters(task, max_forms)):
            for test in range(len(task.task.test)):
                cells = _lay(format, task.task, test, form)
                row = _Row(index, test, form, task.ids[number], cells)
                yield from ((run, row) for run in range(runs))


def _lay(format: PuzzleFormat, task: ArcTask, test: int, form: Form) -> Cells:
    try:
        return place(form.apply(task.test[test].input), format.rows, format.columns)
    except DataError as error:
        where = f"{task.where}: test {test + 1}"
        raise DataError(error.what, where=where, expected=error.expected, fix=error.fix) from error


def _chunks(rows: Iterable[tuple[int, _Row]], size: int) -> Iterator[list[tuple[int, _Row]]]:
    chunk: list[tuple[int, _Row]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
