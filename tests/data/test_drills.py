from __future__ import annotations

from collections import Counter
from fractions import Fraction

from tafkir.data.arithmetic import Operation, evaluate, format_number, parse_expression
from tafkir.data.drills import MAX_RESULT, drill


def test_drills_are_true_equations_in_the_form_of_solution_lines() -> None:
    operators: Counter[str] = Counter()
    decimals = follow = lines = 0
    for seed in range(2000):
        last = ""
        document = drill(seed).split("\n")
        assert 6 <= len(document) <= 11
        for line in document:
            left, _, right = line.partition("=")
            expression = parse_expression(left)
            assert isinstance(expression, Operation)
            assert format_number(evaluate(expression)) == right
            assert 0 <= Fraction(right) <= max(MAX_RESULT, 999 * 90)
            assert "//" not in line and " " not in line
            operators[expression.operator] += 1
            decimals += "." in left
            follow += last != "" and last in left.replace(expression.operator, " ").split()
            last = right
            lines += 1
    shares = {operator: count / lines for operator, count in operators.items()}
    assert all(0.15 < shares[operator] < 0.4 for operator in "+-*/")
    assert 0.03 < decimals / lines < 0.2
    assert 0.2 < follow / lines < 0.5


def test_a_drill_is_a_pure_function_of_its_seed() -> None:
    assert drill(5) == drill(5) != drill(6)
