"""Finds the answer in a model's text and reads it as an exact number, in Latin, Arabic-Indic or Persian digits."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

__all__ = [
    "MAX_ANSWER_LENGTH",
    "Extraction",
    "Value",
    "extract_answer",
    "extract_text",
    "is_unevaluated",
    "normalize",
    "read_value",
]

MAX_ANSWER_LENGTH = 1000
_TAIL = 20_000
_MAX_EXPONENT = 50

Source = Literal["box", "####", "answer is", "last number", "text", ""]

_SPACES = dict.fromkeys(
    map(ord, "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000"), " "
)
_SIGNS = {
    0x066A: "%",  # Arabic percent
    0x066B: ".",  # Arabic decimal separator
    0x066C: ",",  # Arabic thousands separator
    0x2044: "/",
    0x2215: "/",
    0xFF05: "%",
    0xFF0C: ",",
    0xFF0E: ".",
    0xFF0F: "/",
} | dict.fromkeys((0x2010, 0x2011, 0x2012, 0x2013, 0x2212, 0xFE63, 0xFF0D), "-")
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5"}
_VULGAR |= {"⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}


def normalize(text: str) -> str:
    """Decimal digits of every script as 0-9, Arabic and full-width signs as ASCII, invisible characters gone.

    Superscripts stay as they are: 10² is not 102.
    """
    if text.isascii():
        return text
    text = text.translate(_SPACES).translate(_SIGNS)
    characters = []
    for character in text:
        if character.isascii():
            characters.append(character)
        elif unicodedata.category(character) == "Nd":
            characters.append(str(unicodedata.decimal(character)))
        elif character in _VULGAR:
            characters.append(f" {_VULGAR[character]}")
        elif unicodedata.category(character) not in ("Cf", "Cc"):
            characters.append(character)
    return "".join(characters)


@dataclass(frozen=True, slots=True)
class Extraction:
    """What stands as the answer, where it was found, and why there is none."""

    text: str | None
    source: Source = ""
    reason: str = ""


_NUMBER_TEXT = r"[-+]?\s?[$€£]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:\s?/\s?\d+)?\s?%?"
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_ANSWER_IS = re.compile(
    rf"(?:answer(?:\s+is)?|الجواب(?:\s+هو)?|الإجابة(?:\s+هي)?|الناتج(?:\s+هو)?)\s*[:=]?\s*\**\s*({_NUMBER_TEXT})",
    re.IGNORECASE,
)
_ANY_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?%?|(?<![\w.])-?\.\d+%?")


def _boxed(text: str) -> Extraction | None:
    """The content of the last `\\boxed{...}`; None where there is no box at all."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len("\\boxed"), len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                content = text[start + len("\\boxed{") : position].strip()
                return Extraction(content, "box") if content else Extraction(None, "box", "the box is empty")
    return Extraction(None, "box", "the box is never closed")


def extract_answer(text: str, *, finished: bool = True) -> Extraction:
    """The answer in the text of an assistant turn.

    Only what follows the last `</think>` counts; a chain of thought that never ends holds no answer. There, the last
    `\\boxed{}` decides, else `#### N`, else "answer is N", else the last number. In a text that a length limit cut
    off only a box counts, because a bare number may lack its last digits.
    """
    answer = _after_thought(text)
    if answer is None:
        return Extraction(None, "", "the chain of thought never ends")
    box = _boxed(answer)
    if box is not None:
        return box
    if not finished:
        return Extraction(None, "", "cut off before an answer")
    # without runs of spaces, on which the patterns below would take their time
    answer = "\n".join(" ".join(line.split()) for line in normalize(answer[-_TAIL:]).splitlines())
    for source, pattern in (("####", _HASHES), ("answer is", _ANSWER_IS)):
        found = [match[1].strip() for match in pattern.finditer(answer)]
        found = [candidate for candidate in found if any(c.isdigit() for c in candidate)]
        if found:
            return Extraction(found[-1], "####" if source == "####" else "answer is")
    numbers = _ANY_NUMBER.findall(answer)
    return Extraction(numbers[-1], "last number") if numbers else Extraction(None, "", "there is no number")


def _after_thought(text: str) -> str | None:
    """What follows the last `</think>`; None where the chain of thought never ends."""
    head, mark, tail = text.rpartition("</think>")
    if not mark and "<think>" in text:
        return None
    return tail if mark else head + tail


def extract_text(text: str, *, finished: bool = True, boxed: bool = True) -> Extraction:
    """The answer of an assistant turn where it is no number: whatever stands there, as it is.

    Args:
        finished: False for a text that a length limit cut off; only its box counts then.
        boxed: look for `\\boxed{}` first; without one, and where this is False, all that follows the chain of thought
            is the answer.
    """
    answer = _after_thought(text)
    if answer is None:
        return Extraction(None, "", "the chain of thought never ends")
    box = _boxed(answer) if boxed else None
    if box is not None:
        return box
    if not finished:
        return Extraction(None, "", "cut off before an answer")
    answer = answer.strip()
    return Extraction(answer, "text") if answer else Extraction(None, "", "there is no answer")


@dataclass(frozen=True, slots=True)
class Value:
    """An exact number; `percent` when a percent sign follows it, so that 50% may mean 50 or 1/2."""

    number: Fraction
    percent: bool = False

    def equals(self, expected: Fraction) -> bool:
        return self.number == expected or (self.percent and self.number / 100 == expected)


_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_LATEX_DROPPED = re.compile(r"\\(?:left|right|displaystyle|[,!;:>()\[\] ])|\^\s*\{?\s*\\circ\s*\}?|\\degree|~")
_SQUARE_UNIT = re.compile(
    r"\b(mm|cm|m|km|in|inch|inches|ft|feet|foot|yd|yards?|miles?|meters?|units?)\s*\^\s*\{?[23]\}?", re.IGNORECASE
)
_LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_CURRENCY = r"(?:[$€£¥₹﷼]|USD|EUR|GBP|US\$)"
_READ = re.compile(
    rf"""(?P<sign>[-+]|minus\s|negative\s)?\s*{_CURRENCY}?\s*(?P<inner>[-+])?\s*
    (?:(?P<whole>\d+)\s+(?P<top>\d+)\s*/\s*(?P<bottom>\d+)
      |(?P<num>{_PLAIN})\s*/\s*(?P<den>{_PLAIN})
      |(?P<plain>{_PLAIN})(?:[eE](?P<exponent>[-+]?\d+))?)
    \s*(?P<percent>%|percent\b|per\ cent\b|بالمئة|بالمائة|في\ المئة|في\ المائة)?(?P<unit>.*)""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
_SCALES = {"hundred": 100, "thousand": 1000, "k": 1000, "million": 10**6, "billion": 10**9, "dozen": 12}
_SCALES |= {"مئة": 100, "مائة": 100, "ألف": 1000, "الف": 1000, "مليون": 10**6, "مليار": 10**9}
_UNIT_SIGNS = frozenset(" \t\n.,;:'\"’()/-°$€£¥₹﷼²³·_*")
_NOT_UNITS = re.compile(
    r"half|third|quarter|نصف|ثلث|ربع|\b(?:or|to|plus|minus|times|over|less|more)\b|^[abnxyz]$", re.IGNORECASE
)


def _strip_latex(text: str) -> str:
    text = text.replace("\\$", "$").replace("\\%", "%").replace("{,}", ",")
    text = _LATEX_DROPPED.sub(" ", text).replace("\\\\", " ")
    # a space of typography inside a number: 1\,234
    text = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "", text) if "\\" not in text else text
    for _ in range(3):
        text = _LATEX_TEXT.sub(r" \1 ", text)
    text = re.sub(r"\s+\^", "^", text)
    text = _SQUARE_UNIT.sub(r"\1", text)
    text = _LATEX_FRACTION.sub(lambda m: f" {m[1] or m[2] or ''}/{m[3] or m[4] or ''} ", text)
    return text.strip()


def _unwrap(text: str) -> str:
    """Without surrounding `$`, brackets, quotes and a leading `x =`."""
    previous = None
    while text != previous:
        previous = text
        text = text.strip().rstrip(".")
        for opening, closing in (("$", "$"), ("{", "}"), ("(", ")"), ("[", "]"), ('"', '"'), ("**", "**")):
            wrapped = text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing)
            if wrapped and closing not in text[len(opening) : -len(closing)]:
                text = text[len(opening) : -len(closing)]
    left, equals, right = text.rpartition("=")
    is_name = equals and re.fullmatch(r"\s*\\?[^\W\d]+(?:\s+[^\W\d]+)*\s*", left)
    return right.strip() if is_name else text


def _scale(unit: str) -> int | None:
    """The factor that a unit carries ("million", "dozen"), 1 for a plain one, None for what is no unit."""
    if any(not (c.isalpha() or unicodedata.category(c) == "Mn" or c in _UNIT_SIGNS) for c in unit):
        return None
    if len(unit) > 60 or _NOT_UNITS.search(unit):
        return None
    words = unit.split()
    return _SCALES.get(words[0].lower().strip(".,"), 1) if words else 1


def _to_fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def read_value(text: str) -> Value | None:
    """The number that a text states: integer, decimal, fraction, mixed number, percent, with currency and unit.

    None for anything else: two numbers, an expression (48/2 for 24 is one), symbols. Never evaluates anything.
    """
    return None if len(text) > MAX_ANSWER_LENGTH else _read_value(text)


# The expected answer is read for every sample of its problem.
@lru_cache(maxsize=1 << 14)
def _read_value(text: str) -> Value | None:
    match = _READ.fullmatch(_unwrap(_strip_latex(normalize(text))))
    if match is None:
        return None
    scale = _scale(match["unit"])
    if scale is None or (match["sign"] and match["inner"]):
        return None
    if match["whole"]:
        if int(match["bottom"]) == 0:
            return None
        number = int(match["whole"]) + Fraction(int(match["top"]), int(match["bottom"]))
    elif match["num"]:
        denominator = _to_fraction(match["den"])
        if denominator == 0:
            return None
        number = _to_fraction(match["num"]) / denominator
        if number.denominator == 1 and denominator != 1:
            # 48/2 for 24: a division that nobody has done
            return None
    else:
        exponent = int(match["exponent"] or "0") if len(match["exponent"] or "") < 5 else 10**5
        if abs(exponent) > _MAX_EXPONENT:
            return None
        number = _to_fraction(match["plain"]) * Fraction(10) ** exponent
    sign = (match["sign"] or match["inner"] or "+").strip().lower()
    return Value(number * scale * (1 if sign == "+" else -1), match["percent"] is not None)


def is_unevaluated(text: str) -> bool:
    """A sum, product or the like of plain numbers: nobody has worked it out."""
    text = _unwrap(_strip_latex(normalize(text))).replace("\\times", "*").replace("\\cdot", "*").replace("\\div", "/")
    return bool(re.fullmatch(r"[\d\s.,+\-*/()×÷$%]+", text)) and "**" not in text and any(c in "+-*/×÷" for c in text)
