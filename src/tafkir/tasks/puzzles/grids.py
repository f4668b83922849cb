"""ARC-like grids: a few pairs show a transformation, and the last input asks for its output.

The rule is a chain of simple transformations, and every such chain that explains the pairs gives the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from random import Random
from typing import Any

from tafkir.recipe.seeds import derive_seed
from tafkir.tasks.answers import normalize
from tafkir.tasks.generated import RIGHT, Check, Puzzle, PuzzleKind

__all__ = ["GRIDS", "TRANSFORMATIONS", "Grid", "ask_grids", "explanations"]

Grid = tuple[tuple[int, ...], ...]
"""Rows of colours 0 to 9, 0 being the background."""

# Length of the chain, side of the inputs, colours, pairs shown.
_LEVELS = {1: (1, 3, 2, 3), 2: (1, 4, 3, 3), 3: (2, 3, 3, 3), 4: (2, 5, 4, 3), 5: (2, 7, 4, 2)}
_BETWEEN = re.compile(r"[ \t,|\[\]()]")


def _fall(grid: Grid) -> Grid:
    """Every colour falls to the bottom of its column."""
    columns = [sorted(column, key=bool) for column in zip(*grid, strict=True)]
    return tuple(zip(*columns, strict=True))


def _crop(grid: Grid) -> Grid:
    """The smallest rectangle that holds everything which is not background."""
    rows = [r for r, row in enumerate(grid) if any(row)]
    columns = [c for c, column in enumerate(zip(*grid, strict=True)) if any(column)]
    if not rows:
        return grid
    return tuple(row[columns[0] : columns[-1] + 1] for row in grid[rows[0] : rows[-1] + 1])


def _swap(a: int, b: int) -> Callable[[Grid], Grid]:
    table = {a: b, b: a}
    return lambda grid: tuple(tuple(table.get(cell, cell) for cell in row) for row in grid)


TRANSFORMATIONS: dict[str, Callable[[Grid], Grid]] = {
    "flip left-right": lambda grid: tuple(row[::-1] for row in grid),
    "flip top-bottom": lambda grid: grid[::-1],
    "rotate right": lambda grid: tuple(zip(*grid[::-1], strict=True)),
    "rotate left": lambda grid: tuple(zip(*grid, strict=True))[::-1],
    "rotate twice": lambda grid: tuple(row[::-1] for row in grid[::-1]),
    "transpose": lambda grid: tuple(zip(*grid, strict=True)),
    "fall": _fall,
    "crop": _crop,
    "mirror to the right": lambda grid: tuple(row + row[::-1] for row in grid),
    "mirror below": lambda grid: grid + grid[::-1],
    "double": lambda grid: tuple(tuple(c for c in row for _ in (0, 1)) for row in grid for _ in (0, 1)),
    "frame": lambda grid: ((5,) * (len(grid[0]) + 2), *((5, *row, 5) for row in grid), (5,) * (len(grid[0]) + 2)),
    "swap 1 and 2": _swap(1, 2),
    "swap 1 and 3": _swap(1, 3),
    "swap 2 and 3": _swap(2, 3),
}
"""What a rule is made of."""


def _apply(chain: Sequence[str], grid: Grid) -> Grid:
    for name in chain:
        grid = TRANSFORMATIONS[name](grid)
    return grid


def explanations(pairs: Sequence[tuple[Grid, Grid]], max_length: int) -> Iterator[tuple[str, ...]]:
    """Every chain of at most `max_length` transformations that turns each input into its output."""
    for length in range(1, max_length + 1):
        for chain in product(TRANSFORMATIONS, repeat=length):
            if all(_apply(chain, shown) == wanted for shown, wanted in pairs):
                yield chain


def _random_grid(random: Random, side: int, colours: int) -> Grid:
    cells = [random.randint(1, colours) if random.random() < 0.5 else 0 for _ in range(side * side)]
    return tuple(tuple(cells[start : start + side]) for start in range(0, side * side, side))


def make_grids(seed: int, level: int) -> Puzzle:
    """Pairs that determine the answer: all rules of the level's length that explain them agree on the last input."""
    random = Random(derive_seed(seed, "grids"))
    length, side, colours, shown = _LEVELS[level]
    while True:
        chain = [random.choice(list(TRANSFORMATIONS)) for _ in range(length)]
        inputs = [_random_grid(random, side, colours) for _ in range(shown + 1)]
        pairs = [(grid, _apply(chain, grid)) for grid in inputs]
        (last, answer), given = pairs[-1], pairs[:-1]
        if any(a == b for a, b in pairs) or not all(any(map(any, grid)) for grid in inputs):
            continue
        if all(_apply(other, last) == answer for other in explanations(given, length)):
            break
    question = ask_grids([(_rows(shown), _rows(wanted)) for shown, wanted in given], _rows(last))
    return Puzzle(question, _rows(answer), ", then ".join(chain), {"output": [list(row) for row in answer]})


def ask_grids(pairs: Sequence[tuple[str, str]], last: str) -> str:
    """The question for pairs of grids in lines, and the input whose output is asked for."""
    parts = [f"Input:\n{shown}\nOutput:\n{wanted}" for shown, wanted in pairs]
    question = "Find the rule, and apply it to the last input.\n" + "\n".join(parts)
    return f"{question}\nInput:\n{last}\nWrite the rows of the output in \\boxed{{}}."


def _rows(grid: Grid) -> str:
    return "\n".join("".join(map(str, row)) for row in grid)


def check(data: Mapping[str, Any], text: str) -> Check:
    """Whether the rows of digits (one row a line, or separated by `;`, `/` or `\\\\`) are the output."""
    lines = re.split(r"\n|;|/|\\\\", normalize(text.replace("\n", ";")))
    rows = [row for row in (_BETWEEN.sub("", line) for line in lines) if row]
    if any(not row.isdecimal() or not row.isascii() for row in rows):
        return "wrong", "something else than digits in the grid"
    wanted = ["".join(map(str, row)) for row in data["output"]]
    if [len(row) for row in rows] != [len(row) for row in wanted]:
        return "wrong", f"{len(rows)} rows of another size; {len(wanted)} rows of {len(wanted[0])} are right"
    cells = sum(a != b for row, right in zip(rows, wanted, strict=True) for a, b in zip(row, right, strict=True))
    return ("wrong", f"{cells} of {sum(map(len, wanted))} cells are wrong") if cells else RIGHT


GRIDS = PuzzleKind("grids", make_grids, check)
