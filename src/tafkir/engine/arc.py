"""Answers to ARC tasks by a recursive model: the forms of each task that it knows vote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tafkir.checkpoint.trm import TrmCheckpoint
from tafkir.data.puzzles.arc import ArcTask
from tafkir.data.puzzles.arc_sets import TaskForms, known_forms
from tafkir.data.puzzles.votes import Candidate
from tafkir.errors import CheckpointError, DataError
from tafkir.models.arc_votes import vote
from tafkir.models.search import Search

__all__ = ["answer_tasks", "split_known"]


def split_known(solver: TrmCheckpoint, tasks: Sequence[ArcTask]) -> tuple[list[TaskForms], list[ArcTask]]:
    """Tasks that the model has vectors for, with their forms, and tasks that it has none for.

    Raises:
        CheckpointError: the model solves something else than ARC tasks.
    """
    if solver.puzzles.kind != "arc" or solver.identifiers is None:
        raise CheckpointError(
            f"the model solves puzzles of kind {solver.puzzles.kind!r}",
            where=str(solver.path),
            expected="one that was trained on ARC tasks, with identifiers.json",
            fix="train one, such as with `tafkir run trm-arc-mini`",
        )
    found = known_forms(tasks, solver.identifiers)
    unknown = [task for task, forms in zip(tasks, found, strict=True) if forms is None]
    return [forms for forms in found if forms is not None], unknown


def answer_tasks(
    solver: TrmCheckpoint,
    tasks: Sequence[ArcTask],
    *,
    steps: int | None = None,
    halt_threshold: float | None = None,
    max_forms: int = 0,
    search: Search | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Mapping[str, list[list[Candidate]]]:
    """Ranked candidates for every test input, by task id.

    Args:
        solver: trained on ARC tasks, these among them.
        steps: supervision steps, N_sup where not given.
        halt_threshold: take each answer at the first step with q above this; not given, after all steps.
        max_forms: forms of each test input that vote, at most; 0 is all that the model knows.
        search: `runs` and `noise` of each form; all runs vote.
        on_progress: told how many of how many predictions are made.

    Raises:
        CheckpointError: the model solves something else.
        DataError: the model has no vector for a task, or a grid does not fit its canvas.
    """
    known, unknown = split_known(solver, tasks)
    if unknown:
        examples = ", ".join(task.id for task in unknown[:3])
        raise DataError(
            f"the model has never seen {len(unknown)} of {len(tasks)} tasks, such as {examples}",
            where=unknown[0].where,
            expected="tasks that it was trained on: it knows a task by a vector of its own",
            fix="learn them from their demonstrations with --train-steps 200",
        )
    search = search or Search()
    answers = vote(
        solver.model,
        solver.puzzles,
        known,
        steps=steps,
        halt_threshold=halt_threshold,
        max_forms=max_forms,
        runs=search.runs,
        noise=search.noise,
        seed=search.seed,
        on_progress=on_progress,
    )
    return {forms.task.id: rankings for forms, rankings in zip(known, answers, strict=True)}
