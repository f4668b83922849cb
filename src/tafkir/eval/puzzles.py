"""A recursive model answers a task, and is graded like a language model: puzzles step by step, ARC tasks by votes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from numpy.typing import NDArray

from tafkir.checkpoint.trm import TrmCheckpoint
from tafkir.data.puzzles.format import Cells
from tafkir.data.puzzles.votes import ATTEMPTS
from tafkir.engine.arc import answer_tasks, split_known
from tafkir.errors import DataError
from tafkir.eval.records import GREEDY, EvalRecord, write_records
from tafkir.models.solving import Solved, solve_puzzles
from tafkir.models.trm import Trm
from tafkir.protocols import Task
from tafkir.recipe.load import load_recipe
from tafkir.records import Example
from tafkir.runlog.progress import Progress
from tafkir.tasks.arc_task import ArcSetTask
from tafkir.tasks.puzzle_sets import PuzzleSetTask, build_for, form_mark

__all__ = ["RecursiveAnswers", "answer_arc", "answer_recursively", "count_seen", "record_answer", "seconds_alone"]

_BATCH = 256


@dataclass(frozen=True, slots=True)
class RecursiveAnswers:
    """What a recursive model answered.

    Attributes:
        final: graded answers after all supervision steps.
        halted: graded answers at the first step with q above the threshold.
        by_step: share of puzzles right after each step.
        halts: steps that each puzzle took until it halted, from 1.
    """

    final: Sequence[EvalRecord]
    halted: Sequence[EvalRecord]
    by_step: Sequence[float]
    halts: NDArray[np.int64]


def answer_recursively(
    solver: TrmCheckpoint,
    task: PuzzleSetTask,
    examples: Sequence[Example],
    *,
    halt_threshold: float,
    path: Path,
    fingerprint: str,
    label: str = "eval",
) -> RecursiveAnswers:
    """Answer and grade; the answers after all steps go to `path`, those of the halting rule beside it.

    Args:
        solver: trained on puzzles of the task's format.
        halt_threshold: on the logit of the halting head.
        path: JSON-lines file, replaced; `<stem>-halting.jsonl` holds the others.
        fingerprint: what identifies the weights.
        label: name in the progress line.

    Raises:
        DataError: the model is made for other puzzles, or there is no example.
    """
    if not examples:
        raise DataError("there is no example to evaluate", where=task.name, expected="at least one puzzle")
    if solver.puzzles != task.format:
        raise DataError(
            f"the model solves {_describe(solver)}",
            where=str(solver.path),
            expected=f"the puzzles of {task.name}: {task.format.kind}, {task.format.rows} x {task.format.columns}",
            fix="choose the task that it was trained for, or another checkpoint",
        )
    solved = _solve_all(solver.model, task.cells(examples), label)
    grade = _Grader(task, examples, solved, fingerprint)
    halts = solved.halts(halt_threshold)
    steps, places = len(solved.answers), range(len(examples))
    final = [grade(steps - 1, place) for place in places]
    halted = [grade(int(halts[place]), place) for place in places]
    write_records(path, final)
    write_records(path.with_name(f"{path.stem}-halting{path.suffix}"), halted)
    by_step = [sum(grade(step, place).correct for place in places) / len(places) for step in range(steps)]
    return RecursiveAnswers(final, halted, by_step, halts + 1)


def count_seen(checkpoint: Path, task: PuzzleSetTask, examples: Sequence[Example]) -> int | None:
    """How many of the puzzles a recursive model's training had, in whatever form; None where nobody knows.

    What it was trained on is made again from the recipe of the run directory that the checkpoint lies in.
    """
    recipe_path = checkpoint.resolve().parents[2] / "recipe.resolved.toml"
    if not recipe_path.is_file() or checkpoint.name != "checkpoint":
        return None
    recipe = load_recipe([recipe_path]).recipe
    if recipe.trm is None:
        return None
    if task.origin == (recipe.trm.puzzles, recipe.seed):
        # The parts of one recipe share no form of a puzzle.
        return 0
    trained = build_for(recipe.trm.puzzles, recipe.seed)
    if trained.format != task.format:
        return None
    known = {form_mark(task.format, question) for question in trained.train.inputs}
    return sum(form_mark(task.format, question) in known for question in task.cells(examples))


def seconds_alone(model: Trm, inputs: Cells, *, halt_threshold: float | None = None) -> float:
    """Wall time of solving one puzzle by itself, the median over `inputs` [N, L].

    Args:
        halt_threshold: stop at the first step with q above this; None takes all supervision steps.
    """
    durations = []
    for number in range(-1, len(inputs)):
        # The first one, solved twice, warms up.
        one = torch.from_numpy(inputs[max(0, number)][None]).long().to(model.y_init.device)
        began = time.perf_counter()
        for out in model.steps(one):
            answer = out.logits.argmax(-1).cpu()
            if halt_threshold is not None and float(out.q_halt) > halt_threshold:
                break
        assert answer.shape == one.shape
        durations.append(time.perf_counter() - began)
    return median(durations[1:])


def _describe(solver: TrmCheckpoint) -> str:
    return f"{solver.puzzles.kind}, {solver.puzzles.rows} x {solver.puzzles.columns}"


def _solve_all(model: Trm, inputs: Cells, label: str) -> Solved:
    parts = []
    with Progress(label, total=len(inputs)) as progress:
        for first in range(0, len(inputs), _BATCH):
            parts.append(solve_puzzles(model, inputs[first : first + _BATCH], batch_size=_BATCH))
            progress.update(min(first + _BATCH, len(inputs)))
    return Solved(
        np.concatenate([part.answers for part in parts], axis=1), np.concatenate([p.q_halt for p in parts], axis=1)
    )


def record_answer(task: Task, example: Example, text: str, fingerprint: str, *, repeat: int, tokens: int) -> EvalRecord:
    """The graded text of a model that writes no tokens; `tokens` counts the cells of its answer."""
    verdict = task.grade(example, text)
    parts = json.dumps([fingerprint, example.id, text, repeat])
    return EvalRecord(
        key=hashlib.blake2b(parts.encode("utf-8"), digest_size=12).hexdigest(),
        example_id=example.id,
        source=example.source,
        repeat=repeat,
        question=example.question,
        text=text,
        outcome=verdict.outcome,
        reward=verdict.reward,
        extracted=verdict.extracted,
        expected=verdict.expected,
        reason=verdict.reason,
        tokens=tokens,
        finish_reason="stop",
    )


class _Grader:
    """Grades the answer of a step to a puzzle; equal answers of later steps are not judged again."""

    def __init__(self, task: PuzzleSetTask, examples: Sequence[Example], solved: Solved, fingerprint: str) -> None:
        self._task, self._examples, self._solved, self._fingerprint = task, examples, solved, fingerprint
        self._known: dict[tuple[int, bytes], EvalRecord] = {}

    def __call__(self, step: int, place: int) -> EvalRecord:
        answer = self._solved.answers[step, place]
        found = place, answer.tobytes()
        if found not in self._known:
            text = self._task.write(answer)
            self._known[found] = record_answer(
                self._task, self._examples[place], text, self._fingerprint, repeat=GREEDY, tokens=answer.size
            )
        return self._known[found]


def answer_arc(
    solver: TrmCheckpoint, task: ArcSetTask, examples: Sequence[Example], *, path: Path, fingerprint: str, label: str
) -> tuple[list[EvalRecord], float]:
    """Two attempts at every test input by the votes of the forms that the model knows; answers go to `path`.

    Returns:
        The graded attempts, `repeat` 0 and 1 of each example, and how many forms voted in the mean.

    Raises:
        CheckpointError: the model solves something else than ARC tasks.
        DataError: it was not trained on one of them.
    """
    tasks = task.tasks(examples)
    with Progress(label, total=1) as progress:

        def tell(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        answers = answer_tasks(solver, tasks, on_progress=tell)
    records = []
    for example in examples:
        ranking = answers[example.extra["task"]][example.extra["number"]]
        for attempt in range(ATTEMPTS):
            # A single candidate is handed in twice, as in a submission.
            grid = ranking[min(attempt, len(ranking) - 1)].grid if ranking else None
            cells = 0 if grid is None else grid.size
            text = task.write(grid)
            records.append(record_answer(task, example, text, fingerprint, repeat=attempt, tokens=cells))
    write_records(path, records)
    known, _ = split_known(solver, tasks)
    forms = {found.task.id: len(found.forms) for found in known}
    return records, fmean(forms[example.extra["task"]] for example in examples)
