from __future__ import annotations

import re
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tafkir.data.arithmetic import Operation, evaluate, parse_expression
from tafkir.data.augment import augment, rename, renumber
from tafkir.data.corpus import Corpus
from tafkir.data.linking import link_numbers
from tafkir.data.names import FEMALE, MALE, NEUTRAL
from tafkir.data.numbers import find_numbers
from tafkir.data.sources import Problem, Step
from tafkir.recipe.schema import AugmentConfig

ALWAYS = AugmentConfig(renumber=1.0, rename=0.0)


def _problem(question: str, *equations: str) -> Problem:
    steps = tuple(Step(*equation.split("=")) for equation in equations)
    return Problem("p", "own", "train", question, steps[-1].result, steps)


def _check_truth(original: Problem, variant: Problem, max_number: int) -> None:
    assert len(variant.steps) == len(original.steps)
    results: set[Fraction] = set()
    stated = {mention.value for mention in find_numbers(variant.question)}
    before = {mention.value for mention in find_numbers(original.question)}
    earlier: set[Fraction] = set()
    for old, new in zip(original.steps, variant.steps, strict=True):
        expression = parse_expression(new.expression)
        assert evaluate(expression) == Fraction(new.result)
        assert isinstance(expression, Operation) and isinstance(expression.left, Fraction)
        was = parse_expression(old.expression)
        assert isinstance(was, Operation) and was.operator == expression.operator
        for now, then in ((expression.left, was.left), (expression.right, was.right)):
            # a number of the question stays one, and an earlier result stays one; what was neither does not change
            assert now in stated or now in results or now == then
            assert now == then or then in before or then in earlier
        assert Fraction(old.result) <= 0 or Fraction(new.result) > 0
        assert Fraction(old.result).denominator != 1 or Fraction(new.result).denominator == 1
        assert Fraction(new.result) <= max_number
        results.add(Fraction(new.result))
        earlier.add(Fraction(old.result))
    assert variant.answer == variant.steps[-1].result


@settings(max_examples=150, deadline=None)
@given(index=st.integers(0, 7064), seed=st.integers(0, 2**63), max_number=st.sampled_from([99, 999, 9999]))
def test_variants_stay_true(corpus: Corpus, index: int, seed: int, max_number: int) -> None:
    problem = corpus.train[index]
    template = link_numbers(problem)
    variant = renumber(template, Random(seed), max_number) if template else None
    if variant is not None:
        _check_truth(problem, variant, max_number)
        masked = [re.sub(r"[\d,]*\d|\b[Aa]n?\b", "#", q) for q in (problem.question, variant.question)]
        assert [w for w in masked[0].split() if w.isalpha() and len(w) > 9] == [
            w for w in masked[1].split() if w.isalpha() and len(w) > 9
        ]


def test_most_problems_can_be_renumbered(corpus: Corpus) -> None:
    for source, share in (("gsm8k", 0.6), ("svamp", 0.95)):
        problems = [problem for problem in corpus.train if problem.source == source][-500:]
        changed = sum(
            augment(problem, seed, ALWAYS).question != problem.question for seed, problem in enumerate(problems)
        )
        assert changed / len(problems) > share, source


def test_a_variant_is_a_pure_function_of_problem_and_seed(corpus: Corpus) -> None:
    config = AugmentConfig()
    first = [augment(problem, 7, config) for problem in corpus.train[:50]]
    assert first == [augment(problem, 7, config) for problem in corpus.train[:50]]
    assert first != [augment(problem, 8, config) for problem in corpus.train[:50]]


def test_held_out_problems_are_never_varied(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="only training problems"):
        augment(corpus.test[0], 0, AugmentConfig())


def test_numbers_change_together_and_keep_their_style() -> None:
    problem = _problem(
        "Ann has an 8-page album and nine pens. She buys 1,200 beads for 8 boxes.", "1200/8=150", "150-9=141"
    )
    template = link_numbers(problem)
    assert template is not None
    for seed in range(40):
        variant = renumber(template, Random(seed), 9999)
        assert variant is not None
        page, pens, beads, boxes = (mention.value for mention in find_numbers(variant.question))
        assert page == boxes and (beads / page) - pens == Fraction(variant.answer)
        article = re.search(r"has (an?) ([\d,]+)-page", variant.question)
        assert article is not None
        assert (article[1] == "an") == (article[2].startswith("8") or article[2] in ("11", "18"))
        assert re.search(r"and [a-z-]+ pens|and \d+ pens", variant.question)


@pytest.mark.parametrize(
    ("question", "equations", "kept"),
    [
        ("She works 5 days a week for 3 weeks at $20 a day.", ("5*3=15", "15*20=300"), "5 days"),
        ("He ate 25% of 80 figs.", ("80*0.25=20",), "25%"),
        ("It sold for twice the $2 price in 30 shops.", ("2*2=4", "4*30=120"), "$2 price"),
        ("In 2004 he bought 12 pens and 30 pins.", ("12+30=42",), "2004"),
        ("She ran from 7 am for 15 minutes and 20 minutes.", ("15+20=35",), "7 am"),
        ("He and his 3 friends share 25 sweets and 31 nuts.", ("25+31=56", "56/4=14"), "3 friends"),
        ("There are 5999 points to beat and he has 4200.", ("6000-4200=1800",), "5999"),
    ],
)
def test_what_may_mean_something_else_stays(question: str, equations: tuple[str, ...], kept: str) -> None:
    problem = _problem(question, *equations)
    template = link_numbers(problem)
    assert template is not None
    for seed in range(20):
        variant = renumber(template, Random(seed), 9999)
        assert variant is not None and kept in variant.question


@pytest.mark.parametrize(
    ("question", "equations"),
    [
        ("He has 5 pens and buys 7 more, so 12. Then 12 more.", ("5+7=12", "12+12=24")),  # which 12?
        ("She buys 10 kits for 4 boys, 3 each.", ("10+4=14", "3*13=39")),  # 14 leads nowhere, 13 comes from nowhere
        ("A rug of 6 by 8 costs 17.", ("37*17=629",)),  # nothing makes 37
        ("There are 4 and 9.", ("4+9-2=11",)),  # not a single operation
    ],
)
def test_what_cannot_be_tied_down_is_left_alone(question: str, equations: tuple[str, ...]) -> None:
    problem = _problem(question, *equations)
    assert link_numbers(problem) is None
    assert augment(problem, 3, ALWAYS) == problem


def test_nothing_above_the_limit_is_drawn_or_produced(corpus: Corpus) -> None:
    config = AugmentConfig(renumber=1.0, rename=0.0, max_number=99)
    for seed, problem in enumerate(corpus.train[:150]):
        variant = augment(problem, seed, config)
        if variant.question != problem.question:
            assert all(Fraction(step.result) <= 99 for step in variant.steps)


def test_people_are_renamed_consistently_with_their_pronouns() -> None:
    problem = _problem("Tom’s sister Mary has 3 pens. Tom has 4. May Tom, Alex and Mary's mom share?", "3+4=7")
    for seed in range(30):
        names = re.findall(r"\b[A-Z][a-z]+\b", rename(problem, Random(seed)).question)
        tom, mary, tom_again, may, tom_thrice, alex, mary_again = names
        assert tom == tom_again == tom_thrice in MALE - {"Tom"}
        assert mary == mary_again in FEMALE - {"Mary"}
        assert may == "May" and alex in NEUTRAL - {"Alex"}


def test_a_name_also_written_small_is_left_alone() -> None:
    problem = _problem("Jill has 3 pens. If jill gets 4 more?", "3+4=7")
    assert rename(problem, Random(0)) == problem
