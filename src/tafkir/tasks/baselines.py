"""Two trivial ways to answer a word problem from its numbers alone: what a model has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from tafkir.data.arithmetic import format_number, parse_number
from tafkir.data.numbers import find_numbers
from tafkir.data.sources import Problem
from tafkir.records import Example

__all__ = ["SingleOperator", "accuracy", "fit_single_operator", "sum_of_numbers"]

Pair = Literal["first two", "last two", "extremes"]
_PAIRS: tuple[Pair, ...] = ("first two", "last two", "extremes")
_OPERATORS = ("+", "-", "*", "/")


def _numbers(question: str) -> list[Fraction]:
    return [mention.value for mention in find_numbers(question)]


@dataclass(frozen=True, slots=True)
class SingleOperator:
    """One operator on one pair of the question's numbers; the larger number comes first."""

    operator: str
    pair: Pair

    def __call__(self, question: str) -> str | None:
        """The answer, or None where the question has fewer than two numbers or the divisor is zero."""
        value = self.value(_numbers(question))
        return None if value is None else format_number(value)

    def value(self, numbers: Sequence[Fraction]) -> Fraction | None:
        if len(numbers) < 2:
            return None
        if self.pair == "extremes":
            numbers = sorted(numbers)
        chosen = {"first two": numbers[:2], "last two": numbers[-2:], "extremes": (numbers[0], numbers[-1])}[self.pair]
        small, large = sorted(chosen)
        if self.operator == "+":
            return large + small
        if self.operator == "-":
            return large - small
        if self.operator == "*":
            return large * small
        return large / small if small else None


def fit_single_operator(train: Sequence[Problem] | Sequence[Example]) -> SingleOperator:
    """The best of the twelve single operators on training problems (the first of equals).

    Raises:
        ValueError: a problem is held out.
    """
    if any(problem.split != "train" for problem in train):
        raise ValueError("the operator is chosen on training problems only")
    known = [(_numbers(problem.question), parse_number(problem.answer)) for problem in train]
    candidates = [SingleOperator(operator, pair) for operator in _OPERATORS for pair in _PAIRS]
    return max(candidates, key=lambda rule: sum(rule.value(numbers) == answer for numbers, answer in known))


def sum_of_numbers(question: str) -> str | None:
    """The sum of all numbers that the question mentions; None where there is none."""
    numbers = _numbers(question)
    return format_number(sum(numbers, Fraction(0))) if numbers else None


def accuracy(baseline: Callable[[str], str | None], problems: Sequence[Problem] | Sequence[Example]) -> float:
    """The share of problems whose answer the baseline hits exactly; 0 for no problems."""
    hits = 0
    for problem in problems:
        guess = baseline(problem.question)
        hits += guess is not None and parse_number(guess) == parse_number(problem.answer)
    return hits / len(problems) if problems else 0.0
