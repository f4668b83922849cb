"""Stories with more numbers than the question needs: the reader has to find out who, what and when is asked about.

Equal sentences with another question have another answer, so that a model cannot go by the sentences alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from operator import add, floordiv, mul, sub

from tafkir.data.sources import Problem, Step
from tafkir.data.stories import DAYS, HOLDERS, NAMES, PLACES, THINGS

__all__ = ["make_crowded_story"]

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "old", "new", "big", "small")
_GOT = ("bought", "found", "picked", "made", "sold", "collected", "received")


_Operation = tuple[int, str, int]
_Story = tuple[str, tuple[_Operation, ...]]
"""A question and the operations that answer it; the last result is the answer."""


@dataclass(frozen=True, slots=True)
class _Table:
    """Counts of `things` (columns) for each row, a row being a person, a day or a place."""

    rows: tuple[str, ...]
    things: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    sentences: tuple[str, ...]
    """One sentence per row."""
    ask_row: str
    """How a question says "in this row", with {r} for the row."""


def _number(rng: random.Random) -> int:
    return rng.randint(2, 9) if rng.random() < 0.35 else rng.randint(10, 99)


def _list(counts: tuple[int, ...], things: tuple[str, ...]) -> str:
    parts = [f"{count} {thing}" for count, thing in zip(counts, things, strict=True)]
    return ", ".join(parts[:-1]) + f" and {parts[-1]}"


def _draw_table(rng: random.Random) -> _Table:
    num_rows, num_things = rng.choice(((2, 2), (2, 2), (3, 2), (2, 3)))
    if rng.random() < 0.4:
        thing = rng.choice(THINGS)
        things = tuple(f"{colour} {thing}" for colour in rng.sample(COLOURS, num_things))
    else:
        things = tuple(rng.sample(THINGS, num_things))
    counts = tuple(tuple(_number(rng) for _ in range(num_things)) for _ in range(num_rows))
    lists = [_list(row, things) for row in counts]
    kind = rng.randrange(3)
    if kind == 0:
        rows = tuple(rng.sample(NAMES, num_rows))
        verb = rng.choice(("has", "bought", "found", "made", "brought", "owns"))
        return _Table(rows, things, counts, tuple(f"{r} {verb} {x}." for r, x in zip(rows, lists, strict=True)), "{r}")
    if kind == 1:
        name, verb = rng.choice(NAMES), rng.choice(_GOT)
        rows = tuple(rng.sample(DAYS, num_rows))
        told = tuple(f"On {r} {name} {verb} {x}." for r, x in zip(rows, lists, strict=True))
        return _Table(rows, things, counts, told, "on {r}")
    rows = tuple(rng.sample(PLACES, num_rows))
    told = tuple(f"There are {x} in the {r}." for r, x in zip(rows, lists, strict=True))
    return _Table(rows, things, counts, told, "in the {r}")


def _compare_rows(rng: random.Random, table: _Table) -> _Story:
    """How many more of one thing in one row than in another."""
    column = rng.randrange(len(table.things))
    i, j = rng.sample(range(len(table.rows)), 2)
    if table.counts[i][column] < table.counts[j][column]:
        i, j = j, i
    a, b = table.counts[i][column], table.counts[j][column]
    first, second = (table.ask_row.format(r=table.rows[row]) for row in (i, j))
    thing = table.things[column]
    if table.ask_row == "{r}":
        texts = [f"How many more {thing} does {first} have than {second}?"]
        short = f"How many fewer {thing} does {second} have?"
    else:
        texts = [f"How many more {thing} were there {first} than {second}?"]
        short = f"How many more {thing} is that {first}?"
    # The short form names one row only, which is clear when there are two.
    text = rng.choice([*texts, short] if len(table.rows) == 2 else texts)
    return text, ((a, "-", b),)


def _compare_things(rng: random.Random, table: _Table) -> _Story:
    """How many more of one thing than of another, in the same row."""
    row = rng.randrange(len(table.rows))
    i, j = rng.sample(range(len(table.things)), 2)
    if table.counts[row][i] < table.counts[row][j]:
        i, j = j, i
    place = table.ask_row.format(r=table.rows[row])
    if table.ask_row == "{r}":
        text = f"How many more {table.things[i]} than {table.things[j]} does {place} have?"
    else:
        text = f"How many more {table.things[i]} than {table.things[j]} are there {place}?"
    return text, ((table.counts[row][i], "-", table.counts[row][j]),)


def _sum_rows(rng: random.Random, table: _Table) -> _Story:
    """How many of one thing over the first two rows."""
    column = rng.randrange(len(table.things))
    text = rng.choice(("How many {t} are there altogether?", "How many {t} do they have in all?"))
    if len(table.rows) > 2:
        text = "How many {t} is that for {a} and {b} together?"
    thing = table.things[column]
    a, b = table.rows[:2]
    return text.format(t=thing, a=a, b=b), ((table.counts[0][column], "+", table.counts[1][column]),)


def _sum_things(rng: random.Random, table: _Table) -> _Story:
    """How many of the first two things in one row."""
    row = rng.randrange(len(table.rows))
    place = table.ask_row.format(r=table.rows[row])
    first, second = table.things[:2]
    if table.ask_row == "{r}":
        text = f"How many {first} and {second} does {place} have in total?"
    else:
        text = f"How many {first} and {second} are there {place}?"
    return text, ((table.counts[row][0], "+", table.counts[row][1]),)


def _from_table(rng: random.Random) -> _Story:
    """A table and a question about two of its cells."""
    table = _draw_table(rng)
    ask = rng.choice((_compare_rows, _compare_rows, _compare_things, _sum_rows, _sum_things))
    question, operations = ask(rng, table)
    return " ".join((*table.sentences, question)), operations


def _groups(rng: random.Random) -> _Story:
    """Holders with two kinds of things each, or things shared out beside an idle count."""
    a, b, c = rng.randint(2, 30), _number(rng), _number(rng)
    t, u = rng.sample(THINGS, 2)
    h, p, n = rng.choice(HOLDERS), rng.choice(PLACES), rng.choice(NAMES)
    if rng.random() < 0.5:
        body = f"There are {a} {h} in the {p}. Each of them has {b} {t} and {c} {u}."
        if rng.random() < 0.5:
            return f"{body} How many {t} are there in all?", ((a, "*", b),)
        return f"{body} How many {u} are in the {h} altogether?", ((a, "*", c),)
    body = f"{n} has {a * b} {t} and {c} {u}."
    if rng.random() < 0.5:
        return f"{body} If the {t} are put into {a} {h}, how many {t} are in each?", ((a * b, "/", a),)
    return f"{body} If each of the {h} holds {a} {t}, how many {h} are needed?", ((a * b, "/", a),)


def _before_after(rng: random.Random) -> _Story:
    """Two things of one person before and after; the question is about one of them."""
    a, b, x, y = (_number(rng) for _ in range(4))
    a, x = a + b, x + y
    t, u = rng.sample(THINGS, 2)
    n, p = rng.choice(NAMES), rng.choice(PLACES)
    if rng.random() < 0.5:
        body = f"{n} had {a} {t} and {x} {u}. Now there are {b} {t} and {y} {u} left."
        if rng.random() < 0.5:
            return f"{body} How many {t} are gone?", ((a, "-", b),)
        return f"{body} How many {u} did {n} use?", ((x, "-", y),)
    body = f"{n} found {b} {t} and {y} {u} at the {p}. Now {n} has {a} {t} and {x} {u}."
    if rng.random() < 0.4:
        return f"{body} How many {t} did {n} have at first?", ((a, "-", b),)
    if rng.random() < 0.5:
        return f"{body} How many {u} did {n} have before that?", ((x, "-", y),)
    more, fewer = max(a, x), min(a, x)
    first, second = (t, u) if a >= x else (u, t)
    return f"{body} How many more {first} than {second} does {n} have now?", ((more, "-", fewer),)


def _compared_in_a_row(rng: random.Random) -> _Story:
    """Three take part; each is told by how much he is ahead of, or behind, the one before."""
    first, second, third = rng.sample(NAMES, 3)
    verb, unit = rng.choice((("jumped", "inches"), ("ran", "miles"), ("scored", "points"), ("threw it", "feet")))
    a, b, c = _number(rng) + 40, rng.randint(2, 20), rng.randint(2, 20)
    sign, word = rng.choice((("+", "more"), ("-", "less")))
    second_is = a + b if sign == "+" else a - b
    body = (
        f"{first} {verb} {a} {unit}. {second} {verb} {b} {unit} {word} than {first}. "
        f"{third} {verb} {c} {unit} more than {second}."
    )
    if rng.random() < 0.5:
        return f"{body} How many {unit} was that for {second}?", ((a, sign, b),)
    return f"{body} How many {unit} was that for {third}?", ((a, sign, b), (second_is, "+", c))


def _some_others(rng: random.Random) -> _Story:
    """An unknown part: found from the whole, or from how much larger it is."""
    thing, (known, other) = rng.choice(THINGS), rng.sample(COLOURS, 2)
    a, d, holder = _number(rng), _number(rng), rng.choice(("basket", "box", "bag", "jar"))
    body = f"There are {a} {known} {thing} and some {other} {thing} in a {holder}."
    ask = f"How many {other} {thing} are in the {holder}?"
    kind = rng.randrange(3)
    if kind == 0:
        return f"{body} If there are {a + d} {thing} in total, {ask[0].lower()}{ask[1:]}", ((a + d, "-", a),)
    body += f" There are {d} more {other} {thing} than {known} {thing}."
    if kind == 1:
        return f"{body} {ask}", ((a, "+", d),)
    return f"{body} How many {thing} are in the {holder} altogether?", ((a, "+", d), (a, "+", a + d))


def _lost_and_given(rng: random.Random) -> _Story:
    """Two ways to have fewer: their sum, their difference, or what is left."""
    name, friend = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    b, c = _number(rng), _number(rng)
    left = rng.randint(2, 99)
    body = f"{name} had {b + c + left} {thing}. {name} lost {b} of them and gave {c} to {friend}."
    kind = rng.randrange(3)
    if kind == 0:
        return f"{body} How many {thing} were lost or given away?", ((b, "+", c),)
    if kind == 1:
        more, fewer = ("lost", "given away") if b >= c else ("given away", "lost")
        return f"{body} How many more {thing} were {more} than {fewer}?", ((max(b, c), "-", min(b, c)),)
    return f"{body} How many {thing} are left?", ((b + c + left, "-", b), (c + left, "-", c))


def _every_day(rng: random.Random) -> _Story:
    """Two things done every day, for some days."""
    name = rng.choice(NAMES)
    t, u = rng.sample(THINGS, 2)
    a, b, d = rng.randint(2, 30), rng.randint(2, 30), rng.randint(2, 12)
    verb = rng.choice(("makes", "sells", "eats", "uses", "collects"))
    body = f"{name} {verb} {a} {t} and {b} {u} every day."
    kind = rng.randrange(4)
    if kind == 0:
        return f"{body} How many {u} is that in {d} days?", ((d, "*", b),)
    if kind == 1:
        return f"{body} How many days does it take until there were {a * d} {t}?", ((a * d, "/", a),)
    if kind == 2:
        return f"{body} How many more {t} than {u} is that after {d} days, or the other way round?", (
            (max(a, b), "-", min(a, b)),
            (max(a, b) - min(a, b), "*", d),
        )
    return f"{body} How many things is that in {d} days?", ((a, "+", b), (a + b, "*", d))


def _in_each(rng: random.Random) -> _Story:
    """Groups with two kinds of things: one group, all groups, or how many groups."""
    thing, (x, y) = rng.choice(THINGS), rng.sample(COLOURS, 2)
    k, a, b, holder = rng.randint(2, 20), rng.randint(2, 20), rng.randint(2, 20), rng.choice(HOLDERS)
    each = f"Each of them has {a} {x} {thing} and {b} {y} {thing}."
    kind = rng.randrange(3)
    if kind == 0:
        return f"There are {k} {holder}. {each} How many {thing} are in each?", ((a, "+", b),)
    if kind == 1:
        return f"There are {k} {holder}. {each} How many {thing} are there in all?", ((a, "+", b), (a + b, "*", k))
    body = f"There are {k * (a + b)} {thing} in some {holder}. {each}"
    return f"{body} How many {holder} are there?", ((a, "+", b), (k * (a + b), "/", a + b))


def _shopping(rng: random.Random) -> _Story:
    """Two prices and what is paid."""
    name = rng.choice(NAMES)
    t, u = rng.sample(THINGS, 2)
    n, m, p, q = rng.randint(2, 12), rng.randint(2, 12), rng.randint(2, 15), rng.randint(2, 15)
    kind = rng.randrange(4)
    if kind < 2:
        body = f"{name} bought {n} {t} for {p} dollars each and {m} {u} for {q} dollars each."
        if kind == 0:
            return f"{body} How much did the {u} cost?", ((m, "*", q),)
        return f"{body} How much did {name} pay in all?", ((n, "*", p), (m, "*", q), (n * p, "+", m * q))
    x, y, left = _number(rng), _number(rng), _number(rng)
    body = f"{name} had {x + y + left} dollars. {name} spent {x} dollars on {t} and {y} dollars on {u}."
    if kind == 2:
        return f"{body} How much did {name} spend?", ((x, "+", y),)
    return f"{body} How many dollars are left?", ((x, "+", y), (x + y + left, "-", x + y))


def _with_a_limit(rng: random.Random) -> _Story:
    """A limit that has nothing to do with the question."""
    a, b = _number(rng), _number(rng)
    limit = a + b + rng.randint(1, 40)
    place = rng.choice(("bus", "train", "boat", "room"))
    more = rng.choice((True, False))
    body = f"There were {a + (0 if more else b)} people in a {place} that holds {limit}."
    if more:
        return f"{body} Then {b} more came in. How many people are in the {place} now?", ((a, "+", b),)
    return f"{body} Then {b} of them left. How many people are in the {place} now?", ((a + b, "-", b),)


_TELLERS = (
    (_from_table, 40),
    (_groups, 12),
    (_before_after, 15),
    (_compared_in_a_row, 6),
    (_some_others, 8),
    (_lost_and_given, 8),
    (_every_day, 8),
    (_in_each, 8),
    (_shopping, 8),
    (_with_a_limit, 4),
)
_APPLY: dict[str, Callable[[int, int], int]] = {"+": add, "-": sub, "*": mul, "/": floordiv}


def make_crowded_story(seed: int) -> Problem:
    """The crowded story of this seed: a pure function, unlimited in number."""
    rng = random.Random(seed)
    tell = rng.choices([teller for teller, _ in _TELLERS], [weight for _, weight in _TELLERS])[0]
    question, operations = tell(rng)
    steps = tuple(Step(f"{x}{sign}{y}", str(_APPLY[sign](x, y))) for x, sign, y in operations)
    return Problem(f"crowded-{seed}", "stories", "train", question, steps[-1].result, steps)
