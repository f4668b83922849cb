from __future__ import annotations

import random

import pytest

from tafkir.data.chat import render_assistant, render_solution
from tafkir.data.sources import Problem, read_source
from tafkir.protocols import Task
from tafkir.records import Example, Message, Split
from tafkir.tasks.math import WordProblems

TASK = WordProblems()


def _example(answer: str) -> Example:
    return Example("id", "own", "test", "How many?", answer)


def _turn(answer: str) -> str:
    return f"<think>\n1+1=2\n</think>\n\\boxed{{{answer}}}"


@pytest.mark.parametrize(
    ("expected", "text", "outcome", "reason"),
    [
        ("72", _turn("72"), "correct", ""),
        ("1234", _turn("١٬٢٣٤ تفاحة"), "correct", ""),
        ("0.5", _turn("0.50"), "correct", ""),
        ("0.5", _turn("\\frac{1}{2}"), "correct", ""),
        ("1/3", _turn("\\frac{2}{6}"), "correct", ""),
        ("0", _turn("-0"), "correct", ""),
        ("50", _turn("50\\%"), "correct", ""),
        ("18", "So the answer is 18.", "correct", "taken from 'answer is'"),
        ("18", "2 cats\n#### 18", "correct", "taken from '####'"),
        ("18", "9 and 18", "correct", "taken from 'last number'"),
        ("5", _turn("5") + " no, \\boxed{7}", "wrong", "not equal"),
        ("5", _turn("-5"), "wrong", "sign"),
        ("0.333", _turn("1/3"), "wrong", "not equal"),
        ("72", _turn("7 2"), "wrong", "not one plain number"),
        ("72", _turn("1e999"), "wrong", "not one plain number"),
        ("72", _turn("NaN"), "wrong", "not one plain number"),
        ("102", _turn("10²"), "wrong", "not equal"),
        ("7", _turn("3+4"), "wrong", "not worked out"),
        ("24", _turn("48/2"), "wrong", "not worked out"),
        ("72", "9 and 18", "wrong", "taken from 'last number'"),
        ("72", "<think>\\boxed{72}</think>", "no_answer", "no number"),
        ("72", "<think>\\boxed{72}", "no_answer", "never ends"),
        ("72", _turn(""), "no_answer", "empty"),
        ("72", "</think>\\boxed{72", "no_answer", "never closed"),
        ("72", "", "no_answer", "no number"),
        ("72", _turn("9" * 100_000), "error", "at most 1000"),
        ("72", _turn("{" * 100_000 + "}" * 100_000), "error", "at most 1000"),
    ],
)
def test_golden_verdicts(expected: str, text: str, outcome: str, reason: str) -> None:
    verdict = TASK.grade(_example(expected), text)
    assert (verdict.outcome, verdict.expected) == (outcome, expected)
    assert verdict.reward == (1.0 if outcome == "correct" else 0.0) and verdict.correct == (outcome == "correct")
    assert reason in verdict.reason and bool(reason) == bool(verdict.reason)
    assert verdict.extracted is None or len(verdict.extracted) < 100


def test_a_text_cut_off_by_the_length_limit() -> None:
    assert TASK.grade(_example("72"), "<think>\n70+2=7", finished=False).outcome == "length"
    assert TASK.grade(_example("7"), "the answer is 7", finished=False).outcome == "length"
    assert TASK.grade(_example("72"), _turn("72") + "<|im", finished=False).outcome == "correct"
    assert TASK.grade(_example("72"), _turn("71") + " hm", finished=False).outcome == "wrong"


@pytest.mark.parametrize(
    ("expected", "answer", "outcome"),
    [
        ("4", "\\sqrt{16}", "correct"),
        ("8", "2^3", "correct"),
        ("500", "5 \\times 10^2", "correct"),
        ("9", "2^3", "wrong"),
        ("\\sqrt{2}", "2^{1/2}", "correct"),
        ("\\sqrt{2}", "\\sqrt{3}", "wrong"),
        ("x+1", "1+x", "correct"),
    ],
)
def test_what_is_symbolic_goes_to_math_verify(expected: str, answer: str, outcome: str) -> None:
    assert TASK.grade(_example(expected), _turn(answer)).outcome == outcome


def test_gold_solutions_pass_and_corrupted_ones_fail() -> None:
    problems, _ = read_source("svamp")
    rng = random.Random(0)
    for problem in problems:
        if problem.steps:
            reasoning, content = render_solution(problem)
            example = problem.as_example()
            assert TASK.grade(example, render_assistant(content, reasoning)).correct
            wrong = content.replace(problem.answer, str(int(problem.answer) + rng.choice((-10, -1, 1, 10))))
            assert TASK.grade(example, render_assistant(wrong, reasoning)).outcome == "wrong"
        assert TASK.grade(problem.as_example(), f"#### {problem.answer}").correct


def test_it_is_a_task_with_examples_by_part() -> None:
    parts: tuple[Split, ...] = ("train", "validation", "test")
    task: Task = WordProblems([Problem(part, "own", part, f"q {part}", "1") for part in parts], name="mine")
    assert task.name == "mine"
    for part in parts:
        (example,) = task.examples(part)
        assert example.id == part and task.prompt(example) == [Message("user", f"q {part}")]
