from __future__ import annotations

from fractions import Fraction

import pytest

from tafkir.data.numbers import find_numbers, words_for


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Twenty-five cats and 1,200 dogs.", [(25, "plain"), (1200, "plain")]),
        ("two hundred and five, or two or three", [(205, "plain"), (2, "plain"), (3, "plain")]),
        ("$12.50 for .5 of it.", [(Fraction(25, 2), "plain"), (Fraction(1, 2), "plain")]),
        (
            "3/4 of 2 1/2 cups, ½ cup",
            [(Fraction(3, 4), "fraction"), (Fraction(5, 2), "fraction"), (Fraction(1, 2), "fraction")],
        ),
        ("5% or 60 percent", [(5, "percent"), (60, "percent")]),
        ("at 7:30, at 8 am", [(7, "time"), (30, "time"), (8, "time")]),
        ("the 3rd of room A4, 2-3 days", [(3, "ordinal"), (4, "label"), (2, "label"), (3, "label")]),
        ("a 5-pound bag of 200g at $10/hour", [(5, "plain"), (200, "plain"), (10, "plain")]),
        ("three-quarters of one hundred thousand", [(3, "fraction"), (100_000, "plain")]),
        ("someone told a tenant", []),
        ("1/0", []),
    ],
)
def test_numbers_are_found_and_told_apart(text: str, expected: list[tuple[Fraction, str]]) -> None:
    assert [(mention.value, mention.kind) for mention in find_numbers(text)] == expected


def test_mentions_point_at_their_text() -> None:
    text = "He has thirty-one pens and 1,234 pins."
    assert [text[m.start : m.end] for m in find_numbers(text)] == ["thirty-one", "1,234"]


def test_words_read_back_as_their_number() -> None:
    for value in range(100):
        assert [mention.value for mention in find_numbers(words_for(value))] == [value]
