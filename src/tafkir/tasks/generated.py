"""Generated tasks: problems that are pure functions of (seed, level), each with an exact verifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from tafkir.data.split import generated_split
from tafkir.errors import DataError
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Example, Message, Outcome, Split, Verdict
from tafkir.tasks.answers import MAX_ANSWER_LENGTH, extract_text

__all__ = ["RIGHT", "Check", "GeneratedTask", "Puzzle", "PuzzleKind", "generate"]

Check = tuple[Outcome, str]
"""What a verifier says: the outcome, and why it is not "correct"."""

RIGHT: Check = ("correct", "")

_MAX_ATTEMPTS = 2_000


@dataclass(frozen=True, slots=True)
class Puzzle:
    """One generated problem.

    Attributes:
        question: the prompt, which says how to answer.
        answer: a reference answer, as it stands in the box; other answers may be as right.
        reasoning: the way to it, one step a line, for supervised training; may be empty.
        data: what the verifier needs, as JSON has it.
    """

    question: str
    answer: str
    reasoning: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PuzzleKind:
    """A generator with its verifier.

    Attributes:
        name: what recipes call it; the recipe knows how many levels it has (`tafkir.recipe.tasks.LEVELS`).
        make: the puzzle of (seed, level), level 1 being the easiest.
        check: judges an answer by `Puzzle.data`; takes linear time in the answer, so needs no clock of its own.
        reads: whether the verifier sees what stands in the last box, or the whole answer after the chain of thought.
        max_length: characters of the longest answer that is read.
    """

    name: str
    make: Callable[[int, int], Puzzle]
    check: Callable[[Mapping[str, Any], str], Check]
    reads: Literal["box", "text"] = "box"
    max_length: int = MAX_ANSWER_LENGTH


def generate(kind: PuzzleKind, seed: int, level: int, split: Split = "train") -> Example:
    """The example of (seed, level) in one part: no question is ever in two parts.

    `source` is `<kind>/<level>`, so that scores come out by level.

    Raises:
        DataError: the kind makes no question of that part.
    """
    for attempt in range(_MAX_ATTEMPTS):
        puzzle = kind.make(derive_seed(seed, kind.name, level, attempt), level)
        if generated_split(puzzle.question) == split:
            extra = {"level": level, "reasoning": puzzle.reasoning, "data": puzzle.data}
            source = f"{kind.name}/{level}"
            return Example(f"{kind.name}-{level}-{seed}", source, split, puzzle.question, puzzle.answer, extra)
    raise DataError(f"{kind.name} makes no {split} question at level {level}", where=kind.name)


class GeneratedTask:
    """A generated kind as a task.

    Args:
        kind: generator and verifier.
        levels: of the examples that `examples` gives.
        samples: examples for each level.
        seed: the same seed gives the same examples.
    """

    def __init__(self, kind: PuzzleKind, *, levels: Sequence[int] = (1,), samples: int = 100, seed: int = 0) -> None:
        self.kind, self.levels, self.samples, self.seed = kind, tuple(levels), samples, seed

    @property
    def name(self) -> str:
        return self.kind.name

    def examples(self, split: Split) -> Sequence[Example]:
        """`samples` different questions for each level, fewer where there are no more."""
        return [example for level in self.levels for example in self._distinct(level, split)]

    def example(self, seed: int, level: int, split: Split = "train") -> Example:
        """The example of (seed, level) in one part."""
        return generate(self.kind, seed, level, split)

    def prompt(self, example: Example) -> list[Message]:
        """The question, which says itself how to answer."""
        return [Message("user", example.question)]

    def solution(self, example: Example) -> tuple[str, str]:
        """Chain of thought and final answer, for supervised training; raises KeyError for an example of others."""
        content = example.answer if self.kind.reads == "text" else f"\\boxed{{{example.answer}}}"
        return str(example.extra["reasoning"]), content

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        """Reward 1 for every answer that keeps the rules, whatever the reference answer is; 0 with a reason else."""
        found = extract_text(text, finished=finished, boxed=self.kind.reads == "box")
        if found.text is None:
            return _verdict(example, "no_answer" if finished else "length", None, found.reason)
        if len(found.text) > self.kind.max_length:
            reason = f"the answer has {len(found.text)} characters; at most {self.kind.max_length} are read"
            return _verdict(example, "wrong", found.text[:40] + "…", reason)
        outcome, reason = self.kind.check(example.extra["data"], found.text)
        return _verdict(example, outcome, found.text, reason)

    def _distinct(self, level: int, split: Split) -> Iterator[Example]:
        seen: set[str] = set()
        misses = 0
        for index in count():
            if len(seen) == self.samples or misses == 50:
                return
            example = self.example(derive_seed(self.seed, split, index), level, split)
            if example.question in seen:
                misses += 1
                continue
            misses = 0
            seen.add(example.question)
            yield example


def _verdict(example: Example, outcome: Outcome, extracted: str | None, reason: str) -> Verdict:
    return Verdict(outcome, 1.0 if outcome == "correct" else 0.0, extracted, example.answer, reason)
