"""Verifiers as Ray actors behind `Task`: answers of a step are graded at once, and none can stop the run."""

from __future__ import annotations

from collections.abc import Sequence

from tafkir.cluster.actors import ActorPool, PoolLimits
from tafkir.protocols import Task
from tafkir.records import Answer, Example, Message, Split, Verdict

__all__ = ["VerifierPool"]


class _Subject:
    """What a verifier has: a task of its own."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __call__(self) -> _Subject:
        return self

    def grade(self, answer: Answer) -> Verdict:
        return self._task.grade(answer.example, answer.text, finished=answer.finished)


class VerifierPool:
    """A task whose answers are graded by Ray actors.

    An answer that kills or blocks `max_attempts` verifiers gets the outcome "error" and the reason: one bad answer
    costs its own reward, never the run.

    Args:
        task: what it grades as; a copy travels to every verifier, so it must be picklable.
        num_verifiers: how many.
        limits: waits and attempts.
    """

    def __init__(self, task: Task, num_verifiers: int, limits: PoolLimits | None = None) -> None:
        self._task = task
        self._limits = limits or PoolLimits(timeout_s=60.0)
        self._actors = ActorPool("verifier", _Subject(task), num_verifiers, self._limits)

    @property
    def name(self) -> str:
        return self._task.name

    def examples(self, split: Split) -> Sequence[Example]:
        """The task's own."""
        return self._task.examples(split)

    def prompt(self, example: Example) -> list[Message]:
        """The task's own."""
        return self._task.prompt(example)

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        """Grade one answer."""
        return self.grade_all([Answer(example, text, finished)])[0]

    def grade_all(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Grade all answers at once; verdicts in their order."""

        def unanswered(index: int, reason: str) -> Verdict:
            return Verdict("error", 0.0, None, answers[index].example.answer, reason)

        graded = dict(self._actors.run([("grade", (answer,)) for answer in answers], substitute=unanswered))
        return [graded[i] for i in range(len(answers))]

    def metrics(self) -> dict[str, float]:
        """Verifiers that were lost so far, and answers that were graded again."""
        return self._actors.metrics()

    def close(self) -> None:
        """End all verifiers."""
        self._actors.close()
