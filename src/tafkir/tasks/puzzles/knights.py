"""Knights and knaves: knights tell the truth, knaves lie, and what they say leaves one possibility."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product
from random import Random
from typing import Any

from tafkir.recipe.seeds import derive_seed
from tafkir.tasks.generated import RIGHT, Check, Puzzle, PuzzleKind
from tafkir.tasks.needle import NAMES

__all__ = ["KNIGHTS_AND_KNAVES", "holds", "solutions"]

Statement = list[Any]
"""["is", person, knight?], ["same", a, b], ["count", how many knights], ["and" | "or", statement, statement]."""

Kinds = tuple[bool, ...]
"""Who is a knight."""

_ROLES = {True: "knight", False: "knave"}


def holds(statement: Statement, kinds: Kinds) -> bool:
    """Whether a statement is true when the people are of these kinds."""
    match statement:
        case ["is", int(person), bool(knight)]:
            return kinds[person] is knight
        case ["same", int(a), int(b)]:
            return kinds[a] is kinds[b]
        case ["count", int(number)]:
            return sum(kinds) == number
        case ["and", left, right]:
            return holds(left, kinds) and holds(right, kinds)
        case ["or", left, right]:
            return holds(left, kinds) or holds(right, kinds)
    raise ValueError(f"not a statement: {statement}")


def solutions(statements: Sequence[Statement]) -> list[Kinds]:
    """All kinds under which exactly the knights' statements are true."""
    everyone = product((True, False), repeat=len(statements))
    return [kinds for kinds in everyone if _fits(statements, kinds)]


def _fits(statements: Sequence[Statement], kinds: Kinds) -> bool:
    return all(holds(said, kinds) is kind for said, kind in zip(statements, kinds, strict=True))


def _simple(random: Random, speaker: int, people: int) -> Statement:
    others = [person for person in range(people) if person != speaker]
    kind = random.choice(("is", "is", "same"))
    if kind == "same":
        return ["same", speaker, random.choice(others)]
    return ["is", random.choice(others), random.random() < 0.5]


def _statement(random: Random, speaker: int, people: int, level: int) -> Statement:
    draw = random.random()
    if level >= 2 and draw < 0.3:
        return [random.choice(("and", "or")), _simple(random, speaker, people), _simple(random, speaker, people)]
    if level >= 3 and draw < 0.45:
        return ["count", random.randint(0, people)]
    return _simple(random, speaker, people)


def _say(statement: Statement, speaker: int, names: Sequence[str]) -> str:
    match statement:
        case ["is", int(person), bool(knight)]:
            return f"{names[person]} is a {_ROLES[knight]}"
        case ["same", _, int(other)]:
            return f"{names[other]} and I are of the same kind"
        case ["count", int(number)]:
            return f"exactly {number} of us are knights"
        case [str(word), left, right]:
            return f"{_say(left, speaker, names)} {word} {_say(right, speaker, names)}"
    raise ValueError(f"not a statement: {statement}")


def make_knights(seed: int, level: int) -> Puzzle:
    """Two to six people (level + 1), one statement each, exactly one solution."""
    random = Random(derive_seed(seed, "knights"))
    people = level + 1
    names = random.sample(NAMES, people)
    while True:
        statements = [_statement(random, speaker, people, level) for speaker in range(people)]
        found = solutions(statements)
        if len(found) == 1:
            break
    said = [f"{name} says: {_say(s, i, names)}." for i, (name, s) in enumerate(zip(names, statements, strict=True))]
    roles = [f"{name}=knight or {name}=knave" for name in names[:1]]
    question = "Knights always tell the truth, knaves always lie.\n" + "\n".join(said)
    question += f"\nWho is what? Write one entry for everybody in \\boxed{{}}, such as {roles[0]}."
    answer = ", ".join(f"{name}={_ROLES[kind]}" for name, kind in zip(names, found[0], strict=True))
    return Puzzle(question, answer, "", {"names": names, "statements": statements})


def check(data: Mapping[str, Any], text: str) -> Check:
    """Whether everybody is given one kind, and the kinds fit what was said."""
    names = data["names"]
    kinds = []
    for name in names:
        pattern = rf"\b{name}\b[ \t]*(?:=|:|->|→|is)[ \t]*(?:an?[ \t]+)?(knight|knave)\b"
        roles = {role.lower() for role in re.findall(pattern, text, re.IGNORECASE)}
        if len(roles) != 1:
            return "wrong", f"{name} is called both" if roles else f"nothing is said about {name}"
        kinds.append(roles == {"knight"})
    wrong = [
        name
        for name, said, kind in zip(names, data["statements"], kinds, strict=True)
        if holds(said, tuple(kinds)) is not kind
    ]
    return ("wrong", f"what {wrong[0]} says does not fit") if wrong else RIGHT


KNIGHTS_AND_KNAVES = PuzzleKind("knights_and_knaves", make_knights, check)
