"""The template language of made-up problems, and every template that ships."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest

from tafkir.data.contamination import find_overlaps
from tafkir.data.corpus import load_corpus
from tafkir.data.stories import Template, make_story, parse_templates, read_templates, tell
from tafkir.errors import DataError
from tafkir.recipe.schema import DataConfig

BOXES = """\
# A comment.
let p = b*k
range b 2..5
set x = apple/apples|pear/pears
{N} has {p} {x} and {c} pens.
? {M} is {z} years old.
{He} puts {b} {x} into each [box|bag].
>> p/b :: How many does {he} fill?
>> p+c; r0-b :: How many things are outside of one {x.1:tin|pot}?
"""
# Numbers that a question may count on without saying them: doubles, weeks, dozens, percent, change of units, ...
UNTOLD = {
    str(number) for number in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 20, 24, 25, 30, 36, 40, 50, 52, 60, 75, 80, 90, 100, 365)
}


def test_a_template_is_told_with_numbers_that_fit() -> None:
    (template,) = parse_templates(BOXES, "boxes.txt")
    questions = set()
    for seed in range(200):
        problem = tell(template, random.Random(seed), "x")
        assert not re.search(r"[][{}|]", problem.question)
        questions.add(len(problem.steps))
        if len(problem.steps) == 1:
            whole, each = map(int, problem.steps[0].expression.split("/"))
            assert whole % each == 0
            assert 2 <= each <= 5
            assert f"has {whole} apples" in problem.question or f"has {whole} pears" in problem.question
    assert questions == {1, 2}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{N} has {a}.\n>> a+b+c :: How many?", "one operation"),
        ("{N} has {a}.", "needs a question"),
        ("{N} has {a}.\n>> a+r0 :: How many?", "before it is known"),
        ("{N} has {a}.\n>> a+N :: How many?", "is a word"),
        ("{N} has [{a}.\n>> a+b :: How many?", "brackets do not match"),
        ("let a = b+1\nlet b = a+1\n{N} has {a}.\n>> a+b :: How many?", "derive from each other"),
    ],
)
def test_a_faulty_template_is_refused_with_its_place(text: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        parse_templates(f"# first line\n{text}", "mine.txt")
    assert "mine.txt:" in str(caught.value)


def test_numbers_that_cannot_fit_are_an_error_and_not_a_loop() -> None:
    (template,) = parse_templates("range a 5..5\nrange b 9..9\nA {a} B {b}.\n>> a-b :: How many?", "mine.txt")
    with pytest.raises(DataError, match="no numbers fit"):
        tell(template, random.Random(0), "x")


def _each_question(template: Template) -> list[Template]:
    return [replace(template, questions=(question,)) for question in template.questions]


def test_every_question_of_every_template_can_be_told_and_says_its_numbers() -> None:
    for template in read_templates():
        for one in _each_question(template):
            for seed in range(3):
                problem = tell(one, random.Random(seed), "x")
                assert problem.question.endswith("?"), (template.where, problem.question)
                assert problem.question.isascii(), template.where
                known = set(re.findall(r"\d+", problem.question)) | UNTOLD
                for step in problem.steps:
                    assert set(re.split(r"[-+*/]", step.expression)) <= known, (template.where, problem)
                    known.add(step.result)


def test_no_template_repeats_held_out_wording() -> None:
    corpus = load_corpus(DataConfig())
    told = [
        tell(one, random.Random(seed), template.where)
        for template in read_templates()
        for one in _each_question(template)
        for seed in range(2)
    ]
    assert not find_overlaps(told, [*corpus.validation, *corpus.test])


def test_questions_about_one_body_have_different_answers() -> None:
    with_choice = [template for template in read_templates() if len(template.questions) > 1]
    assert len(with_choice) > 0.9 * len(read_templates())
    told = {make_story(seed).question for seed in range(2000)}
    assert len(told) > 1990
