from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tafkir.errors import DataError
from tafkir.protocols import Task
from tafkir.recipe.seeds import derive_seed
from tafkir.tasks.needle import FILLER, NAMES, NUMBERS, Needles, make_haystack


@given(
    seed=st.integers(0, 2**40),
    num_words=st.integers(2, 90),
    share=st.floats(0, 1),
    depth=st.none() | st.floats(0, 1),
)
def test_a_haystack_holds_its_needles_and_nothing_else(
    seed: int, num_words: int, share: float, depth: float | None
) -> None:
    num_needles = max(1, min(len(NAMES), int(share * num_words / 2)))
    haystack = make_haystack(seed, num_words=num_words, num_needles=num_needles, depth=depth)
    words = haystack.words
    assert len(words) == num_words
    found = [(a[:-1], b[:-1]) for a, b in pairwise(words) if a.endswith(":") and b.endswith(".")]
    assert tuple(found) == haystack.needles and len(found) == num_needles
    assert len({name for name, _ in found}) == len({number for _, number in found}) == num_needles
    assert sum(word in FILLER for word in words) == num_words - 2 * num_needles
    assert (haystack.name, haystack.number) == found[haystack.asked]
    assert haystack == make_haystack(seed, num_words=num_words, num_needles=num_needles, depth=depth)
    if depth is not None:
        before = words.index(f"{haystack.name}:") - haystack.asked  # in items, of which a needle is one
        assert abs(before - depth * (num_words - num_needles - 1)) <= 0.5


def test_words_names_and_numbers_do_not_mix() -> None:
    words = (*FILLER, *NAMES, *NUMBERS)
    assert len(set(words)) == len(words)
    assert all(word.islower() for word in FILLER) and all(number.isdecimal() for number in NUMBERS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_haystack(0, num_words=7, num_needles=4), "4 needles do not fit into 7 words"),
        (lambda: make_haystack(0, num_words=99, num_needles=0), "1 to 32"),
        (lambda: make_haystack(0, num_words=99, num_needles=33), "1 to 32"),
        (lambda: make_haystack(0, num_words=99, num_needles=1, depth=1.5), "depth 1.5"),
        (lambda: Needles([100], [50.0]), "depth 50.0"),
        (lambda: Needles([3], measure=len), "do not fit"),
    ],
)
def test_what_cannot_be_hidden_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_every_length_has_every_depth() -> None:
    task: Task = Needles([20, 40], [0.0, 0.5, 1.0], samples=2, num_needles=3)
    examples = task.examples("test")
    assert task.name == "needle" and len(examples) == 12 == len({example.id for example in examples})
    assert task.examples("train") == []
    assert [example.source for example in examples] == ["20"] * 6 + ["40"] * 6
    for example in examples:
        text, _, question = example.question.partition("\n\n")
        words = text.split()
        assert len(words) == example.extra["length"]
        (name,) = [word[:-1] for word in words if word.endswith(":") and word[:-1] not in example.extra["others"]]
        assert words[words.index(f"{name}:") + 1] == f"{example.answer}."
        assert name in question and task.prompt(example)[0].content == example.question
    at_the_end = [example for example in examples if example.extra["depth"] == 1.0]
    assert all(example.question.partition("\n\n")[0].endswith(f" {example.answer}.") for example in at_the_end)
    assert examples == Needles([20, 40], [0.0, 0.5, 1.0], samples=2, num_needles=3).examples("test")
    assert examples != Needles([20, 40], [0.0, 0.5, 1.0], samples=2, num_needles=3, seed=1).examples("test")


@pytest.mark.parametrize("length", [120, 1000, 5000])
def test_lengths_may_be_counted_in_tokens(length: int) -> None:
    examples = Needles([length], samples=3, measure=len).examples("test")  # characters stand in for tokens
    texts = [example.question.partition("\n\n")[0] for example in examples]
    assert all(0 <= length - len(text) <= max(20, 0.03 * length) for text in texts)


@pytest.mark.parametrize(
    ("answer", "outcome", "reason"),
    [
        ("{right}.", "correct", "last number"),
        ("<think>\nlooking\n</think>\n\\boxed{{{right}}}", "correct", ""),
        ("\\boxed{{{other}}}", "wrong", "the number of {name}"),
        ("\\boxed{{7}}", "wrong", "not equal"),
        ("I do not know", "no_answer", "no number"),
    ],
)
def test_the_grader_knows_whose_number_it_was(answer: str, outcome: str, reason: str) -> None:
    task = Needles([30], [0.5], samples=1)
    (example,) = task.examples("test")
    name, other = next(iter(example.extra["others"].items()))
    verdict = task.grade(example, answer.format(right=example.answer, other=other))
    assert (verdict.outcome, verdict.correct) == (outcome, outcome == "correct")
    assert reason.format(name=name) in verdict.reason


def test_examples_survive_json() -> None:
    (example,) = Needles([30], [0.5], samples=1).examples("test")
    assert json.loads(json.dumps(dict(example.extra))) == example.extra


def test_a_task_draws_unrelated_haystacks() -> None:
    examples = Needles([50], [0.0, 1.0], samples=20).examples("test")
    assert len({example.question for example in examples}) == 40
    assert derive_seed(0, "needle 50 0.0", 0) != derive_seed(0, "needle 50 1.0", 0)
