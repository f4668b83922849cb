"""Reads a chain of thought line by line: which lines are steps, which of them compute, and which one is the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tafkir.data.arithmetic import ExpressionError, evaluate, parse_expression

__all__ = ["OUTCOME_WORDS", "ChainLine", "LineKind", "read_chain"]

LineKind = Literal["mark", "right", "false", "final", "text"]

# An equation longer than this is not one that a reader would check, and deep brackets are not worth the stack.
MAX_EQUATION_LENGTH = 120

OUTCOME_WORDS = {
    "correct": "✓ correct",
    "wrong": "✗ wrong",
    "no_answer": "no answer found",
    "length": "cut off by the length limit",
    "timeout": "took the grader too long",
    "unjudged": "got no judgement of the form asked for",
    "error": "could not be graded",
    "graded": "graded, neither right nor wrong",
}


@dataclass(frozen=True, slots=True)
class ChainLine:
    """One line of an answer. `right` and `false` are equations that do and do not hold."""

    text: str
    kind: LineKind


def read_chain(text: str) -> list[ChainLine]:
    """Split an answer into lines and say what each one is."""
    return [ChainLine(line, _kind(line)) for line in text.strip("\n").split("\n")]


def _kind(line: str) -> LineKind:
    bare = line.strip()
    if bare in ("<think>", "</think>"):
        return "mark"
    if "\\boxed{" in bare:
        return "final"
    holds = _holds(bare)
    return "text" if holds is None else "right" if holds else "false"


def _holds(line: str) -> bool | None:
    """Whether both sides of the line's one equals sign have the same value; None where it is no equation."""
    left, equals, right = line.partition("=")
    if not equals or len(line) > MAX_EQUATION_LENGTH:
        return None
    try:
        return evaluate(parse_expression(left)) == evaluate(parse_expression(right))
    except ExpressionError:
        return None
