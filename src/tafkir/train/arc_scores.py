"""What a recursive model solves of ARC tasks by voting: pass@K with intervals beside simple rules, and a submission."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tafkir.data.puzzles.arc_baselines import answer_by_copying, answer_by_rules
from tafkir.data.puzzles.arc_sets import ArcSets, TaskForms
from tafkir.data.puzzles.votes import ATTEMPTS, Ranking, build_submission, pass_at
from tafkir.intervals import Estimate, mean_interval, wilson
from tafkir.models.arc_votes import vote
from tafkir.models.trm import Trm

__all__ = ["PASS_AT", "score_arc", "score_rankings"]

PASS_AT = (1, 2, 5, 10, 100, 1000)
"""Numbers of attempts that are scored."""


def score_arc(
    model: Trm,
    puzzles: ArcSets,
    *,
    max_forms: int = 0,
    batch_size: int = 256,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of the tasks that are only measured on, as `result.json` holds them, and a submission for them.

    Returns:
        Scores: `tasks`, `forms` (largest number of voters), `pass_at` by number of attempts, each a mean over tasks
        with its interval; under `baselines` the same of copying and of simple rules; `over_rules`, the mean difference
        of pass@2 to the rules, task by task. The submission: see `build_submission`.
    """
    tasks = puzzles.held_out["test"]
    answers = vote(model, puzzles.format, tasks, max_forms=max_forms, batch_size=batch_size, on_progress=on_progress)
    copied, ruled = ([answer(task.task) for task in tasks] for answer in (answer_by_copying, answer_by_rules))
    ours, theirs = (_shares(tasks, found, ATTEMPTS) for found in (answers, ruled))
    forms = max(min(len(task.forms), max_forms or len(task.forms)) for task in tasks)
    scores = {
        "tasks": len(tasks),
        "forms": forms,
        "pass_at": score_rankings(tasks, answers, [count for count in PASS_AT if count <= max(ATTEMPTS, forms)]),
        "baselines": {
            "copy": score_rankings(tasks, copied, (1,)),
            "rules": score_rankings(tasks, ruled, (1, ATTEMPTS)),
        },
        "over_rules": _mean([a - b for a, b in zip(ours, theirs, strict=True)], -1.0).to_dict(),
    }
    found = {task.task.id: rankings for task, rankings in zip(tasks, answers, strict=True)}
    return scores, build_submission(found, [task.task for task in tasks])


def score_rankings(
    tasks: Sequence[TaskForms], answers: Sequence[Sequence[Ranking]], attempts: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Mean share of a task's scored test inputs that are solved, by number of attempts."""
    return {str(count): _estimate(_shares(tasks, answers, count)).to_dict() for count in attempts}


def _shares(tasks: Sequence[TaskForms], answers: Sequence[Sequence[Ranking]], attempts: int) -> list[float]:
    shares = []
    for task, rankings in zip(tasks, answers, strict=True):
        outputs = [output for i in task.scored if (output := task.task.test[i].output) is not None]
        shares.append(pass_at([rankings[i] for i in task.scored], outputs, attempts))
    return shares


def _estimate(shares: Sequence[float]) -> Estimate:
    """Wilson's interval where every task is solved or not; Student's where there are parts."""
    if all(share in (0.0, 1.0) for share in shares):
        return wilson(round(sum(shares)), len(shares))
    return _mean(shares, 0.0)


def _mean(values: Sequence[float], lowest: float) -> Estimate:
    """Student's interval, within what is possible: a single value says nothing."""
    found = mean_interval(values)
    return replace(found, low=max(lowest, found.low), high=min(1.0, found.high))
