"""Fresh variants of training problems: other numbers, other names, the answer recomputed from the equations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from random import Random

from tafkir.data.arithmetic import format_number
from tafkir.data.linking import Exact, Operand, Template, TemplateStep, link_numbers
from tafkir.data.names import FEMALE, MALE, NEUTRAL
from tafkir.data.numbers import words_for
from tafkir.data.sources import Problem, Step
from tafkir.recipe.schema import AugmentConfig

__all__ = ["augment", "rename", "renumber"]

ATTEMPTS = 40
LARGEST_WORD = 20

_NAMES = tuple(tuple(sorted(group)) for group in (FEMALE, MALE, NEUTRAL))
_GROUP_OF = {name: group for group in _NAMES for name in group}
_NAME = re.compile(r"\b[A-Z][a-z]+\b")
_LOWER = re.compile(r"\b[a-z]+\b")
_ARTICLE = re.compile(r"\b([Aa])n?([ -])$")


class _DeadEnd(Exception):
    """The numbers drawn so far lead to a result that the problem does not allow."""


class _Draw:
    """One try at new values: variables are drawn where the equations first meet them, within what still fits."""

    def __init__(self, template: Template, random: Random, limit: int, reach: float) -> None:
        self.template, self.random, self.limit, self.reach = template, random, limit, reach
        self.values: list[int | None] = [None] * len(template.variables)
        self.results: list[Exact] = []

    def run(self) -> None:
        for step in self.template.steps:
            self.results.append(self.result(step))
        for i, variable in enumerate(self.template.variables):
            if not variable.used:
                self.values[i] = self.fresh(variable.value, 2, self.limit)
        self.check_order()

    def result(self, step: TemplateStep) -> Exact:
        left, right = self.known(step.left), self.known(step.right)
        if left is None and right is None:
            if step.operator == "/":
                right = self.draw(step.right, 2, self.limit // 2)
            else:
                left = self.draw(step.left, 2, self.limit)
        if left is None:
            assert right is not None
            left = self.draw_left(step, right)
        right = self.known(step.right)
        if right is None:
            right = self.draw_right(step, left)
        return self.checked(step, left, right)

    def checked(self, step: TemplateStep, left: Exact, right: Exact) -> Exact:
        if step.operator == "+":
            value = left + right
        elif step.operator == "-":
            value = left - right
        elif step.operator == "*":
            value = left * right
        elif not right:
            raise _DeadEnd
        else:
            value = Fraction(left) / right
        if isinstance(value, Fraction):
            if 10**step.places % value.denominator:
                raise _DeadEnd
            if value.denominator == 1:
                value = value.numerator
        if value > self.limit or value < 0 or (step.positive and value == 0):
            raise _DeadEnd
        return value

    def known(self, operand: Operand) -> Exact | None:
        if operand.kind == "constant":
            return operand.value
        return self.results[operand.index] if operand.kind == "step" else self.values[operand.index]

    def draw_left(self, step: TemplateStep, right: Exact) -> int:
        if step.operator == "-":
            return self.draw(step.left, int(right) + 1, self.limit)
        if step.operator == "/" and isinstance(right, int) and right > 0 and step.places == 0:
            # an exact division: draw the quotient
            quotient = max(1, int(step.left.value) // right)
            value = right * self.fresh(max(2, quotient), 1 if right > 1 else 2, self.limit // right)
            self.values[step.left.index] = value
            return value
        return self.draw(step.left, 2, self.room(step.operator, right))

    def draw_right(self, step: TemplateStep, left: Exact) -> int:
        if step.operator == "-":
            return self.draw(step.right, 2, int(left) - (1 if step.positive else 0))
        if step.operator == "/" and isinstance(left, int) and step.places == 0:
            original = int(step.right.value)
            divisors = [d for d in range(2, min(left, 4 * original + 4) + 1) if left % d == 0]
            if not divisors:
                raise _DeadEnd
            value = divisors[int(self.random.random() * len(divisors))]
            self.values[step.right.index] = value
            return value
        return self.draw(step.right, 2, self.room(step.operator, left))

    def room(self, operator: str, other: Exact) -> int:
        """The largest second number with which a sum or product stays within the limit."""
        if operator == "+":
            return int(self.limit - other)
        if operator == "*" and other > 0:
            return int(self.limit / other)
        return self.limit

    def draw(self, operand: Operand, low: int, high: int) -> int:
        value = self.fresh(int(operand.value), low, high)
        self.values[operand.index] = value
        return value

    def fresh(self, original: int, low: int, high: int) -> int:
        """A number of the original's magnitude, and mostly of its roundness, within [low, high]."""
        if original <= 12:
            bottom, top = 2, 12 if original <= 8 else 20
        else:
            bottom, top = original // 3, int(original * self.reach)
        unit = 1
        if original >= 20 and self.random.random() < 0.7:
            unit = 100 if original % 100 == 0 else 10 if original % 10 == 0 else 5 if original % 5 == 0 else 1
        top = min(top, high)
        bottom = max(low, min(bottom, top // 2))
        first, last = -(-bottom // unit), top // unit
        if first > last:
            unit, first, last = 1, bottom, top
        if first > last:
            raise _DeadEnd
        return unit * (first + int(self.random.random() * (last - first + 1)))

    def check_order(self) -> None:
        """A number that the equations do not use keeps its place among the others: a condition may rest on it."""
        variables, values, fixed = self.template.variables, self.values, self.template.fixed
        for i, variable in enumerate(variables):
            if variable.used:
                continue
            mine = values[i]
            assert mine is not None
            for j, other in enumerate(variables):
                theirs = values[j]
                assert theirs is not None
                if i != j and (variable.value < other.value) != (mine < theirs):
                    raise _DeadEnd
            if any((variable.value < constant) != (mine < constant) for constant in fixed):
                raise _DeadEnd


def _article(piece: str, number: str) -> str:
    """ "an " before 8, 11, 18 and 80-odd, "a " before the rest."""
    vowel = number[0] == "8" or number in ("11", "18") or number.lower().startswith(("eight", "eleven"))
    return _ARTICLE.sub(lambda match: match[1] + ("n" if vowel else "") + match[2], piece)


def _write_question(template: Template, values: Sequence[int]) -> str:
    text = []
    for piece, slot in zip(template.pieces, template.slots, strict=False):
        value = values[slot.variable]
        if slot.is_word and value <= LARGEST_WORD:
            number = words_for(value)
            number = number.capitalize() if slot.capital else number
        else:
            number = f"{value:,}" if slot.comma else str(value)
        text += [_article(piece, number) if piece.endswith(("a ", "n ", "a-", "n-")) else piece, number]
    return "".join([*text, template.pieces[-1]])


def _format(value: Exact) -> str:
    return str(value) if isinstance(value, int) else format_number(value)


def renumber(template: Template, random: Random, max_number: int) -> Problem | None:
    """The problem with new numbers and a new answer, or None when no fitting numbers turn up.

    Divisions stay exact (results get no more decimals than they had), results stay positive where they were, and no
    number drawn or computed exceeds `max_number`.
    """
    for attempt in range(ATTEMPTS):
        draw = _Draw(template, random, max_number, 3.0 if attempt < ATTEMPTS // 2 else 1.5)
        try:
            draw.run()
        except _DeadEnd:
            continue
        values = [value for value in draw.values if value is not None]
        steps = []
        for step, result in zip(template.steps, draw.results, strict=True):
            left, right = draw.known(step.left), draw.known(step.right)
            assert left is not None and right is not None
            steps.append(Step(f"{_format(left)}{step.operator}{_format(right)}", _format(result)))
        question = _write_question(template, values)
        return replace(template.problem, question=question, steps=tuple(steps), answer=steps[-1].result)
    return None


def rename(problem: Problem, random: Random) -> Problem:
    """The problem with its people's first names swapped for others of the same pronoun; one name, one new name."""
    present = {name for name in _NAME.findall(problem.question) if name in _GROUP_OF}
    # a name that is also written small would be swapped in one place only
    present -= {word.capitalize() for word in _LOWER.findall(problem.question)}
    if not present:
        return problem
    taken = set(present)
    new_names = {}
    for name in sorted(present):
        group = _GROUP_OF[name]
        while (candidate := group[int(random.random() * len(group))]) in taken:
            pass
        taken.add(candidate)
        new_names[name] = candidate
    question = _NAME.sub(lambda match: new_names.get(match[0], match[0]), problem.question)
    return replace(problem, question=question)


@lru_cache(maxsize=1 << 15)
def _template(problem: Problem, max_number: int) -> Template | None:
    """The problem's template, None also where a trial finds no numbers within the limit."""
    template = link_numbers(problem)
    return template if template and renumber(template, Random(0), max_number) else None


def augment(problem: Problem, seed: int, config: AugmentConfig) -> Problem:
    """A variant of a training problem, a pure function of its arguments; the id stays.

    With probability `config.renumber` it gets new numbers (where they link), with `config.rename` new names.

    Raises:
        ValueError: the problem is held out: those are never varied.
    """
    if problem.split != "train":
        raise ValueError(f"{problem.id} is a {problem.split} problem: only training problems are varied")
    random = Random(seed)
    if random.random() < config.renumber:
        template = _template(problem, config.max_number)
        if template is not None:
            problem = renumber(template, random, config.max_number) or problem
    if random.random() < config.rename:
        problem = rename(problem, random)
    return problem
