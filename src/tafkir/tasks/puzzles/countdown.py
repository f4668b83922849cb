"""Number games: countdown (reach a target, each number at most once) and the 24 game (each exactly once)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from random import Random
from typing import Any

from tafkir.data.arithmetic import Expression, ExpressionError, Operation, apply, evaluate, parse_expression, render
from tafkir.recipe.seeds import derive_seed
from tafkir.tasks.answers import normalize
from tafkir.tasks.generated import RIGHT, Check, Puzzle, PuzzleKind

__all__ = ["COUNTDOWN", "GAME_24", "solve"]

_OPERATORS = "+-*/"
_MAX_BRACKETS = 40

# How many numbers, and the largest of them.
_COUNTDOWN = {1: (2, 9), 2: (3, 9), 3: (3, 20), 4: (4, 25), 5: (5, 50), 6: (6, 100)}
_GAME_24 = {1: 6, 2: 9, 3: 13}
_MAX_TARGET = 999

_Term = tuple[Fraction, Expression]


def _combine(left: _Term, right: _Term, operator: str) -> _Term | None:
    if operator == "/" and right[0] == 0:
        return None
    return apply(operator, left[0], right[0]), Operation(operator, left[1], right[1])


def _random_term(random: Random, numbers: Sequence[int]) -> _Term:
    """All numbers in one expression, every value on the way a positive integer."""
    terms: list[_Term] = [(Fraction(n), Fraction(n)) for n in numbers]
    while len(terms) > 1:
        left = terms.pop(random.randrange(len(terms)))
        right = terms.pop(random.randrange(len(terms)))
        made = [_combine(left, right, operator) for operator in random.sample(_OPERATORS, 4)]
        terms.append(next(term for term in made if term and term[0] > 0 and term[0].denominator == 1))
    return terms[0]


def make_countdown(seed: int, level: int) -> Puzzle:
    """A target that can be reached with all of the numbers (or fewer); levels take 2 to 6 numbers."""
    random = Random(derive_seed(seed, "countdown"))
    num_numbers, largest = _COUNTDOWN[level]
    while True:
        numbers = [random.randint(1, largest) for _ in range(num_numbers)]
        target, expression = _random_term(random, numbers)
        if target <= _MAX_TARGET and target not in numbers:
            break
    given = " ".join(map(str, numbers))
    question = (
        f"Make {target} from {given}. Use each number at most once, with + - * / and brackets. "
        "Write the expression in \\boxed{}."
    )
    data = {"numbers": numbers, "target": int(target), "all": False}
    return Puzzle(question, render(expression), _steps(expression), data)


def make_game_24(seed: int, level: int) -> Puzzle:
    """Four numbers that make 24, each used once; levels draw them up to 6, 9 and 13."""
    random = Random(derive_seed(seed, "game_24"))
    while True:
        numbers = [random.randint(1, _GAME_24[level]) for _ in range(4)]
        expression = solve(numbers, 24)
        if expression is not None:
            break
    given = " ".join(map(str, numbers))
    question = (
        f"Make 24 from {given}. Use every number exactly once, with + - * / and brackets. "
        "Write the expression in \\boxed{}."
    )
    data = {"numbers": numbers, "target": 24, "all": True}
    return Puzzle(question, render(expression), _steps(expression), data)


def solve(numbers: Sequence[int], target: int) -> Expression | None:
    """An expression of all numbers, each once, with the target as its exact value; None where there is none."""
    found = _search([(Fraction(n), Fraction(n)) for n in numbers], Fraction(target))
    return None if found is None else found[1]


def _search(terms: list[_Term], target: Fraction) -> _Term | None:
    if len(terms) == 1:
        return terms[0] if terms[0][0] == target else None
    for i in range(len(terms)):
        for j in range(len(terms)):
            if i == j:
                continue
            rest = [term for k, term in enumerate(terms) if k not in (i, j)]
            for operator in _OPERATORS if i < j else "-/":  # + and * need one order only
                term = _combine(terms[i], terms[j], operator)
                found = _search([*rest, term], target) if term else None
                if found:
                    return found
    return None


def _steps(expression: Expression) -> str:
    """One operation with its value a line, from the inside out."""

    def walk(part: Expression) -> Iterator[str]:
        if isinstance(part, Operation):
            yield from walk(part.left)
            yield from walk(part.right)
            left, right = (render(evaluate(side)) for side in (part.left, part.right))
            yield f"{left}{part.operator}{right}={render(evaluate(part))}"

    return "\n".join(walk(expression))


def _leaves(expression: Expression) -> Iterator[Fraction]:
    if isinstance(expression, Operation):
        yield from _leaves(expression.left)
        yield from _leaves(expression.right)
    else:
        yield expression


def check(data: Mapping[str, Any], text: str) -> Check:
    """Whether an expression has the target as its exact value and uses the numbers as the rules say."""
    text = normalize(text).replace("\\times", "*").replace("\\cdot", "*").replace("\\div", "/").replace("$", "")
    left, equals, right = text.partition("=")
    if equals and right.strip() != str(data["target"]):
        return "wrong", "what stands after = is not the target"
    if left.count("(") + left.count("-") > _MAX_BRACKETS:
        return "wrong", "too many brackets or signs"
    try:
        expression = parse_expression(left)
        value = evaluate(expression)
    except ExpressionError as error:
        return "wrong", f"not an expression: {error}"
    used, given = Counter(_leaves(expression)), Counter(map(Fraction, data["numbers"]))
    if used - given:
        return "wrong", f"uses {render(min(used - given))}, which is not given (so often)"
    if data["all"] and given - used:
        return "wrong", f"leaves out {render(min(given - used))}"
    if value != data["target"]:
        return "wrong", f"makes {render(value)}, not {data['target']}"
    return RIGHT


COUNTDOWN = PuzzleKind("countdown", make_countdown, check)
GAME_24 = PuzzleKind("game_24", make_game_24, check)
