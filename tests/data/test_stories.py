"""Made-up problems: true, pure, in bounds, and free of held-out wording."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest

from tafkir.data.arithmetic import evaluate, parse_expression
from tafkir.data.contamination import find_overlaps
from tafkir.data.corpus import load_corpus
from tafkir.data.crowded import make_crowded_story
from tafkir.data.numbers import find_numbers
from tafkir.data.sources import Problem
from tafkir.data.stories import make_story
from tafkir.recipe.schema import DataConfig

MAKERS = pytest.mark.parametrize("make", [make_story, make_crowded_story])
Maker = Callable[[int], Problem]


@MAKERS
def test_every_step_is_true_and_the_last_one_answers(make: Maker) -> None:
    for seed in range(2000):
        problem = make(seed)
        for step in problem.steps:
            value = evaluate(parse_expression(step.expression))
            assert value == Fraction(step.result), problem
            assert value.denominator == 1, problem
            assert value >= 0, problem
        assert problem.answer == problem.steps[-1].result
        assert problem.split == "train"


def test_operands_come_from_the_question_or_from_an_earlier_step() -> None:
    for seed in range(500):
        problem = make_crowded_story(seed)
        known = {str(mention.value) for mention in find_numbers(problem.question)} | {"2"}
        for step in problem.steps:
            left, right = (part for sign in "+-*/" for part in _split(step.expression, sign))
            assert left in known, problem
            assert right in known, problem
            known.add(step.result)


def _split(expression: str, sign: str) -> list[str]:
    return expression.split(sign) if sign in expression else []


@MAKERS
def test_a_story_is_a_function_of_its_seed(make: Maker) -> None:
    assert [make(seed) for seed in range(20)] == [make(seed) for seed in range(20)]
    assert len({make(seed).question for seed in range(500)}) > 490


def test_crowded_stories_hold_more_numbers_than_they_use() -> None:
    problems = [make_crowded_story(seed) for seed in range(500)]
    idle = [p for p in problems if len(find_numbers(p.question)) > len(p.steps) + 1]
    assert len(idle) > 300


@MAKERS
def test_no_story_repeats_held_out_wording(make: Maker) -> None:
    corpus = load_corpus(DataConfig())
    overlaps = find_overlaps([make(seed) for seed in range(3000)], [*corpus.validation, *corpus.test])
    assert not overlaps
