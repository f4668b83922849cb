"""Flaws of worked answers, for made-up preference pairs: a right solution in which one thing is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from random import Random

from tafkir.data.arithmetic import format_number, parse_number
from tafkir.data.chat import render_assistant, render_solution
from tafkir.data.sources import Problem, Step
from tafkir.recipe.rlhf import Flaw

__all__ = ["spoil"]

_OFFSETS = (-10, -3, -2, -1, 1, 2, 3, 10)


def spoil(problem: Problem, flaw: Flaw, random: Random) -> str:
    """The assistant's turn with the problem's solution and one flaw, which makes its answer wrong.

    Args:
        problem: with equations and a number as answer.
        random: which number the flaw takes.
    """
    reasoning, content = render_solution(_FLAWS[flaw](problem, random))
    if flaw == "answer":
        reasoning, _ = render_solution(problem)
    return render_assistant(content, reasoning)


def _wrong_result(problem: Problem, random: Random) -> Problem:
    wrong = format_number(_value(problem) + random.choice(_OFFSETS))
    steps = (*problem.steps[:-1], replace(problem.steps[-1], result=wrong))
    return replace(problem, steps=steps, answer=wrong)


def _wrong_answer(problem: Problem, random: Random) -> Problem:
    return replace(problem, answer=format_number(_value(problem) + random.choice(_OFFSETS)))


def _needless_step(problem: Problem, random: Random) -> Problem:
    number, value = random.randint(2, 9), _value(problem)
    operator, result = random.choice((("+", value + number), ("*", value * number)))
    answer = format_number(result)
    return replace(problem, steps=(*problem.steps, Step(f"{problem.answer}{operator}{number}", answer)), answer=answer)


def _value(problem: Problem) -> Fraction:
    value = parse_number(problem.answer)
    assert value is not None
    return value


_FLAWS: Mapping[Flaw, Callable[[Problem, Random], Problem]] = {
    "result": _wrong_result,
    "answer": _wrong_answer,
    "step": _needless_step,
}
