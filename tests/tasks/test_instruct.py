"""Constraints that a program verifies: kept, broken and said why, in English and Arabic; and the letter of a choice."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tafkir.records import Example
from tafkir.tasks.choice import LETTERS, MULTIPLE_CHOICE, make_choice, read_choice
from tafkir.tasks.constraints import CONSTRAINTS, count_sentences, has_word, words
from tafkir.tasks.generated import GeneratedTask
from tafkir.tasks.instruct import INSTRUCTIONS, describe, make_instructions

KEPT_AND_BROKEN: list[tuple[dict[str, Any], list[str], dict[str, str]]] = [
    (
        {"kind": "min_words", "n": 3},
        ["one two-fold three", "كَتَبَ الوَلَدُ دَرْسَهُ"],
        {"it's two": "2 words, at least 3 are asked for"},
    ),
    (
        {"kind": "max_words", "n": 2},
        ["well-known it’s", "", "كتـــاب جديد"],
        {"a b c": "3 words, at most 2 are asked for"},
    ),
    (
        {"kind": "sentences", "n": 2},
        ["It costs 3.5 dinars. Really?!", "One... two", "ما هذا؟ هذا كتاب.", '"Yes." No!'],
        {"One.": "1 sentences instead of 2", "": "0 sentences instead of 2", "a. b. c": "3 sentences instead of 2"},
    ),
    ({"kind": "paragraphs", "n": 2}, ["a\nb\n\nc", "\n\na\n \n\t\nb\n"], {"a\nb": "1 paragraphs instead of 2"}),
    (
        {"kind": "keywords", "words": ["كتاب", "Sea"]},
        ["هذا الكِتَابُ sea", "SEA! والكتاب", "sea بكتاب"],
        {"the seaside كتاب": "'Sea' is missing", "sea كتابة": "'كتاب' is missing", "sea مكتاب": "'كتاب' is missing"},
    ),
    ({"kind": "keywords", "words": ["أمل"]}, ["فيه امل", "بأمل"], {"عمل": "'أمل' is missing"}),
    ({"kind": "forbidden_words", "words": ["rain"]}, ["train", "rainy"], {"The Rain.": "'rain' is forbidden"}),
    (
        {"kind": "word_frequency", "word": "قمر", "n": 2},
        ["قمر والقمر"],
        {"قمر": "1 times 'قمر', at least 2 are asked for"},
    ),
    (
        {"kind": "letter_frequency", "letter": "a", "n": 3},
        ["Banana"],
        {"bana": "2 times the letter 'a', at least 3 are asked for"},
    ),
    (
        {"kind": "bullets", "n": 2},
        ["Here:\n- a\n  * b", "• أ\n• ب"],
        {"- a": "1 bullet points instead of 2", "-a\n-b": "0 bullet points instead of 2"},
    ),
    ({"kind": "highlights", "n": 1}, ["so *very* good"], {"so * very": "0 highlights, at least 1 are asked for"}),
    ({"kind": "placeholders", "n": 2}, ["[name] and [الاسم]"], {"[] [x]": "1 placeholders, at least 2 are asked for"}),
    ({"kind": "title"}, ["<<A title>>\ntext"], {"<A title>": "there is no title in << >>"}),
    (
        {"kind": "json"},
        ['{"a": 1}', '```json\n["نعم"]\n```'],
        {"{a: 1}": "not valid JSON", "3": "neither a JSON object nor an array", "[" * 7000: "not valid JSON"},
    ),
    (
        {"kind": "language", "language": "ar"},
        ["هذا نص عربي"],
        {"hello": "0 % of the letters are Arabic", "123": "0 % of the letters are Arabic"},
    ),
    ({"kind": "language", "language": "en"}, ["Hello, world 3"], {"hello مرحبا": "50 % of the letters are English"}),
    (
        {"kind": "case", "case": "lower"},
        ["all lower 3"],
        {"Not": "not all letters are lower case", "سلام": "there are no letters that have a case"},
    ),
    ({"kind": "case", "case": "upper"}, ["ALL 3"], {"No": "not all letters are upper case"}),
    ({"kind": "no_commas"}, ["a; b"], {"a, b": "there is a comma", "أ، ب": "there is a comma"}),
    ({"kind": "no_digits"}, ["two"], {"2": "there is a digit", "٢": "there is a digit"}),
    (
        {"kind": "quoted"},
        ['"Yes"', "«نعم»", "“x”"],
        {"Yes": "not in quotation marks", '"Yes': "not in quotation marks"},
    ),
    (
        {"kind": "start", "phrase": "Dear reader"},
        ["dear  Reader, hello", '"Dear reader'],
        {"Reader": "no 'Dear reader' at its start"},
    ),
    ({"kind": "end", "phrase": "هذا كل شيء."}, ["كتبت. هذا كُلُّ شيء."], {"هذا": "it does not end with 'هذا كل شيء.'"}),
    ({"kind": "postscript"}, ["Text\nP.S. more", "نص\nملاحظة: هنا"], {"P.S. only": "there is no postscript"}),
]


@pytest.mark.parametrize("case", KEPT_AND_BROKEN, ids=lambda case: case[0]["kind"])
def test_a_constraint_is_kept_or_broken_and_said_why(case: tuple[dict[str, Any], list[str], dict[str, str]]) -> None:
    ask, kept, broken = case
    for text in kept:
        assert INSTRUCTIONS.check({"constraints": [ask]}, text) == ("correct", ""), text
    for text, reason in broken.items():
        assert INSTRUCTIONS.check({"constraints": [ask]}, text) == ("wrong", f"{ask['kind']}: {reason}")
    for language in ("en", "ar"):
        assert "{" not in describe(ask, language)


def test_every_constraint_is_tested() -> None:
    assert {ask["kind"] for ask, _, _ in KEPT_AND_BROKEN} == set(CONSTRAINTS)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**60), level=st.integers(1, 4))
def test_what_is_asked_can_be_done(seed: int, level: int) -> None:
    puzzle = make_instructions(seed, level)
    assert puzzle == make_instructions(seed, level)
    assert INSTRUCTIONS.check(puzzle.data, puzzle.answer) == ("correct", "")
    asks = puzzle.data["constraints"]
    assert len({ask["kind"] for ask in asks}) == len(asks) == level
    for ask in asks:
        for word in ask.get("words", ()):
            assert word in puzzle.question
        if "n" in ask:
            assert str(ask["n"]) in puzzle.question


def test_every_kind_is_asked_for() -> None:
    asked = {ask["kind"] for seed in range(120) for ask in make_instructions(seed, 3).data["constraints"]}
    assert asked == set(CONSTRAINTS)


def test_all_broken_constraints_are_named() -> None:
    asks = [{"kind": "no_digits"}, {"kind": "title"}, {"kind": "no_commas"}]
    example = Example("i", "instructions/3", "test", "q", "", {"data": {"constraints": asks}})
    verdict = GeneratedTask(INSTRUCTIONS).grade(example, "<think>1, 2</think>\n3 apples")
    assert (verdict.outcome, verdict.reward) == ("wrong", 0.0)
    assert verdict.reason == "no_digits: there is a digit; title: there is no title in << >>"


def test_words_and_sentences() -> None:
    assert words("Don't stop-me: ٣ تُفّاحات!") == ["Don't", "stop-me", "٣", "تفاحات"]
    assert [count_sentences(text) for text in ("", "...", "a", "Mr X. came", "e.g. this")] == [0, 1, 1, 2, 2]
    assert [has_word("شمس", text) for text in ("الشمس", "للشمس", "فالشمس", "مشمس", "شمسي")] == [1, 1, 1, 0, 0]


def test_hostile_text_costs_no_time() -> None:
    asks = [ask for ask, _, _ in KEPT_AND_BROKEN]
    example = Example("i", "instructions/1", "test", "q", "", {"data": {"constraints": asks}})
    began = time.process_time()
    for unit in (
        ".",
        "!",
        "\n",
        "\n ",
        " ",
        "*",
        "[",
        "<",
        "- ",
        "a'",
        "-",
        "```\n",
        "\u064b",
        "و",
        '"',
        "{",
        "\ud800",
    ):
        assert GeneratedTask(INSTRUCTIONS).grade(example, (unit * 8000)[:8000]).outcome != "correct"
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1),
        ("(b)", 1),
        ("b.", 1),
        ("**B**", 1),
        ("ب", 1),
        ("أ", 0),
        ("ا", 0),
        ("(ج)", 2),
        ("هـ", None),
        ("B) 12", 1),
        ("B) 11", None),
        ("12", 1),
        ("١٢", 1),
        ("The answer is C.", 2),
        ("Answer: (D)", 3),
        ("الجواب هو ب", 1),
        ("الإجابة: د", 3),
        ("first the answer is A, no, the answer is B", 1),
        ("A or B", None),
        ("H", None),
        ("answer is Apple", None),
        ("", None),
        ("Because", None),
    ],
)
def test_the_letter_of_a_choice(text: str, index: int | None) -> None:
    assert read_choice(text, ["11", "12", "13", "14"]) == index


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**60), level=st.integers(1, 3))
def test_exactly_one_option_is_right(seed: int, level: int) -> None:
    puzzle = make_choice(seed, level)
    language = "ar" if "؟" in puzzle.question else "en"
    options, right = puzzle.data["options"], puzzle.data["right"]
    assert len(set(options)) == 4 and puzzle.answer == LETTERS[language][right]
    outcomes = [MULTIPLE_CHOICE.check(puzzle.data, letter)[0] for letter in LETTERS[language][:4]]
    assert outcomes == ["correct" if index == right else "wrong" for index in range(4)]
    shown, _, value = puzzle.reasoning.rpartition(" = ")
    assert eval(shown.replace("×", "*")) == int(value) == int(options[right])
    assert all(option in puzzle.question for option in options)
    assert MULTIPLE_CHOICE.check(puzzle.data, "none of them") == ("no_answer", "no option is named")
