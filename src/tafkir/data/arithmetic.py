"""Exact arithmetic on the equations of word problems: parse, evaluate, split into single operations, format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

__all__ = [
    "Expression",
    "ExpressionError",
    "Operation",
    "apply",
    "evaluate",
    "format_number",
    "parse_expression",
    "parse_number",
    "render",
    "split",
]

MAX_EXPRESSION_LENGTH = 400
MAX_DECIMALS = 6

_TOKEN = re.compile(r"\s*(?:(\d[\d,]*(?:\.\d+)?|\.\d+)(%?)|(//|[-+*/()\u00d7\u00f7x]))")
_NUMBER = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d+)?")
# Arabic-Indic and Persian digits, decimal comma, thousands separator.
_ARABIC = {0x0660 + i: str(i) for i in range(10)} | {0x06F0 + i: str(i) for i in range(10)} | {0x066B: ".", 0x066C: ","}
_RANK = {"+": 1, "-": 1, "*": 2, "/": 2}
_ALIASES = {"\u00d7": "*", "x": "*", "\u00f7": "/", "//": "/"}


class ExpressionError(ValueError):
    """The text is not an arithmetic expression, or divides by zero."""


@dataclass(frozen=True, slots=True)
class Operation:
    """`left operator right`, with operator one of + - * /."""

    operator: str
    left: Expression
    right: Expression


Expression = Fraction | Operation


def parse_number(text: str) -> Fraction | None:
    """The value of "72", "-0.5", ".25", "1,234", "3/4" or "٤٢"; None when the text is anything else."""
    text = text.strip().translate(_ARABIC)
    if len(text) > MAX_EXPRESSION_LENGTH:
        return None
    numerator, slash, denominator = text.partition("/")
    if slash:
        top, bottom = parse_number(numerator), parse_number(denominator)
        if top is None or not bottom or "/" in denominator:
            return None
        return top / bottom
    if not _NUMBER.fullmatch(text) or not any(c.isdigit() for c in text) or not text.isascii():
        return None
    return Fraction(text.replace(",", ""))


def format_number(value: Fraction | int) -> str:
    """Plain decimal with as few digits as the exact value takes; `a/b` when no decimal is exact."""
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    twos = fives = 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens: list[str | Fraction] = []
        position = 0
        text = text.strip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise ExpressionError(f"unexpected {text[position]!r} in {text!r}")
            number, percent, operator = match.groups()
            if operator:
                self.tokens.append(_ALIASES.get(operator, operator))
            else:
                self.tokens.append(Fraction(number.replace(",", "")) / (100 if percent else 1))
            position = match.end()
        self.position = 0

    def peek(self) -> str | Fraction | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self) -> str | Fraction | None:
        token = self.peek()
        self.position += 1
        return token

    def sum(self) -> Expression:
        left = self.product()
        while (operator := self.peek()) in ("+", "-"):
            self.take()
            left = Operation(str(operator), left, self.product())
        return left

    def product(self) -> Expression:
        left = self.atom()
        while (operator := self.peek()) in ("*", "/"):
            self.take()
            left = Operation(str(operator), left, self.atom())
        return left

    def atom(self) -> Expression:
        token = self.take()
        if isinstance(token, Fraction):
            return token
        if token == "-":
            inner = self.atom()
            return -inner if isinstance(inner, Fraction) else Operation("-", Fraction(0), inner)
        if token == "(":
            inner = self.sum()
            if self.take() != ")":
                raise ExpressionError("a bracket is not closed")
            return inner
        raise ExpressionError("a number is missing")


def parse_expression(text: str) -> Expression:
    """Parse numbers, + - * / (also x and the multiplication and division signs), percents and brackets.

    Raises:
        ExpressionError: the text is not such an expression, or is longer than 400 characters.
    """
    if len(text) > MAX_EXPRESSION_LENGTH:
        raise ExpressionError(f"longer than {MAX_EXPRESSION_LENGTH} characters")
    parser = _Parser(text)
    expression = parser.sum()
    if parser.peek() is not None:
        raise ExpressionError(f"unexpected {parser.peek()!s} in {text!r}")
    return expression


def apply(operator: str, left: Fraction, right: Fraction) -> Fraction:
    """`left operator right`, exactly. Raises ExpressionError on division by zero."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    if right == 0:
        raise ExpressionError("division by zero")
    return left / right


def evaluate(expression: Expression) -> Fraction:
    """The exact value. Raises ExpressionError on division by zero."""
    if isinstance(expression, Fraction):
        return expression
    return apply(expression.operator, evaluate(expression.left), evaluate(expression.right))


def render(expression: Expression) -> str:
    """The expression without spaces, with no more brackets than its value needs."""
    if isinstance(expression, Fraction):
        return format_number(expression)

    def side(part: Expression, *, is_right: bool) -> str:
        if isinstance(part, Fraction):
            return format_number(part)
        rank, inner = _RANK[expression.operator], _RANK[part.operator]
        brackets = inner < rank or (is_right and inner == rank and expression.operator in "-/")
        return f"({render(part)})" if brackets else render(part)

    return f"{side(expression.left, is_right=False)}{expression.operator}{side(expression.right, is_right=True)}"


def _is_plain(value: Fraction) -> bool:
    """Non-negative, with a short exact decimal: fit to stand in a line of its own."""
    return value >= 0 and 10**MAX_DECIMALS % value.denominator == 0


def _single_operations(expression: Expression, lines: list[tuple[str, Fraction]]) -> Fraction:
    if isinstance(expression, Fraction):
        if not _is_plain(expression):
            raise ExpressionError("not a plain number")
        return expression
    operator, left, right = expression.operator, expression.left, expression.right
    if operator == "*":
        # (a/b)*c with an endless a/b: (a*c)/b stays exact
        for fraction, other in ((left, right), (right, left)):
            if isinstance(fraction, Operation) and fraction.operator == "/" and not _is_plain(evaluate(fraction)):
                top = other if fraction.left == 1 else Operation("*", fraction.left, other)
                return _single_operations(Operation("/", top, fraction.right), lines)
    first = _single_operations(left, lines)
    second = _single_operations(right, lines)
    value = apply(operator, first, second)
    if not _is_plain(value):
        raise ExpressionError("not a plain number")
    lines.append((f"{format_number(first)}{operator}{format_number(second)}", value))
    return value


def split(expression: Expression) -> list[tuple[str, Fraction]]:
    """The expression as a sequence of single operations, each with its value, the last one with the whole value.

    `(16-3)-4` becomes `16-3` = 13, `13-4` = 9. An expression with an intermediate value that is negative or has no
    short exact decimal stays in one piece; a lone number gives nothing.
    """
    if isinstance(expression, Fraction):
        return []
    lines: list[tuple[str, Fraction]] = []
    try:
        _single_operations(expression, lines)
    except ExpressionError:
        return [(render(expression), evaluate(expression))]
    return lines
