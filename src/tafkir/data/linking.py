"""Ties every number of a solution to where it comes from, so that a problem can be told again with other numbers.

Only what is certain is set free: a number that could mean two things, or that a hidden step may rest on, stays.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Literal

from tafkir.data.arithmetic import ExpressionError, Operation, format_number, parse_expression
from tafkir.data.numbers import Mention, find_numbers
from tafkir.data.sources import Problem

__all__ = ["Operand", "Slot", "Template", "TemplateStep", "Variable", "link_numbers"]

Exact = int | Fraction
"""A whole number as `int`, which is fast, and anything else as `Fraction`."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A side of an equation: variable `index`, the result of step `index`, or the constant `value`."""

    kind: Literal["variable", "step", "constant"]
    index: int
    value: Exact


@dataclass(frozen=True, slots=True)
class TemplateStep:
    """One equation over operands. `places` is how many decimals its result may have: as many as it had."""

    operator: str
    left: Operand
    right: Operand
    positive: bool
    places: int


@dataclass(frozen=True, slots=True)
class Variable:
    """A free number: its value in the original, and whether the equations use it."""

    value: int
    used: bool


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the question where a variable stands, and how it is written there."""

    variable: int
    is_word: bool
    capital: bool
    comma: bool


@dataclass(frozen=True, slots=True)
class Template:
    """A problem whose numbers are linked: `pieces[i]`, `slots[i]`, `pieces[i + 1]` ... make up the question."""

    problem: Problem
    pieces: tuple[str, ...]
    slots: tuple[Slot, ...]
    variables: tuple[Variable, ...]
    steps: tuple[TemplateStep, ...]
    fixed: tuple[int, ...]
    """Whole numbers of the question that stay; where a variable is not used, its order among them stays as well."""


# What a word may bring into a solution without any digit in the text: words : what it means ; what it may hint at.
_HIDDEN_TABLE = """
half halves halved halfway : 2 1/2
twice double doubles doubled doubling pair pairs couple couples both twin twins duo duet : 2
bicycle bicycles bike bikes : ; 2
triple triples tripled thrice triplet triplets trio : 3
third thirds : 3 1/3 2/3
tricycle tricycles : ; 3
quadruple quadrupled : 4
quarter quarters quarterly : 4 1/4 3/4 25 ; 3 1/2 15
fourth fourths : 4 1/4 3/4 ; 3
fifth fifths : 5 1/5 2/5 3/5 4/5 ; 2 3 4
sixth sixths : 6 1/6 5/6 ; 5
seventh sevenths : 7 1/7 ; 6
eighth eighths : 8 1/8 3/8 5/8 7/8 ; 3 5 7
ninth ninths : 9 1/9
tenth tenths decade decades : 10 1/10 3/10 7/10 9/10
dozen dozens : 12 ; 6 24
week weeks weekly biweekly fortnight : 7 ; 5 2 52 4 14
weekday weekdays workday workdays weekend weekends workweek workweeks : 5 2 ; 7
monday mondays tuesday tuesdays wednesday wednesdays thursday thursdays friday fridays : ; 7 5 2 6 4 3
saturday saturdays sunday sundays : ; 7 5 2 6 4 3
month months monthly : 12 ; 30 4 31 28 52
year years yearly annual annually birthday birthdays : 12 52 365 ; 4 366
day days daily everyday night nights morning mornings evening evenings : 24 7 ; 30 2
hour hours hourly minute minutes min mins mph second seconds : 60 ; 24 3600 30 1/60
percent percentage percentages cent : 100
feet foot ft inch inches yard yards : 12 ; 3 36 1/12
mile miles : ; 5280 3
cents dollar dollars penny pennies : 100 1/100 ; 10 5 25
nickel nickels dime dimes : 100 10 5 1/10 1/20 ; 25 1/4
ounce ounces oz pound pounds lb lbs ton tons : 16 2000 ; 8 1/16
gallon gallons quart quarts pint pints cup cups : 4 ; 2 16 8 128
kilogram kilograms kg gram grams kilometer kilometers km meter meters liter liters ml cm centimeters : 1000 100 ; 10
square squares rectangle rectangles rectangular perimeter side sides fence fences : ; 2 4
cube cubes cubic dice die : 6 ; 3 12
triangle triangles triangular : ; 3 2 180
century centuries : 100
car cars truck trucks wheel wheels leg legs paw paws dog dogs cat cats horse horses cow cows chicken chickens : ; 4 2
shoe shoes sock socks eye eyes ear ears brother brothers sister sisters sibling siblings : ; 2
friend friends parent parents grandparents : ; 2
spider spiders octopus octopuses : 8
insect insects ant ants : 6
"""


def _read_table(table: str) -> dict[str, tuple[frozenset[Fraction], frozenset[Fraction]]]:
    """For each word, what it means and what it may hint at."""
    hidden: dict[str, tuple[frozenset[Fraction], frozenset[Fraction]]] = {}
    for line in table.strip().splitlines():
        words, _, values = line.partition(":")
        meant, _, hinted = values.partition(";")
        for word in words.split():
            hidden[word] = (frozenset(map(Fraction, meant.split())), frozenset(map(Fraction, hinted.split())))
    return hidden


_HIDDEN = _read_table(_HIDDEN_TABLE)
_LOWER_WORD = re.compile(r"[a-z]+")
_COMMON = frozenset(map(Fraction, (1, 2, 3, 4, 5, 7, 10, 12, 24, 30, 52, 60, 100, 365, 1000, 3600)))
_SMALL = (Fraction(1), Fraction(2), Fraction(100))
_MAX_PLACES = 4


def _is_year(mention: Mention, question: str) -> bool:
    text = question[mention.start : mention.end]
    money = question[max(0, mention.start - 1) : mention.start] == "$"
    return len(text) == 4 and text.isdigit() and 1900 <= mention.value <= 2100 and not money


def _may_vary(mention: Mention, question: str) -> bool:
    """A plain whole quantity of at least 2; the word "two" is mostly part of the story ("the two of them")."""
    if mention.kind != "plain" or mention.value.denominator != 1 or mention.value < 2:
        return False
    if "." in question[mention.start : mention.end] or _is_year(mention, question):
        return False
    return not (mention.is_word and mention.value == 2)


def _companions(mention: Mention) -> Iterator[Fraction]:
    """Numbers that a solution may write for a number that stays: 0.25, 0.75 and 1.25 for 25 %."""
    value = mention.value
    yield value
    if mention.kind == "percent":
        share = value / 100
        yield from (Fraction(100), share, 1 - share, 1 + share, 100 - value, 100 + value)
    if mention.kind == "fraction":
        yield from (Fraction(value.numerator), Fraction(value.denominator), 1 - value, 1 + value)
        yield Fraction(abs(value.denominator - value.numerator))


def _fixed_values(question: str, mentions: Sequence[Mention]) -> tuple[set[Fraction], set[Fraction]]:
    """Values that stand for something that must not change, and values that might."""
    fixed = {Fraction(1)}
    hinted: set[Fraction] = set()
    for mention in mentions:
        if not _may_vary(mention, question):
            fixed.update(_companions(mention))
    for word in set(_LOWER_WORD.findall(question.lower())):
        if word in _HIDDEN:
            fixed |= _HIDDEN[word][0]
            hinted |= _HIDDEN[word][1]
    return fixed, hinted


def _explains(a: Fraction, b: Fraction, target: Fraction) -> bool:
    values = {a + b, abs(a - b), a * b}
    if a and b:
        values |= {a / b, b / a}
    return target in values


def _hidden_sources(target: Fraction, values: Sequence[Fraction]) -> set[Fraction]:
    """The given numbers from which someone may have made `target` in the head."""
    sources: set[Fraction] = set()
    for a in values:
        if any(_explains(a, constant, target) for constant in (*_COMMON, Fraction(1, 2))):
            sources.add(a)
        if target in (1 - a / 100, 1 + a / 100):
            sources.add(a)
    for a, b in combinations(values, 2):
        if _explains(a, b, target):
            sources |= {a, b}
    return sources


@dataclass(frozen=True, slots=True)
class _Equation:
    operator: str
    sides: tuple[Fraction, Fraction]
    result: Fraction


def _parse_steps(problem: Problem) -> list[_Equation] | None:
    """The steps as equations; None where a step is no single operation."""
    parsed = []
    for step in problem.steps:
        try:
            expression = parse_expression(step.expression)
        except ExpressionError:
            return None
        if not isinstance(expression, Operation):
            return None
        if isinstance(expression.left, Operation) or isinstance(expression.right, Operation):
            return None
        sides = (expression.left, expression.right)
        parsed.append(_Equation(expression.operator, sides, Fraction(step.result)))
    return parsed


class _Linker:
    """Decides, for each side of each equation, where its number comes from."""

    def __init__(self, problem: Problem, steps: list[_Equation]) -> None:
        self.steps = steps
        self.mentions = find_numbers(problem.question)
        self.question = problem.question
        self.results = [step.result for step in steps]
        self.fixed, hinted = _fixed_values(problem.question, self.mentions)
        stated = {m.value for m in self.mentions if _may_vary(m, problem.question)}
        self.free = stated - self.fixed - hinted
        self.fixed |= stated & hinted
        self.links: dict[tuple[int, int], int] = {}
        """(step, side) to the step whose result stands there."""

    def run(self) -> bool:
        """False when some number cannot be tied down."""
        sides = [(i, side) for i in range(len(self.steps)) for side in (0, 1)]
        unsure = []
        for i, side in sides:
            value = self.steps[i].sides[side]
            earlier = [j for j in range(i) if self.results[j] == value]
            stated = value in self.free or value in self.fixed
            if len(earlier) == 1 and not stated:
                self.links[i, side] = earlier[0]
            elif earlier:
                unsure.append((i, side))
            elif not stated and not self._link_hidden(i, value):
                return False
        for i, side in unsure:
            if not self._link_unsure(i, side):
                return False
        used = set(self.links.values())
        # a result that nothing uses hints at a step that was done in the head
        if any(j not in used for j in range(len(self.steps) - 1)):
            return False
        self._distrust_idle_numbers()
        # a stated number that equals a result which it does not feed restates it: both would have to change
        counts = Counter(mention.value for mention in self.mentions)
        operands = self.stated_operands()
        return not any(value in self.results and (counts[value] > 1 or value not in operands) for value in self.free)

    def _distrust_idle_numbers(self) -> None:
        """A number that no equation uses may have made a constant in the head (5 - 3 beside "a pair"): hold its kin."""
        operands = self.stated_operands()
        idle = self.free - operands
        stated = sorted({m.value for m in self.mentions})
        for constant in operands - set(stated) if idle else ():
            sources = _hidden_sources(constant, stated)
            if sources & idle:
                self.free -= sources
                self.fixed |= sources

    def stated_operands(self) -> set[Fraction]:
        """The values of all sides that are no earlier result."""
        sides = ((i, side) for i in range(len(self.steps)) for side in (0, 1))
        return {self.steps[i].sides[side] for i, side in sides if (i, side) not in self.links}

    def _link_hidden(self, i: int, value: Fraction) -> bool:
        """A number from nowhere: a common constant is taken as one, with all it may have been made from held fixed."""
        stated = sorted({m.value for m in self.mentions})
        sources = _hidden_sources(value, stated)
        earlier = set(self.results[:i])
        if any(_explains(a, b, value) for a in earlier for b in (*stated, *earlier, *_SMALL)):
            return False
        if not sources and value not in _COMMON:
            return False
        self.free -= sources
        self.fixed |= sources | {value}
        return True

    def _link_unsure(self, i: int, side: int) -> bool:
        """Several sources: the one result that nothing else uses, else the stated number that nothing else uses."""
        value = self.steps[i].sides[side]
        used = set(self.links.values())
        idle = [j for j in range(i) if self.results[j] == value and j not in used]
        others = [
            self.steps[k].sides[other]
            for k in range(len(self.steps))
            for other in (0, 1)
            if (k, other) != (i, side) and (k, other) not in self.links
        ]
        stated_is_idle = value in self.free and value not in others
        if len(idle) == 1 and not stated_is_idle:
            self.links[i, side] = idle[0]
            return True
        return not idle and stated_is_idle


def _exact(value: Fraction) -> Exact:
    return value.numerator if value.denominator == 1 else value


def _places(value: Fraction) -> int:
    _, dot, digits = format_number(value).partition(".")
    return len(digits) if dot else 0


def link_numbers(problem: Problem) -> Template | None:
    """The problem with its free numbers marked, or None when no number can safely change.

    An operand is an earlier result, a number of the question, or a constant. Equal numbers of the question change
    together. Fixed are percents, fractions, decimals, years, clock times, ordinals, the values that words bring
    ("twice", "dozen", "week"), and whatever a number that comes from nowhere could have been made of.
    """
    steps = _parse_steps(problem)
    if not steps:
        return None
    linker = _Linker(problem, steps)
    if not linker.run() or not linker.free:
        return None
    operands = linker.stated_operands()
    # a number that the equations leave out may still have served in the head, unless they use nothing but the text's
    complete = operands <= linker.free
    free = [v for v in sorted(linker.free) if v in operands or complete]
    if not any(value in operands for value in free):
        return None
    index = {value: i for i, value in enumerate(free)}

    def operand(i: int, side: int) -> Operand:
        value = steps[i].sides[side]
        if (i, side) in linker.links:
            return Operand("step", linker.links[i, side], _exact(value))
        return Operand("variable" if value in index else "constant", index.get(value, -1), _exact(value))

    template_steps = []
    for i, equation in enumerate(steps):
        result = equation.result
        if _places(result) > _MAX_PLACES:
            return None
        template_steps.append(
            TemplateStep(equation.operator, operand(i, 0), operand(i, 1), result > 0, _places(result))
        )
    pieces, slots, end = [], [], 0
    for mention in linker.mentions:
        if mention.value in index and _may_vary(mention, problem.question):
            text = problem.question[mention.start : mention.end]
            pieces.append(problem.question[end : mention.start])
            slots.append(Slot(index[mention.value], mention.is_word, text[0].isupper(), "," in text))
            end = mention.end
    pieces.append(problem.question[end:])
    fixed = {int(m.value) for m in linker.mentions if m.value not in index and m.kind == "plain"}
    return Template(
        problem=problem,
        pieces=tuple(pieces),
        slots=tuple(slots),
        variables=tuple(Variable(int(value), value in operands) for value in free),
        steps=tuple(template_steps),
        fixed=tuple(sorted(fixed)),
    )
