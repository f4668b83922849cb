"""Mathematics with one answer a rule can judge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tafkir.data.sources import read_source
from tafkir.records import Example, Outcome
from tafkir.tasks.answers import Extraction, extract_answer
from tafkir.tasks.math import WordProblems
from tafkir.tasks.published.base import PublishedTask, TaskCard, TaskEntry, TaskSampling

__all__ = ["TASKS"]

_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


class NumberRule:
    """A number: the last box, else `#### N`, else "answer is N", else the last number; compared exactly."""

    def __init__(self) -> None:
        self._grader = WordProblems()

    def extract(self, example: Example, text: str, *, finished: bool) -> Extraction:
        return extract_answer(text, finished=finished)

    def check(self, example: Example, answer: str) -> tuple[Outcome, str]:
        verdict = self._grader.grade(example, f"\\boxed{{{answer}}}")
        return verdict.outcome, verdict.reason


def _gsm8k(card: TaskCard, data: Path | None) -> PublishedTask:
    def read() -> Iterator[Example]:
        yield from (problem.as_example() for problem in read_source("gsm8k")[0] if problem.split == "test")

    return PublishedTask(card, read, lambda example: f"{example.question}\n{_BOXED}", NumberRule())


TASKS = (
    TaskEntry(
        TaskCard(
            name="gsm8k",
            version="1",
            title="GSM8K: grade-school word problems",
            metric="accuracy",
            language="en",
            num_items=660,
            license="MIT",
            source="arXiv 2110.14168",
            shipped=True,
            how_to_get="",
            sampling=TaskSampling(0.0, 1.0, 2048, 1),
        ),
        _gsm8k,
    ),
)
