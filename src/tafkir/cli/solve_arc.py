"""`tafkir solve --arc TASKS`: two attempts at every test input, and the score where the outputs are known."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tafkir.checkpoint.trm import TrmCheckpoint
    from tafkir.data.puzzles.arc import ArcTask
    from tafkir.data.puzzles.votes import Candidate
    from tafkir.models.search import Search

__all__ = ["Adaptation", "solve_tasks"]

_ATTEMPTS = 2
_WEIGHTS_RATE = 1e-4


@dataclass(frozen=True, slots=True)
class Adaptation:
    """How unknown tasks are learned: for so many steps, and whether the network learns along."""

    steps: int
    weights: bool


def solve_tasks(
    source: str,
    model: str,
    steps: int | None,
    halt_threshold: float | None,
    search: Search,
    forms: int,
    adaptation: Adaptation,
    submission: Path | None,
    as_json: bool,
) -> None:
    """Answer the tasks of a source, print or write two attempts at each test input, and say what is right of them."""
    from tafkir.checkpoint.trm import load_trm
    from tafkir.data.puzzles.arc import read_tasks
    from tafkir.data.puzzles.votes import build_submission
    from tafkir.engine.arc import answer_tasks
    from tafkir.engine.puzzles import find_solver
    from tafkir.runlog.atomic import write_json
    from tafkir.runlog.progress import Progress

    tasks = read_tasks(source)
    solver = load_trm(find_solver(model, ""))
    if adaptation.steps:
        solver = _learn(solver, tasks, adaptation, search.seed)
    with Progress("solve", 1) as progress:

        def tell(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        answers = answer_tasks(
            solver,
            tasks,
            steps=steps,
            halt_threshold=halt_threshold,
            max_forms=forms,
            search=search,
            on_progress=tell,
        )
    if submission is not None:
        write_json(submission, build_submission(answers, tasks))
    for task in tasks:
        _show(task, answers[task.id], as_json, quiet=submission is not None)
    _tell_score(tasks, answers)


def _learn(solver: TrmCheckpoint, tasks: Sequence[ArcTask], adaptation: Adaptation, seed: int) -> TrmCheckpoint:
    """Vectors for the tasks that the model does not know yet."""
    from tafkir.engine.arc import split_known
    from tafkir.runlog.progress import Progress
    from tafkir.train.arc_adaptation import learn_tasks

    _, unknown = split_known(solver, tasks)
    if not unknown:
        return solver
    with Progress("learn tasks", adaptation.steps) as progress:
        return learn_tasks(
            solver,
            unknown,
            steps=adaptation.steps,
            learning_rate=_WEIGHTS_RATE if adaptation.weights else None,
            seed=seed,
            on_step=lambda step, loss: progress.update(step, loss=loss),
        )


def _show(task: ArcTask, rankings: Sequence[Sequence[Candidate]], as_json: bool, *, quiet: bool) -> None:
    """A line of JSON for each task, or its attempts as grids; with a submission neither, unless JSON was asked for."""
    if as_json:
        rows = [
            [{"grid": c.grid.tolist(), "votes": c.votes, "q": round(c.q, 6)} for c in ranking[:_ATTEMPTS]]
            for ranking in rankings
        ]
        print(json.dumps({"id": task.id, "test": rows}))
    elif not quiet:
        for number, ranking in enumerate(rankings, start=1):
            for attempt, candidate in enumerate(ranking[:_ATTEMPTS], start=1):
                print(f"{task.id} test {number} attempt {attempt}: {candidate.votes} votes, q = {candidate.q:.3f}")
                print("\n".join("".join(map(str, row)) for row in candidate.grid.tolist()), end="\n\n")


def _tell_score(tasks: Sequence[ArcTask], answers: Mapping[str, Sequence[Sequence[Candidate]]]) -> None:
    from tafkir.data.puzzles.votes import pass_at

    solved = {1: 0.0, _ATTEMPTS: 0.0}
    scored = 0
    for task in tasks:
        known = [i for i, pair in enumerate(task.test) if pair.output is not None]
        if known:
            scored += 1
            outputs = [output for i in known if (output := task.test[i].output) is not None]
            for attempts in solved:
                solved[attempts] += pass_at([answers[task.id][i] for i in known], outputs, attempts)
    if scored:
        shares = ", ".join(f"pass@{attempts} {100 * value / scored:.1f} %" for attempts, value in solved.items())
        print(f"{scored} tasks have known outputs: {shares}", file=sys.stderr)
