from __future__ import annotations

import pytest

from tafkir.data.sources import Problem
from tafkir.tasks.baselines import SingleOperator, accuracy, fit_single_operator, sum_of_numbers

QUESTION = "Tom has 3 bags of twelve pears and eats 4. How many?"


@pytest.mark.parametrize(
    ("operator", "pair", "answer"),
    [
        ("+", "first two", "15"),
        ("-", "first two", "9"),
        ("*", "last two", "48"),
        ("/", "last two", "3"),
        ("/", "first two", "4"),
        ("-", "extremes", "9"),
    ],
)
def test_one_operator_on_two_numbers(operator: str, pair: str, answer: str) -> None:
    assert SingleOperator(operator, pair)(QUESTION) == answer  # type: ignore[arg-type]


def test_questions_that_leave_nothing_to_compute() -> None:
    assert SingleOperator("+", "first two")("He has 3.") is None
    assert SingleOperator("/", "extremes")("He has 3 and 0.") is None
    assert sum_of_numbers("Why?") is None
    assert sum_of_numbers(QUESTION) == "19"


def test_the_operator_is_fitted_on_training_problems_alone() -> None:
    train = [Problem(str(i), "own", "train", f"{i + 5} and {i} and 2?", str(5)) for i in range(3, 9)]
    rule = fit_single_operator(train)
    assert (rule.operator, rule.pair) == ("-", "first two")
    test = [Problem("t", "own", "test", "90 and 9?", "81"), Problem("u", "own", "test", "9?", "9")]
    assert accuracy(rule, test) == 0.5 and accuracy(sum_of_numbers, test) == 0.5 and accuracy(rule, []) == 0.0
    with pytest.raises(ValueError, match="training problems only"):
        fit_single_operator(test)
