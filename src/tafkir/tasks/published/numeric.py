"""Tells by values whether two expressions are equal, thousands of times a second, so that algebra is seldom asked.

Expressions of numbers, roots, pi and one-letter names are evaluated at three fixed points. Clearly different values
prove that they differ; values that agree to twelve digits at all points are taken as equal, as math-verify does with
fifteen digits of constants.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

__all__ = ["compare"]

_TOKEN = re.compile(r"\\(?:frac|sqrt|pi|cdot|times|div)(?![a-zA-Z])|\d+(?:\.\d+)?|[a-zA-Z]|[-+*/^(){}\[\]]")
# e and i may be constants or names
_NAMES = frozenset("abcdfghjklmnopqrstuvwxyzABCDFGHJKLMNOPQRSTUVWXYZ")
_MATRIX = re.compile(r"(\\begin\{[pbv]?matrix\})(.*)\\end\{[pbv]?matrix\}")
_COMMAS = re.compile(r",(?![^(\[{]*[)\]}])")
_POINTS = (0.37, 1.61, 2.93)
_CLEAR, _CLEAR_DECIMALS, _SAME = 1e-5, 1e-3, 1e-12
# sums of larger numbers may cancel to something that rounding has spoilt
_LARGEST = 1e8


class _Unreadable(Exception):
    """The text is not in the small grammar here."""


def compare(expected: str, answer: str) -> bool | None:
    """Whether two (`tidy`) texts are equal in value; None where values do not tell, or one is no such expression.

    Points, intervals, lists and matrices of the same shape compare part by part. Where decimals are involved, which
    may be rounded, only clear differences count.
    """
    (shape, parts), (other_shape, others) = _parts(expected), _parts(answer)
    if len(parts) > 1 or len(others) > 1:
        if shape != other_shape:
            return None
        found = [a == b or compare(a, b) for a, b in zip(parts, others, strict=True)]
        if all(found):
            return True
        # a list without brackets may come in another order
        return False if shape[0] and False in found else None
    try:
        values = [(_value(expected, point), _value(answer, point)) for point in _POINTS]
    except (_Unreadable, ArithmeticError, ValueError, RecursionError):
        return None
    apart = max(abs(a - b) / max(abs(a), abs(b), 1e-6) for a, b in values)
    rounded = "." in expected + answer
    if apart > (_CLEAR_DECIMALS if rounded else _CLEAR):
        return False
    return True if apart < _SAME and not rounded else None


def _parts(text: str) -> tuple[tuple[str, ...], list[str]]:
    """What a text consists of, and the brackets and separators around and between its parts."""
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        return (matrix[1], *re.findall(r"&|\\\\", matrix[2])), re.split(r"&|\\\\", matrix[2])
    if text[:1] in "([" and text[-1:] in ")]" and len(parts := _COMMAS.split(text[1:-1])) > 1:
        return (text[0] + text[-1], str(len(parts))), parts
    parts = _COMMAS.split(text)
    return ("", str(len(parts))), parts


def _value(text: str, point: float) -> float:
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text or len(tokens) > 200:
        raise _Unreadable
    letters = sorted({token for token in tokens if token.isalpha()})
    if not _NAMES.issuperset(letters):
        raise _Unreadable
    names = {letter: point + 0.71 * (ord(letter) % 32) / 7 for letter in letters}
    reader = _Reader(tokens, names)
    value = reader.sum()
    if reader.at != len(tokens) or not math.isfinite(value) or abs(value) > _LARGEST:
        raise _Unreadable
    return value


class _Reader:
    """Reads sums of products of powers from tokens; a product needs no sign."""

    def __init__(self, tokens: list[str], names: Mapping[str, float]) -> None:
        self.tokens, self.names, self.at = tokens, names, 0

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _take(self, *expected: str) -> str:
        token = self._peek()
        if not token or (expected and token not in expected):
            raise _Unreadable
        self.at += 1
        return token

    def sum(self) -> float:
        sign = -1.0 if self._peek() == "-" else 1.0
        if self._peek() in ("+", "-"):
            self._take()
        value = sign * self._product()
        while self._peek() in ("+", "-"):
            value += self._product() if self._take() == "+" else -self._product()
            if abs(value) > _LARGEST:
                raise _Unreadable
        return value

    def _product(self) -> float:
        value = self._power()
        while (token := self._peek()) not in ("", "+", "-", ")", "}", "]"):
            if token in ("/", "\\div"):
                self._take()
                value /= self._power()
            elif token in ("*", "\\cdot", "\\times"):
                self._take()
                value *= self._power()
            elif token[0].isdigit() or (token == "\\frac" and self.tokens[self.at - 1][0].isdigit()):
                raise _Unreadable  # 2 3 and the mixed number 1\frac{2}{3} are no products
            else:
                value *= self._power()
        return value

    def _power(self) -> float:
        base = self._atom()
        if self._peek() != "^":
            return base
        self._take()
        exponent = self._group() if self._peek() == "{" else self._digit()
        power = base**exponent
        if isinstance(power, complex):
            raise _Unreadable
        return float(power)

    def _digit(self) -> float:
        """The exponent of `x^2`; in `x^23` it would be the 2 alone."""
        token = self._take()
        if len(token) != 1 or not (token in self.names or token.isdigit()):
            raise _Unreadable
        return self.names[token] if token in self.names else float(token)

    def _group(self) -> float:
        self._take("{")
        value = self.sum()
        self._take("}")
        return value

    def _atom(self) -> float:
        token = self._peek()
        if token == "{":
            return self._group()
        self._take()
        if token[0].isdigit():
            return float(token)
        if token in self.names:
            return self.names[token]
        if token == "(":
            value = self.sum()
            self._take(")")
            return value
        if token == "\\pi":
            return math.pi
        if token == "\\frac":
            return self._group() / self._group()
        if token == "\\sqrt":
            root = 2.0
            if self._peek() == "[":
                self._take()
                root = self.sum()
                self._take("]")
            radicand = self._group()
            if radicand < 0:
                raise _Unreadable
            return float(radicand ** (1 / root))
        raise _Unreadable
