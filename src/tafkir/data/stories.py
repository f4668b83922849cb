"""Short word problems of our own making, told from templates: `datasets/stories/*.txt`.

The real sets hold few ways to say "gave away" or "each"; a small model trained from nothing needs to read many more. A
template is a body and several questions about it with different equations, so that the answer hangs on the question.

A template, in short (`datasets/stories/README.md` has it in full)::

    let p = b*k
    range b 2..12
    set x = apple/apples|pear/pears
    {N} has {p} {x} and {c} {u}. | There are {p} {x} at home.
    ? {M} is {z} years old.
    {He} puts {b} {x} into each [box|bag].
    >> p/b :: How many boxes does {he} need? | How many boxes can {N} fill?
    >> p-b :: How many {x} are left when the first box is full?
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from importlib.resources import files

from tafkir.data.arithmetic import format_number
from tafkir.data.names import FEMALE, MALE
from tafkir.data.sources import Problem, Step
from tafkir.errors import DataError

__all__ = ["Operation", "Template", "make_story", "parse_templates", "read_templates", "tell"]

# Words as text: as lists of literals they would fill a screen each.
NAMES = tuple(
    "Adam Aisha Amal Amy Andre Bella Carlos Clara Dalia David Elena Eric Fatima Frank Grace Hana Hassan Ian Jane Jamal "
    "Julia Kate Khalid Laila Liam Lina Maha Maria Mark Mona Nadia Noah Olga Omar Paul Rana Rosa Sami Sara Tariq Tina "
    "Tom Vera Yara Yusuf Zain".split()
)
THINGS = tuple(
    "apples bagels balloons balls bananas beads blocks books bottles bracelets buttons candies candles cards "
    "carrots coins cookies crayons cups cupcakes dolls donuts eggs feathers flowers grapes hats keys lemons "
    "lollipops magnets marbles markers mints muffins notebooks nuts onions oranges peaches pears pencils pens "
    "peppers photos pies pins plates plums postcards potatoes puzzles ribbons roses sandwiches scarves seeds shells "
    "shirts socks spoons stamps stickers stones straws tomatoes toys tulips".split()
)
HOLDERS = tuple("boxes bags baskets jars shelves rows packs trays albums cartons".split())
PLACES = tuple("store library garden kitchen classroom park market farm school bakery".split())
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

_GENDERED = (tuple(sorted(MALE)), tuple(sorted(FEMALE)))
_PRONOUNS = (("he", "his", "him"), ("she", "her", "her"))
_LARGEST = 9999

Operation = tuple[str, str, str]
"""Left operand, operator, right operand: names of numbers, of earlier results (`r0`, `r1`, ...), or integers."""


@dataclass(frozen=True, slots=True)
class _Question:
    steps: tuple[Operation, ...]
    wordings: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """One body with its questions; `where` is file:line."""

    where: str
    body: tuple[tuple[bool, tuple[str, ...]], ...]
    """(told only half of the time, the ways to tell it) for every part."""
    questions: tuple[_Question, ...]
    derived: Mapping[str, Operation] = field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_SLOT = re.compile(r"\{(\w+)(\.1)?(?::([^}]*))?\}")
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_OPERATION = re.compile(r"^\s*(\w+)\s*([-+*/])\s*(\w+)\s*$")
_FIXED = frozenset(
    "N M L t u v h P Q D E he He his His him mhe mHe mhis mHis mhim".split(),
)


def _ways(text: str) -> tuple[str, ...]:
    """Full alternatives: split at ` | ` outside of brackets and braces."""
    depth, start, parts = 0, 0, []
    for i, char in enumerate(text):
        depth += (char in "[{") - (char in "]}")
        if char == "|" and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return tuple(part for part in (*parts, text[start:].strip()) if part)


def _operation(text: str, where: str) -> Operation:
    match = _OPERATION.match(text)
    if match is None:
        raise DataError(f"{text.strip()!r} is not one operation", where=where, expected="such as a+b, r0*2 or p/k")
    return match[1], match[2], match[3]


def _parse_block(lines: list[tuple[int, str]], name: str) -> Template:
    derived: dict[str, Operation] = {}
    ranges: dict[str, tuple[int, int]] = {}
    words: dict[str, tuple[str, ...]] = {}
    body: list[tuple[bool, tuple[str, ...]]] = []
    questions: list[_Question] = []
    for number, line in lines:
        where = f"{name}:{number}"
        if match := re.match(r"let (\w+)\s*=(.*)", line):
            derived[match[1]] = _operation(match[2], where)
        elif match := re.match(r"range (\w+) (\d+)\.\.(\d+)$", line):
            ranges[match[1]] = int(match[2]), int(match[3])
        elif match := re.match(r"set (\w+)\s*=(.*)", line):
            words[match[1]] = tuple(form.strip() for form in match[2].split("|"))
        elif line.startswith(">>"):
            equations, _, wordings = line[2:].partition("::")
            steps = tuple(_operation(part, where) for part in equations.split(";"))
            questions.append(_Question(steps, _ways(wordings)))
        elif line.startswith("? "):
            body.append((True, _ways(line[2:])))
        else:
            body.append((False, _ways(line)))
    where = f"{name}:{lines[0][0]}"
    template = Template(where, tuple(body), tuple(questions), _in_order(derived, where), ranges, words)
    _check(template)
    return template


def _in_order(derived: Mapping[str, Operation], where: str) -> dict[str, Operation]:
    """Each number after those that it derives from."""
    ordered: dict[str, Operation] = {}
    while len(ordered) < len(derived):
        waiting = set(derived) - set(ordered)
        ready = sorted(name for name in waiting if not {derived[name][0], derived[name][2]} & waiting)
        if not ready:
            raise DataError(f"{', '.join(sorted(waiting))} derive from each other", where=where)
        ordered |= {name: derived[name] for name in ready}
    return ordered


def _check(template: Template) -> None:
    """Refuse what could not be told."""
    flaw = ""
    if not template.questions or not all(question.wordings for question in template.questions):
        flaw = "a template needs a question: '>> a+b :: How many ...?'"
    for question in template.questions:
        for i, (left, _, right) in enumerate(question.steps):
            for operand in (left, right):
                if re.fullmatch(r"r\d", operand) and int(operand[1]) >= i:
                    flaw = f"{operand} is used before it is known"
                elif operand in _FIXED or operand in template.words:
                    flaw = f"{operand} is a word, not a number"
    for text in _texts(template):
        if re.search(r"[\[\]{}]", _SLOT.sub("", _CHOICE.sub("", text))):
            flaw = f"brackets do not match in {text!r}"
    if flaw:
        raise DataError(flaw, where=template.where, fix="see datasets/stories/README.md")


def _texts(template: Template) -> Iterable[str]:
    for _, ways in template.body:
        yield from ways
    for question in template.questions:
        yield from question.wordings


def parse_templates(text: str, name: str) -> tuple[Template, ...]:
    """The templates of one file, `name` being what errors call it.

    Raises:
        DataError: a line is not understood (file:line).
    """
    blocks: list[list[tuple[int, str]]] = [[]]
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            blocks.append([])
        elif not line.startswith("#"):
            blocks[-1].append((number, line.strip()))
    return tuple(_parse_block(block, name) for block in blocks if block)


@cache
def read_templates() -> tuple[Template, ...]:
    """All templates of the package, in the order of file names."""
    folder = files("tafkir") / "datasets" / "stories"
    sources = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".txt")), key=lambda entry: entry.name)
    return tuple(t for entry in sources for t in parse_templates(entry.read_text(encoding="utf-8"), entry.name))


@cache
def _number_names(template: Template) -> tuple[str, ...]:
    """The numbers that are drawn, in a fixed order."""
    words = _FIXED | set(template.words)
    names: set[str] = set()
    for text in _texts(template):
        slots = _SLOT.findall(text)
        words |= {name for name, _, forms in slots if forms}
        names |= {name for name, _, _ in slots}
    operations = [*template.derived.values(), *(step for q in template.questions for step in q.steps)]
    names |= {name for left, _, right in operations for name in (left, right)}
    names = {name for name in names if not re.fullmatch(r"\d+|r\d", name)}
    return tuple(sorted(names - words - set(template.derived)))


def _draw(rng: random.Random, bounds: tuple[int, int] | None) -> int:
    if bounds is not None:
        return rng.randint(*bounds)
    digits = rng.choices((1, 2, 3), weights=(7, 11, 2))[0]
    return rng.randint(2 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


_APPLY: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / y,
}


def _calculate(steps: Iterable[Operation], values: Mapping[str, int]) -> list[Step] | None:
    """The steps in numbers; None where a result is not a positive whole number of at most four digits."""
    known = dict(values)
    told = []
    for i, (left, sign, right) in enumerate(steps):
        x, y = (known[name] if name in known else int(name) for name in (left, right))
        if y == 0:
            return None
        result = _APPLY[sign](Fraction(x), Fraction(y))
        if result.denominator != 1 or not 0 < result <= _LARGEST:
            return None
        known[f"r{i}"] = int(result)
        told.append(Step(f"{x}{sign}{y}", format_number(int(result))))
    return told


def _draw_numbers(rng: random.Random, template: Template) -> dict[str, int] | None:
    values = {name: _draw(rng, template.ranges.get(name)) for name in _number_names(template)}
    for name, operation in template.derived.items():
        told = _calculate([operation], values)
        low, high = template.ranges.get(name, (1, _LARGEST))
        if told is None or not low <= int(told[0].result) <= high:
            return None
        values[name] = int(told[0].result)
    return values


def _fit(rng: random.Random, template: Template, question: _Question) -> tuple[dict[str, int], list[Step]]:
    """Numbers that give this question an answer; most of the time they would give the others one, too."""
    for attempt in range(3000):
        values = _draw_numbers(rng, template)
        told = values and _calculate(question.steps, values)
        # What the other questions ask is most often true of the body: "gave 5 of his 3" reads badly.
        if values and told and (attempt > 40 or all(_calculate(q.steps, values) for q in template.questions)):
            return values, told
    raise DataError("no numbers fit this template", where=template.where, fix="give ranges, or derive with 'let'")


def _words(rng: random.Random, template: Template) -> dict[str, str]:
    genders = [rng.randrange(2) for _ in range(3)]
    names: list[str] = []
    for gender in genders:
        pool = _GENDERED[gender]
        names.append(rng.choice([name for name in (rng.choice(pool), rng.choice(pool)) if name not in names] or pool))
    words = dict(zip("NML", names, strict=True))
    for prefix, gender in (("", genders[0]), ("m", genders[1])):
        he, his, him = _PRONOUNS[gender]
        words |= {f"{prefix}he": he, f"{prefix}He": he.capitalize(), f"{prefix}him": him}
        words |= {f"{prefix}his": his, f"{prefix}His": his.capitalize()}
    words |= dict(zip("tuv", rng.sample(THINGS, 3), strict=True)) | dict(zip("PQ", rng.sample(PLACES, 2), strict=True))
    words |= dict(zip("DE", rng.sample(DAYS, 2), strict=True)) | {"h": rng.choice(HOLDERS)}
    return words | {name: rng.choice(forms) for name, forms in template.words.items()}


def _fill(rng: random.Random, text: str, words: dict[str, str], values: Mapping[str, int], where: str) -> str:
    def slot(match: re.Match[str]) -> str:
        name, singular, forms = match[1], match[2], match[3]
        if forms is not None:
            words[name] = rng.choice(forms.split("|"))
        if name not in words:
            if name not in values:
                raise DataError(f"{{{name}}} is neither a number nor a word here", where=where)
            return str(values[name])
        first, _, last = words[name].partition("/")
        return first if singular or not last else last

    return _SLOT.sub(slot, _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), text))


def tell(template: Template, rng: random.Random, id: str) -> Problem:
    """One problem from a template.

    Raises:
        DataError: no numbers fit, or a slot is not defined.
    """
    question = rng.choice(template.questions)
    values, steps = _fit(rng, template, question)
    words = _words(rng, template)
    parts = [rng.choice(ways) for optional, ways in template.body if not optional or rng.random() < 0.5]
    parts.append(rng.choice(question.wordings))
    text = " ".join(_fill(rng, part, words, values, template.where) for part in parts)
    return Problem(id, "stories", "train", text, steps[-1].result, tuple(steps))


def make_story(seed: int) -> Problem:
    """The story of this seed: a pure function, unlimited in number."""
    rng = random.Random(seed)
    return tell(rng.choice(read_templates()), rng, f"story-{seed}")
