"""ARC tasks for any model: demonstrations and a test input in text, and one grader for the grid that comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tafkir.data.puzzles.arc import ArcGrid, ArcTask
from tafkir.data.puzzles.arc_sets import ArcSets
from tafkir.data.puzzles.format import PuzzleFormat
from tafkir.records import Example, Message, Outcome, Split, Verdict
from tafkir.tasks.answers import extract_text
from tafkir.tasks.puzzles.grids import GRIDS, ask_grids

__all__ = ["ArcSetTask"]


class ArcSetTask:
    """The test inputs of a recipe's held-out ARC tasks, one example each.

    Args:
        name: what reports call the task.
        sets: the tasks by part.
    """

    def __init__(self, name: str, sets: ArcSets) -> None:
        self._name, self.sets = name, sets
        self._tasks = {forms.task.id: forms.task for part in sets.held_out.values() for forms in part}

    @property
    def name(self) -> str:
        return self._name

    @property
    def format(self) -> PuzzleFormat:
        """The canvas of recursive models."""
        return self.sets.format

    def examples(self, split: Split) -> Sequence[Example]:
        """The test inputs whose outputs count; none in the training part, whose pairs are demonstrations."""
        return [
            self._example(split, forms.task, number)
            for forms in self.sets.held_out.get(split, ())
            for number in forms.scored
        ]

    def tasks(self, examples: Sequence[Example]) -> list[ArcTask]:
        """The tasks that examples come from, each once."""
        return list({(found := self._tasks[example.extra["task"]]).id: found for example in examples}.values())

    def prompt(self, example: Example) -> list[Message]:
        """The demonstrations and the input, which say themselves how to answer."""
        return [Message("user", example.question)]

    def write(self, answer: ArcGrid | None) -> str:
        """A grid as the text of an assistant turn; None is no answer."""
        return "" if answer is None else f"\\boxed{{{_text(answer)}}}"

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        """Reward 1 for the right grid, whatever stands between its cells; rows are lines, or separated by `;`."""
        found = extract_text(text, finished=finished)
        if found.text is None:
            return _verdict(example, "no_answer" if finished else "length", None, found.reason)
        data: Mapping[str, object] = {"output": example.extra["output"]}
        outcome, reason = GRIDS.check(data, found.text)
        return _verdict(example, outcome, found.text, reason)

    def _example(self, split: Split, task: ArcTask, number: int) -> Example:
        pairs = [(_text(pair.input), _text(pair.output)) for pair in task.train if pair.output is not None]
        test = task.test[number]
        assert test.output is not None
        extra = {"task": task.id, "number": number, "output": test.output.tolist()}
        question = ask_grids(pairs, _text(test.input))
        return Example(f"{self.name}/{task.id}/{number}", self.name, split, question, _text(test.output), extra)


def _text(grid: ArcGrid) -> str:
    return "\n".join("".join(map(str, row)) for row in grid.tolist())


def _verdict(example: Example, outcome: Outcome, extracted: str | None, reason: str) -> Verdict:
    return Verdict(outcome, 1.0 if outcome == "correct" else 0.0, extracted, example.answer, reason)
