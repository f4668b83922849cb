"""Multiple choice, with Latin or Arabic letters: a grader for the letter, and a generator of small sums."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from tafkir.recipe.seeds import derive_seed
from tafkir.tasks.answers import normalize
from tafkir.tasks.generated import RIGHT, Check, Puzzle, PuzzleKind

__all__ = ["LETTERS", "MULTIPLE_CHOICE", "check", "read_choice"]

LETTERS = {"en": "ABCDEFGH", "ar": "أبجدهوزح"}
"""The letters of the options, by language: Arabic has the order of the abjad."""

_INDEX = {letter: index for letters in LETTERS.values() for index, letter in enumerate(letters)}
_INDEX |= {letter.lower(): index for letter, index in list(_INDEX.items())}
_INDEX |= {"ا": 0, "إ": 0, "آ": 0}
_LETTER = f"[{''.join(_INDEX)}]"
_ALONE = re.compile(rf"[(\[]?({_LETTER})\u0640?[)\].:،]*")
_BEFORE_TEXT = re.compile(rf"[(\[]?({_LETTER})\u0640?[)\].:-]\s*(\S.*)")
_STATED = re.compile(
    rf"(?:answer|option|choice|الجواب|الإجابة|الاجابة|الخيار)(?:\s+(?:is|هو|هي))?\s*[:=]?\s*[(\[*\"]*({_LETTER})(?!\w)",
    re.IGNORECASE,
)


def read_choice(text: str, options: Sequence[str]) -> int | None:
    """Which option a text names: by its letter, by letter and text, by "answer is B" or by its text alone.

    None where it names none, or a letter with the text of another option.
    """
    text = (
        "".join(c for c in unicodedata.normalize("NFC", text) if unicodedata.category(c) != "Mn").strip().strip("*$ ")
    )
    known = {_plain(option): index for index, option in enumerate(options)}
    alone = _ALONE.fullmatch(text)
    if alone:
        return _within(_INDEX[alone[1]], options)
    if _plain(text) in known:
        return known[_plain(text)]
    both = _BEFORE_TEXT.fullmatch(text)
    if both and "\n" not in text:
        index = _INDEX[both[1]]
        return _within(index, options) if known.get(_plain(both[2]), index) == index else None
    stated = _STATED.findall(text)
    return _within(_INDEX[stated[-1]], options) if stated else None


def _within(index: int, options: Sequence[str]) -> int | None:
    return index if index < len(options) else None


def _plain(text: str) -> str:
    return " ".join(normalize(text).casefold().split()).strip(" .")


def check(data: Mapping[str, Any], text: str) -> Check:
    """Whether the option that is named is the right one."""
    index = read_choice(text, data["options"])
    if index is None:
        return "no_answer", "no option is named"
    return RIGHT if index == data["right"] else ("wrong", f"option {LETTERS['en'][index]} is not the right one")


_ASK = {
    "en": ("What is {sum}?", "Write the letter in \\boxed{}."),
    "ar": ("ما ناتج {sum}؟", "اكتب الحرف في \\boxed{}."),
}
_ARABIC_DIGITS = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")


def make_choice(seed: int, level: int) -> Puzzle:
    """A sum with four options, in English or Arabic: one operation up to 20, one up to 99, two operations."""
    random = Random(derive_seed(seed, "multiple_choice"))
    language = random.choice(("en", "ar"))
    largest = 20 if level == 1 else 99
    a, b = random.randint(1, largest), random.randint(1, largest)
    c = random.randint(2, 9)
    written, value = (f"{a} + {b}", a + b) if random.random() < 0.5 else (f"{a + b} - {b}", a)
    if level == 3:
        written, value = f"({written}) × {c}", value * c
    wrong = random.sample([value + step for step in (-10, -3, -2, -1, 1, 2, 3, 10) if value + step >= 0], 3)
    options = [str(number) for number in random.sample([value, *wrong], 4)]
    right = options.index(str(value))
    letters = LETTERS[language]
    lines = [f"{letter}) {option}" for letter, option in zip(letters, options, strict=False)]
    question, how = _ASK[language]
    text = "\n".join([question.format(sum=written), *lines])
    if language == "ar":
        text, options = text.translate(_ARABIC_DIGITS), [option.translate(_ARABIC_DIGITS) for option in options]
    return Puzzle(f"{text}\n{how}", letters[right], f"{written} = {value}", {"options": options, "right": right})


MULTIPLE_CHOICE = PuzzleKind("multiple_choice", make_choice, check)
