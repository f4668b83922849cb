"""Finds the numbers that a question mentions, as digits or as words, and says which of them are plain quantities."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

__all__ = ["Mention", "find_numbers", "number_words", "words_for"]

Kind = Literal["plain", "percent", "fraction", "time", "ordinal", "label"]

# fmt: off
_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
# fmt: on
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_VALUES = {word: i for i, word in enumerate(_SMALL)} | {word: 10 * i for i, word in enumerate(_TENS, start=2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
_WORD = rf"(?:{'|'.join(sorted(_VALUES, key=len, reverse=True))})"
_SCALE = rf"(?:{'|'.join(_SCALES)})"
_NUMBER = re.compile(
    r"(?P<fraction>(?<![\w.,/])\d+(?:\s+\d+)?/\d+(?![\d/])|[½⅓⅔¼¾⅕⅛])"
    r"|(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d*\.?\d+)"
    rf"|\b(?P<words>{_WORD}(?:(?:[ -]|\s+and\s+)(?:{_WORD}|{_SCALE}))*)\b",
    re.IGNORECASE,
)
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
_PERCENT = re.compile(r"\s?(?:%|percent|per cent)", re.IGNORECASE)
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b", re.IGNORECASE)
_UNIT = re.compile(r"(?:g|kg|mg|km|cm|mm|m|ml|l|lbs?|oz|ft|mph|kph|hrs?|mins?)\b")
_CLOCK = re.compile(r":\d\d|\s?(?:[ap]\.?m\b|o'clock)", re.IGNORECASE)
_WORD_FRACTION = re.compile(r"[ -](?:half|halves|third|fourth|quarter|fifth|sixth|eighth|tenth)s?\b", re.I)


@dataclass(frozen=True, slots=True)
class Mention:
    """A number in a text: `text[start:end]`. Only kind "plain" is a quantity that may change freely."""

    start: int
    end: int
    value: Fraction
    kind: Kind
    is_word: bool


def number_words() -> frozenset[str]:
    """Every single word that number words are made of."""
    return frozenset(_VALUES) | frozenset(_SCALES)


def words_for(value: int) -> str:
    """ "seven", "twenty-one": the words for 0 to 99."""
    if value < 20:
        return _SMALL[value]
    tens, ones = divmod(value, 10)
    return _TENS[tens - 2] + (f"-{_SMALL[ones]}" if ones else "")


def _word_value(text: str) -> int | None:
    """The value of a run of number words; None for a run that is no single number ("two three")."""
    total = current = 0
    last: int | None = None
    for word in re.split(r"[\s-]+", text.lower()):
        if word == "and":
            continue
        if word in _SCALES:
            if current == 0:
                return None
            current *= _SCALES[word]
            if word != "hundred":
                total, current = total + current, 0
            last = None
            continue
        value = _VALUES[word]
        if last is not None and not (20 <= last < 100 and last % 10 == 0 and 1 <= value <= 9):
            return None
        current, last = current + value, value
    return total + current


def _digit_kind(text: str, start: int, end: int) -> Kind:
    before, after = text[max(0, start - 1) : start], text[end : end + 1]
    if _PERCENT.match(text, end):
        return "percent"
    if before == ":" or _CLOCK.match(text, end):
        return "time"
    if _ORDINAL.match(text, end):
        return "ordinal"
    if (after == "/" and text[end + 1 : end + 2].isdigit()) or before == "/":
        return "fraction"
    if _UNIT.match(text, end) and not before.isalpha():
        return "plain"
    glued = before.isalpha() or after.isalpha() or before in ("#", "_", "^") or after in ("^", "_")
    ranged = (before == "-" and text[max(0, start - 2) : start - 1].isdigit()) or (
        after == "-" and text[end + 1 : end + 2].isdigit()
    )
    return "label" if glued or ranged else "plain"


def _fraction_value(text: str) -> Fraction | None:
    """ "3/4", "2 1/2" or "½"; None when it divides by zero."""
    parts = _VULGAR.get(text, text).split()
    top, bottom = parts[-1].split("/")
    if int(bottom) == 0:
        return None
    return Fraction(int(top), int(bottom)) + (int(parts[0]) if len(parts) == 2 else 0)


def _split_words(text: str, start: int) -> list[tuple[int, int, int]]:
    """A run that is no single number ("two or" excepted) falls apart into its words."""
    pieces = []
    for match in re.finditer(_WORD, text, re.IGNORECASE):
        pieces.append((start + match.start(), start + match.end(), _VALUES[match.group().lower()]))
    return pieces


def find_numbers(text: str) -> list[Mention]:
    """Every number that the text mentions, in order.

    Percents, fractions, clock times, ordinals and labels (`A4`, `2-3`) are told apart from plain quantities.
    """
    mentions: list[Mention] = []
    for match in _NUMBER.finditer(text):
        start, end = match.span()
        if match["fraction"]:
            fraction = _fraction_value(match["fraction"])
            if fraction is not None:
                mentions.append(Mention(start, end, fraction, "fraction", False))
        elif match["digits"]:
            value = Fraction(match["digits"].replace(",", ""))
            mentions.append(Mention(start, end, value, _digit_kind(text, start, end), False))
        else:
            whole = _word_value(match["words"])
            pieces = [(start, end, whole)] if whole is not None else _split_words(match["words"], start)
            for first, last, word_value in pieces:
                kind: Kind = "plain"
                if _PERCENT.match(text, last):
                    kind = "percent"
                elif _WORD_FRACTION.match(text, last):
                    kind = "fraction"
                mentions.append(Mention(first, last, Fraction(word_value), kind, True))
    return mentions
