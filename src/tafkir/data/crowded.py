"""Stories with more numbers than the question needs: the reader has to find out who, what and when is asked about.

A small table of counts (two or three rows by two or three columns) is told as sentences in a shuffled order; the
question is about two of its cells. Equal sentences with another question have another answer, so that a model cannot
go by the sentences alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tafkir.data.sources import Problem, Step
from tafkir.data.stories import DAYS, HOLDERS, NAMES, PLACES, THINGS

__all__ = ["make_crowded_story"]

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "old", "new", "big", "small")
_GOT = ("bought", "found", "picked", "made", "sold", "collected", "received")


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


def _compare_rows(rng: random.Random, table: _Table) -> tuple[str, str, int, int]:
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
    return text, "-", a, b


def _compare_things(rng: random.Random, table: _Table) -> tuple[str, str, int, int]:
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
    return text, "-", table.counts[row][i], table.counts[row][j]


def _sum_rows(rng: random.Random, table: _Table) -> tuple[str, str, int, int]:
    """How many of one thing over the first two rows."""
    column = rng.randrange(len(table.things))
    text = rng.choice(("How many {t} are there altogether?", "How many {t} do they have in all?"))
    if len(table.rows) > 2:
        text = "How many {t} is that for {a} and {b} together?"
    thing = table.things[column]
    a, b = table.rows[:2]
    return text.format(t=thing, a=a, b=b), "+", table.counts[0][column], table.counts[1][column]


def _sum_things(rng: random.Random, table: _Table) -> tuple[str, str, int, int]:
    """How many of the first two things in one row."""
    row = rng.randrange(len(table.rows))
    place = table.ask_row.format(r=table.rows[row])
    first, second = table.things[:2]
    if table.ask_row == "{r}":
        text = f"How many {first} and {second} does {place} have in total?"
    else:
        text = f"How many {first} and {second} are there {place}?"
    return text, "+", table.counts[row][0], table.counts[row][1]


def _groups(rng: random.Random) -> tuple[str, tuple[str, str, int, int]]:
    """Holders with two kinds of things each, or things shared out beside an idle count."""
    a, b, c = rng.randint(2, 30), _number(rng), _number(rng)
    t, u = rng.sample(THINGS, 2)
    h, p, n = rng.choice(HOLDERS), rng.choice(PLACES), rng.choice(NAMES)
    if rng.random() < 0.5:
        body = f"There are {a} {h} in the {p}. Each of them has {b} {t} and {c} {u}."
        if rng.random() < 0.5:
            return f"{body} How many {t} are there in all?", ("", "*", a, b)
        return f"{body} How many {u} are in the {h} altogether?", ("", "*", a, c)
    body = f"{n} has {a * b} {t} and {c} {u}."
    if rng.random() < 0.5:
        return f"{body} If the {t} are put into {a} {h}, how many {t} are in each?", ("", "/", a * b, a)
    return f"{body} If each of the {h} holds {a} {t}, how many {h} are needed?", ("", "/", a * b, a)


def _before_after(rng: random.Random) -> tuple[str, tuple[str, str, int, int]]:
    """Two things of one person before and after; the question is about one of them."""
    a, b, x, y = (_number(rng) for _ in range(4))
    a, x = a + b, x + y
    t, u = rng.sample(THINGS, 2)
    n, p = rng.choice(NAMES), rng.choice(PLACES)
    if rng.random() < 0.5:
        body = f"{n} had {a} {t} and {x} {u}. Now there are {b} {t} and {y} {u} left."
        if rng.random() < 0.5:
            return f"{body} How many {t} are gone?", ("", "-", a, b)
        return f"{body} How many {u} did {n} use?", ("", "-", x, y)
    body = f"{n} found {b} {t} and {y} {u} at the {p}. Now {n} has {a} {t} and {x} {u}."
    if rng.random() < 0.4:
        return f"{body} How many {t} did {n} have at first?", ("", "-", a, b)
    if rng.random() < 0.5:
        return f"{body} How many {u} did {n} have before that?", ("", "-", x, y)
    more, fewer = max(a, x), min(a, x)
    first, second = (t, u) if a >= x else (u, t)
    return f"{body} How many more {first} than {second} does {n} have now?", ("", "-", more, fewer)


def make_crowded_story(seed: int) -> Problem:
    """The crowded story of this seed: a pure function, unlimited in number."""
    rng = random.Random(seed)
    kind = rng.random()
    if kind < 0.55:
        table = _draw_table(rng)
        ask = rng.choice((_compare_rows, _compare_rows, _compare_things, _sum_rows, _sum_things))
        asked = ask(rng, table)
        question = " ".join((*table.sentences, asked[0]))
    elif kind < 0.75:
        question, asked = _groups(rng)
    else:
        question, asked = _before_after(rng)
    _, sign, x, y = asked
    result = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[sign]
    step = Step(f"{x}{sign}{y}", str(result))
    return Problem(f"crowded-{seed}", "stories", "train", question, step.result, (step,))
