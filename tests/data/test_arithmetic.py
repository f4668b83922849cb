"""Exact arithmetic, against Python's own parser and the decimal module."""

from __future__ import annotations

import ast
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tafkir.data.arithmetic import (
    ExpressionError,
    evaluate,
    format_number,
    parse_expression,
    parse_number,
    render,
    split,
)


def _python_value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    assert isinstance(node, ast.BinOp)
    left, right = _python_value(node.left), _python_value(node.right)
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    return left * right if isinstance(node.op, ast.Mult) else left / right


_numbers = st.one_of(st.integers(0, 500).map(str), st.sampled_from(["0.5", "2.25", "10.75", "0.1"]))


@st.composite
def _expressions(draw: st.DrawFn, depth: int = 3) -> str:
    if depth == 0 or draw(st.booleans()):
        return draw(_numbers)
    left, right = draw(_expressions(depth - 1)), draw(_expressions(depth - 1))
    text = f"{left} {draw(st.sampled_from('+-*/'))} {right}"
    return f"({text})" if draw(st.booleans()) else text


@given(_expressions())
def test_value_rendering_and_single_operations_agree_with_python(text: str) -> None:
    try:
        expected = _python_value(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        with pytest.raises(ExpressionError):
            evaluate(parse_expression(text))
        return
    expression = parse_expression(text)
    assert evaluate(expression) == expected
    assert evaluate(parse_expression(render(expression))) == expected
    lines = split(expression)
    for equation, value in lines:
        assert evaluate(parse_expression(equation)) == value
    if lines:
        assert lines[-1][1] == expected


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("16-3-4", ["16-3=13", "13-4=9"]),
        ("((8.0 - 3.0) * 2.0)", ["8-3=5", "5*2=10"]),
        ("(1/3)*12", ["12/3=4"]),
        ("12*(2/3)", ["2*12=24", "24/3=8"]),
        ("3-5+10", ["3-5+10=8"]),
        (".5*05", ["0.5*5=2.5"]),
        ("40*25%", ["40*0.25=10"]),
        ("26", []),
    ],
)
def test_split_writes_lines_that_stay_exact_and_plain(text: str, lines: list[str]) -> None:
    assert [f"{equation}={format_number(value)}" for equation, value in split(parse_expression(text))] == lines


@pytest.mark.parametrize("text", ["", "3+", "(3", "3)", "3 4", "a+b", "2**3", "1/0", "(" * 500, "9" * 500])
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(parse_expression(text))


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9), max_value=10**9))
def test_numbers_are_written_with_as_few_decimals_as_they_take(value: Decimal) -> None:
    text = format_number(Fraction(value))
    assert Decimal(text) == value
    assert text == (f"{value.normalize():f}" if value else "0")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1,234", 1234), ("-0.50", Fraction(-1, 2)), (".25", Fraction(1, 4)), ("3/4", Fraction(3, 4)), (" 7 ", 7)],
)
def test_plain_numbers_are_read(text: str, value: Fraction) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize("text", ["-١٬٢٣٤٫٥", "-۱٬۲۳۴٫۵"])
def test_digits_of_arabic_and_persian_are_digits(text: str) -> None:
    assert parse_number(text) == Fraction(-12345, 10)


@pytest.mark.parametrize(
    "text", ["", "-", ".", "1,23", "1/0", "1/2/3", "nan", "inf", "1e5", "12 apples", "三", "9" * 500]
)
def test_other_texts_are_no_plain_numbers(text: str) -> None:
    assert parse_number(text) is None
