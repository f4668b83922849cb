"""Math word problems: the question as prompt, and a grader that compares numbers exactly."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from tafkir.data.sources import Problem
from tafkir.records import Example, Message, Outcome, Split, Verdict
from tafkir.tasks.answers import MAX_ANSWER_LENGTH, Extraction, extract_answer, is_unevaluated, read_value
from tafkir.tasks.symbolic import SymbolicVerifier, default_verifier

__all__ = ["WordProblems"]

# what only symbolic algebra can read: LaTeX commands, powers, roots, factorials, equations
_SYMBOLIC = frozenset("\\^√π!=*")


class WordProblems:
    """Word problems with a checkable answer.

    Args:
        problems: where `examples` come from; none are needed to grade.
        name: what reports call the task.
        verifier: compares what is no plain number; the shared one when None.
    """

    def __init__(
        self, problems: Sequence[Problem] = (), *, name: str = "wordmath", verifier: SymbolicVerifier | None = None
    ) -> None:
        self._name, self._verifier = name, verifier
        self._examples = [problem.as_example() for problem in problems]

    @property
    def name(self) -> str:
        return self._name

    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of one part, in the order of the problems."""
        return [example for example in self._examples if example.split == split]

    def prompt(self, example: Example) -> list[Message]:
        """The question alone: what to do with it is in the weights."""
        return [Message("user", example.question)]

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        """Judge the text of an assistant turn; reward 1 for a correct answer and 0 for anything else.

        `extract_answer` says where the answer is looked for. Numbers compare exactly: 0.50 is 1/2, 1,234 is 1234,
        12 apples is 12, 50% is 50 or 1/2. What is no plain number goes to math-verify, in a process with a time limit.
        """
        found = extract_answer(text, finished=finished)
        if found.text is None:
            return _verdict(example, "no_answer" if finished else "length", None, found.reason)
        if len(found.text) > MAX_ANSWER_LENGTH:
            reason = f"the answer has {len(found.text)} characters; at most {MAX_ANSWER_LENGTH} are read"
            return _verdict(example, "error", found.text[:40] + "…", reason)
        outcome, reason = self._compare(example.answer, found.text)
        return _verdict(example, outcome, found.text, _with_source(found, reason))

    def _compare(self, expected: str, answer: str) -> tuple[Outcome, str]:
        gold, value = read_value(expected), read_value(answer)
        if gold is not None and value is not None:
            return ("correct", "") if value.equals(gold.number) else ("wrong", _difference(gold.number, value.number))
        if gold is not None:
            if is_unevaluated(answer):
                return "wrong", "an expression that is not worked out"
            if not any(c in _SYMBOLIC for c in answer) or not any(c.isdigit() for c in answer):
                return "wrong", "not one plain number"
        elif answer.strip() == expected.strip():
            return "correct", ""
        result = (self._verifier or default_verifier()).compare(expected, answer)
        if result.equal is None:
            return "error", result.reason
        return ("correct", "") if result.equal else ("wrong", "not equal to the expected answer")


def _difference(expected: Fraction, value: Fraction) -> str:
    if value == -expected:
        return "the sign is wrong"
    return "not equal to the expected answer"


def _with_source(found: Extraction, reason: str) -> str:
    if found.source == "box":
        return reason
    taken = f"no box: taken from {found.source!r}"
    return f"{reason} ({taken})" if reason else taken


def _verdict(example: Example, outcome: Outcome, extracted: str | None, reason: str) -> Verdict:
    return Verdict(outcome, 1.0 if outcome == "correct" else 0.0, extracted, example.answer, reason)
