"""Short word problems of our own making: scenes of one or two operations, told in many ways, with idle numbers.

The real sets hold few ways to say "gave away" or "each"; a small model trained from nothing needs to read many more.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tafkir.data.arithmetic import format_number
from tafkir.data.sources import Problem, Step

__all__ = ["make_story"]

# Words as text: as lists of literals they would fill a screen each.
NAMES = tuple(
    "Adam Aisha Amal Amy Andre Bella Carlos Clara Dalia David Elena Eric Fatima Frank Grace Hana Hassan Ian Jane Jamal "
    "Julia Kate Khalid Laila Liam Lina Maha Maria Mark Mona Nadia Noah Olga Omar Paul Rana Rosa Sami Sara Tariq Tina "
    "Tom Vera Yara Yusuf Zain".split()
)
THINGS = tuple(
    "apples marbles books stickers cards pencils cookies oranges balloons stamps shells toys candies flowers eggs "
    "coins bottles pages cupcakes photos beads peaches shirts games points songs crayons bananas blocks muffins".split()
)
HOLDERS = tuple("boxes bags baskets jars shelves rows packs trays albums cartons".split())
PLACES = tuple("store library garden kitchen classroom park market farm school bakery".split())
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True, slots=True)
class _Scene:
    """Sentences in order, each told in one of several ways; `equations` over a, b, c and earlier results r0, r1."""

    equations: tuple[tuple[str, str, str], ...]
    sentences: tuple[tuple[str, ...], ...]


_SCENES = (
    _Scene(
        (("a", "+", "b"),),
        (
            ("{N} had {a} {t}.", "{N} has {a} {t}.", "There were {a} {t} in {N}'s room.", "{N} started with {a} {t}."),
            ("{M} gave {N} {b} more {t}.", "Then {N} bought {b} more at the {p}.", "{N} found {b} more {t} on {D}."),
            (
                "How many {t} does {N} have now?",
                "How many {t} does {N} have in all?",
                "What is the total number of {t}?",
            ),
        ),
    ),
    _Scene(
        (("a", "+", "b"),),
        (
            (
                "{N} picked {a} {t} on {D} and {b} {t} on {E}.",
                "{N} sold {a} {t} in the morning and {b} in the evening.",
                "{N} read {a} pages yesterday and {b} pages today.",
                "{N} has {a} red {t} and {b} blue {t}.",
            ),
            ("How many is that altogether?", "How many were there in total?", "What is the sum for both?"),
        ),
    ),
    _Scene(
        (("a", "+", "b"),),
        (
            ("{N} gave {a} {t} to {M}.", "{N} ate {a} of the {t}.", "{N} lost {a} {t} at the {p}."),
            ("Now {N} has {b} {t} left.", "After that there were {b} {t} left.", "{b} {t} remained."),
            (
                "How many {t} did {N} have at the start?",
                "How many {t} did {N} have before that?",
                "How many {t} were there in the beginning?",
            ),
        ),
    ),
    _Scene(
        (("a", "+", "b"),),
        (
            ("{M} has {a} {t}.", "{M} collected {a} {t}."),
            ("{N} has {b} more {t} than {M}.", "{N} has {b} more than {M} does."),
            ("How many {t} does {N} have?", "How many {t} are in {N}'s collection?"),
        ),
    ),
    _Scene(
        (("a", "-", "b"),),
        (
            ("{N} had {a} {t}.", "There were {a} {t} in the {p}.", "{N} baked {a} {t}.", "{N} bought {a} {t}."),
            (
                "{N} gave {b} of them to {M}.",
                "{M} took {b} {t}.",
                "{N} sold {b} of them.",
                "{b} {t} were broken.",
                "{N} used {b} of the {t}.",
            ),
            ("How many {t} are left?", "How many {t} does {N} still have?", "How many {t} remain?"),
        ),
    ),
    _Scene(
        (("a", "-", "b"),),
        (
            (
                "{N} has {a} {t} and {M} has {b} {t}.",
                "{N} made {a} {t}. {M} made {b} {t}.",
                "There are {a} {t} in the {p} and {b} {t} in the {q}.",
                "{N} scored {a} points while {M} scored {b} points.",
            ),
            (
                "How many more {t} does {N} have than {M}?",
                "What is the difference between the two?",
                "How many fewer does the second have than the first?",
                "How many more is the first than the second?",
            ),
        ),
    ),
    _Scene(
        (("a", "-", "b"),),
        (
            ("{N} had {b} {t} at first.", "There were {b} {t} at the {p}.", "{N} started the day with {b} {t}."),
            (
                "After {M} brought some more there were {a} {t}.",
                "Then {N} got some more and now has {a} {t}.",
                "{N} bought more {t} and ended with {a}.",
            ),
            ("How many {t} were added?", "How many {t} did {N} get?", "How many more {t} came?"),
        ),
    ),
    _Scene(
        (("a", "-", "b"),),
        (
            ("{N} had {a} {t} at first.", "There were {a} {t} in the {p} in the morning."),
            (
                "Some of them were sold and {b} were left.",
                "{N} gave some to {M} and now has {b} {t}.",
                "After lunch only {b} {t} were left.",
            ),
            ("How many {t} were sold?", "How many {t} did {N} give away?", "How many {t} are gone?"),
        ),
    ),
    _Scene(
        (("a", "-", "b"),),
        (
            ("{N} needs {a} {t}.", "{N} wants to collect {a} {t}.", "{N} has to read {a} pages."),
            ("{N} already has {b}.", "So far {N} has {b}.", "{N} got {b} of them on {D}."),
            ("How many more does {N} need?", "How many are still missing?"),
        ),
    ),
    _Scene(
        (("a", "-", "b"),),
        (
            ("{N} has {a} {t}.", "{N} collected {a} {t}."),
            ("{M} has {b} fewer {t} than {N}.", "{M} has {b} less than {N} does."),
            ("How many {t} does {M} have?", "How many {t} are in {M}'s collection?"),
        ),
    ),
    _Scene(
        (("a", "-", "b"),),
        (
            ("There are {a} {t} on the table.", "{N} has {a} {t}."),
            ("{b} of the {t} are red and the others are green.", "{b} of them are new and the rest are old."),
            ("How many {t} are in the other part?", "How many is the rest?"),
        ),
    ),
    _Scene(
        (("a", "-", "b"),),
        (
            ("A toy costs {a} dollars.", "The price of a jacket is {a} dollars.", "{N} wants a game for ${a}."),
            (
                "There is a discount of {b} dollars.",
                "It is on sale for {b} dollars less.",
                "{N} has a coupon for ${b}.",
            ),
            ("How much does {N} have to pay?", "What is the new price?"),
        ),
    ),
    _Scene(
        (("a", "*", "b"),),
        (
            ("{N} has {a} {h}.", "There are {a} {h} in the {p}.", "{N} filled {a} {h}."),
            ("Each of them holds {b} {t}.", "There are {b} {t} in each.", "Every one has {b} {t} in it."),
            ("How many {t} are there in all?", "How many {t} does {N} have?", "What is the total number of {t}?"),
        ),
    ),
    _Scene(
        (("a", "*", "b"),),
        (
            (
                "{N} bought {a} {t} for {b} dollars each.",
                "Each of the {a} {t} costs ${b}.",
                "{N} works {a} hours and earns {b} dollars an hour.",
                "{N} sold {a} {t} at {b} dollars each.",
            ),
            ("How much money is that in total?", "How many dollars is that altogether?", "How much is it in all?"),
        ),
    ),
    _Scene(
        (("a", "*", "b"),),
        (
            ("{N} reads {b} pages every day.", "{N} runs {b} miles each day.", "A machine makes {b} {t} every hour."),
            ("This goes on for {a} days.", "{N} does it for {a} days in a row.", "It keeps going {a} times."),
            ("How many is that altogether?", "How many are there at the end?"),
        ),
    ),
    _Scene(
        (("p", "/", "b"),),
        (
            ("{N} has {p_} {t}.", "There are {p_} {t} in the {p}.", "{N} baked {p_} {t}."),
            (
                "{N} puts {b} of them in each of the {h}.",
                "{b} {t} fit in each of the {h}.",
                "Each of the {h} holds {b} {t}.",
            ),
            ("How many {h} does {N} need?", "How many {h} are there?", "How many {h} can {N} fill?"),
        ),
    ),
    _Scene(
        (("p", "/", "b"),),
        (
            (
                "{N} shares {p_} {t} equally among {b} friends.",
                "{p_} {t} are split evenly into {b} {h}.",
                "{N} puts {p_} {t} into {b} {h} with the same number in each.",
            ),
            ("How many {t} does each get?", "How many {t} are in each?", "How many {t} is that for each one?"),
        ),
    ),
    _Scene(
        (("p", "/", "b"),),
        (
            (
                "{N} paid {p_} dollars for {b} {t}.",
                "{b} {t} cost {p_} dollars.",
                "{N} earned {p_} dollars in {b} hours.",
            ),
            ("How much is that for one?", "How many dollars is that each?", "What is the price of one?"),
        ),
    ),
    _Scene(
        (("a", "+", "b"), ("r0", "-", "c")),
        (
            ("{N} had {a} {t}.", "There were {a} {t} in the {p}."),
            ("{M} brought {b} more.", "{N} bought {b} more {t}."),
            ("Then {N} gave {c} of them away.", "Later {c} {t} were sold.", "{N} lost {c} of them on {D}."),
            ("How many {t} are left?", "How many {t} does {N} have now?"),
        ),
    ),
    _Scene(
        (("a", "-", "c"), ("r0", "+", "b")),
        (
            ("{N} had {a} {t}.", "A bus had {a} people in it.", "There were {a} {t} in a jar."),
            ("First {c} were taken out.", "{c} went away.", "{N} gave {c} to {M}."),
            ("Then {b} more came.", "After that {N} got {b} more.", "{b} were put in later."),
            ("How many are there now?", "How many are there at the end?"),
        ),
    ),
    _Scene(
        (("a", "*", "b"), ("r0", "+", "c")),
        (
            (
                "{N} has {a} {h} with {b} {t} in each.",
                "{N} bought {a} {t} for {b} dollars each.",
                "There are {a} {h} and each has {b} {t}.",
            ),
            ("There are {c} more on the table.", "{M} adds {c} more to that.", "Then {c} more are added."),
            ("How many is that in total?", "How many is that altogether?"),
        ),
    ),
    _Scene(
        (("a", "*", "b"), ("r0", "-", "c")),
        (
            ("{N} has {a} {h} of {b} {t} each.", "{N} fills {a} {h} with {b} {t} each."),
            ("{N} gives {c} {t} to {M}.", "{c} {t} are eaten.", "{c} of the {t} fall out."),
            ("How many {t} are left?", "How many {t} does {N} still have?"),
        ),
    ),
    _Scene(
        (("a", "+", "b"), ("r0", "+", "c")),
        (
            (
                "{N} found {a} {t} on {D}, {b} on {E} and {c} the day after.",
                "{N} has {a} {t}, {M} has {b} and their friend has {c}.",
            ),
            ("How many {t} is that in all?", "How many {t} are there altogether?"),
        ),
    ),
    _Scene(
        (("a", "+", "b"), ("a", "+", "r0")),
        (
            ("{N} has {a} {t}.", "{N} made {a} {t}."),
            ("{M} has {b} more than {N}.", "{M} made {b} more {t} than {N}."),
            ("How many {t} do they have together?", "How many {t} is that for both?"),
        ),
    ),
    _Scene(
        (("a", "*", "2"), ("a", "+", "r0")),
        (
            ("{N} has {a} {t}.", "{N} sold {a} {t} on {D}."),
            ("{M} has twice as many.", "The next day it was twice as many.", "{M} has double that number."),
            ("How many is that altogether?", "How many {t} is that in total?"),
        ),
    ),
    _Scene(
        (("e", "/", "2"), ("e", "+", "r0")),
        (
            ("{N} has {e_} {t}.", "{N} picked {e_} {t} in the morning."),
            ("{M} has half as many.", "In the evening it was half as many."),
            ("How many is that altogether?", "How many {t} is that in total?"),
        ),
    ),
)

_IDLE = (
    "{N} is {z} years old.",
    "{M} has {z} {u}.",
    "There are also {z} {u} in the {q}.",
    "It takes {z} minutes to walk to the {p}.",
    "{N} also bought {z} {u}.",
)


def _draw_number(rng: random.Random, largest: int) -> int:
    digits = rng.choices((1, 2, 3), weights=(4, 5, 2 if largest >= 100 else 0))[0]
    return rng.randint(2 if digits == 1 else 10 ** (digits - 1), min(largest, 10**digits - 1))


def _draw_values(rng: random.Random, scene: _Scene, largest: int) -> dict[str, int]:
    """Numbers for which every result is a positive integer."""
    products = any(sign in "*/" for _, sign, _ in scene.equations)
    a, b = _draw_number(rng, largest), _draw_number(rng, min(99, largest) if products else largest)
    if products and a > 99 and b > 9:
        b = rng.randint(2, 9)
    if scene.equations[0][1] == "-" and a <= b:
        a, b = b + (a == b), a
    c = rng.randint(1, max(1, min(a - 1 if scene.equations[0] == ("a", "-", "c") else a + b - 1, largest)))
    return {"a": a, "b": b, "c": c, "p": a * b, "e": 2 * (a // 2 + 1), "z": _draw_number(rng, min(99, largest))}


def make_story(seed: int, *, max_number: int = 999) -> Problem:
    """The story of this seed: a pure function, unlimited in number.

    Args:
        seed: fixes scene, wording, names and numbers.
        max_number: largest number that the text draws (a product in the text may be larger).
    """
    rng = random.Random(seed)
    scene = rng.choice(_SCENES)
    values = _draw_values(rng, scene, max_number)
    n, m = rng.sample(NAMES, 2)
    t, u = rng.sample(THINGS, 2)
    p, q = rng.sample(PLACES, 2)
    d, e = rng.sample(DAYS, 2)
    words = {"N": n, "M": m, "t": t, "u": u, "h": rng.choice(HOLDERS), "p": p, "q": q, "D": d, "E": e}
    numbers = {"a": values["a"], "b": values["b"], "c": values["c"], "z": values["z"]}
    numbers |= {"p_": values["p"], "e_": values["e"]}
    parts = [rng.choice(ways) for ways in scene.sentences]
    if rng.random() < 0.3:
        parts.insert(rng.randrange(len(parts)), rng.choice(_IDLE))
    question = " ".join(parts).format(**words, **numbers)
    results: list[int] = []
    steps = []
    for left, sign, right in scene.equations:
        x, y = (_operand(name, values, results) for name in (left, right))
        results.append({"+": x + y, "-": x - y, "*": x * y, "/": x // y}[sign])
        steps.append(Step(f"{x}{sign}{y}", format_number(results[-1])))
    return Problem(f"story-{seed}", "stories", "train", question, steps[-1].result, tuple(steps))


def _operand(name: str, values: dict[str, int], results: list[int]) -> int:
    if name.startswith("r"):
        return results[int(name[1:])]
    return values[name] if name in values else int(name)
