"""Arithmetic drills: documents of equations in the very form of solution lines, in the mix that problems need."""

from __future__ import annotations

from fractions import Fraction
from random import Random

from tafkir.data.arithmetic import format_number

__all__ = ["MAX_RESULT", "drill"]

MIN_LINES, MAX_LINES = 6, 10
MAX_RESULT = 9999
CHAIN_SHARE = 0.4
DECIMAL_SHARE = 0.1
PERCENT_SHARE = 0.04

_PARTS = tuple(Fraction(part) for part in ("0.5", "0.5", "0.25", "0.75", "0.2", "0.1"))
_PERCENTS = (5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 80, 90)

Exact = int | Fraction
Digits = tuple[tuple[int, int], ...]


def _table(*rows: tuple[tuple[int, int], int]) -> Digits:
    """A hundred entries, so that a plain draw of one has the given weights."""
    entries = tuple(pair for pair, weight in rows for _ in range(weight))
    assert len(entries) == 100
    return entries


_OPERATORS = "+" * 28 + "-" * 20 + "*" * 32 + "/" * 20
# digits of the two operands of a sum or difference, larger one first
_SUM_DIGITS = _table(((1, 1), 16), ((2, 1), 26), ((2, 2), 32), ((3, 2), 14), ((3, 3), 9), ((4, 3), 3))
_PRODUCT_DIGITS = _table(((1, 1), 34), ((2, 1), 40), ((2, 2), 10), ((3, 1), 13), ((3, 2), 3))
# digits of quotient and divisor
_QUOTIENT_DIGITS = _table(((1, 1), 40), ((2, 1), 32), ((1, 2), 16), ((3, 1), 6), ((2, 2), 6))


def _below(random: Random, limit: int) -> int:
    return int(random.random() * limit)


def _number(random: Random, digits: int) -> int:
    """A number of so many digits, at least 2; a third of the longer ones are round."""
    low = 2 if digits == 1 else 10 ** (digits - 1)
    value = low + _below(random, 10**digits - low)
    if digits > 1 and random.random() < 0.35:
        unit = 5 if random.random() < 0.4 else 10 if digits == 2 else 10 ** (digits - 1)
        value -= value % unit
    return value


def _operands(random: Random, operator: str) -> tuple[Exact, Exact]:
    table = _QUOTIENT_DIGITS if operator == "/" else _PRODUCT_DIGITS if operator == "*" else _SUM_DIGITS
    sizes = table[_below(random, 100)]
    first, second = _number(random, sizes[0]), _number(random, sizes[1])
    if operator == "/":
        return first * second, second
    if operator == "-":
        first, second = max(first, second), min(first, second)
    elif random.random() < 0.4:
        first, second = second, first
    if random.random() < DECIMAL_SHARE:
        part = _PARTS[_below(random, len(_PARTS))]
        if operator == "*":
            return first, part + _below(random, 3)
        return first + (part if random.random() < 0.5 else 0), second + _PARTS[_below(random, len(_PARTS))]
    return first, second


def _percent_lines(random: Random) -> list[str]:
    """`60*20=1200`, `1200/100=12`, or in one line `60*0.2=12`."""
    whole, percent = _number(random, 2 + _below(random, 2)), _PERCENTS[_below(random, len(_PERCENTS))]
    if random.random() < 0.5:
        return [_line(whole, "*", Fraction(percent, 100))[0]]
    first, product = _line(whole, "*", percent)
    return [first, _line(product, "/", 100)[0]]


def _text(value: Exact) -> str:
    return str(value) if isinstance(value, int) else format_number(value)


def _line(left: Exact, operator: str, right: Exact) -> tuple[str, Exact]:
    value: Exact
    if operator == "+":
        value = left + right
    elif operator == "-":
        value = left - right
    elif operator == "*":
        value = left * right
    elif isinstance(left, int) and isinstance(right, int) and left % right == 0:
        value = left // right
    else:
        value = Fraction(left) / right
    return f"{_text(left)}{operator}{_text(right)}={_text(value)}", value


def _follow(random: Random, last: Exact, operator: str) -> tuple[Exact, Exact] | None:
    """Operands that go on from the last result, as the steps of a solution do; None where none fit."""
    if not isinstance(last, int) or not 2 <= last < 1000:
        return None
    if operator == "/":
        divisors = [divisor for divisor in range(2, min(last, 31)) if last % divisor == 0]
        return (last, divisors[_below(random, len(divisors))]) if divisors else None
    other = _number(random, 1 if operator == "*" else 1 + _below(random, 3))
    if operator == "-":
        return max(last, other), min(last, other)
    return (last, other) if random.random() < 0.7 else (other, last)


def drill(seed: int) -> str:
    """A document of 6 to 10 equations, one a line: a pure function of the seed.

    Results are exact, never negative, and at most 9999; two lines in five go on from the result before.
    """
    random = Random(seed)
    lines: list[str] = []
    wanted = MIN_LINES + _below(random, MAX_LINES - MIN_LINES + 1)
    last: Exact = 0
    while len(lines) < wanted:
        if random.random() < PERCENT_SHARE:
            lines += _percent_lines(random)
            continue
        operator = _OPERATORS[_below(random, 100)]
        operands = _follow(random, last, operator) if random.random() < CHAIN_SHARE else None
        left, right = operands or _operands(random, operator)
        line, value = _line(left, operator, right)
        if 0 <= value <= MAX_RESULT:
            lines.append(line)
            last = value
    return "\n".join(lines)
