"""Sudoku with one solution each: 4x4 at levels 1 to 3, 9x9 at levels 4 to 6."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from tafkir.data.puzzles.sudoku import Box, is_forced, peers, solve
from tafkir.recipe.seeds import derive_seed
from tafkir.tasks.answers import normalize
from tafkir.tasks.generated import RIGHT, Check, Puzzle, PuzzleKind

__all__ = ["SUDOKU", "ask_sudoku", "make_sudoku"]

# Side of a box, and how many cells are left empty (fewer where the solution would not be the only one).
_LEVELS = {1: (2, 4), 2: (2, 8), 3: (2, 12), 4: (3, 30), 5: (3, 42), 6: (3, 54)}
_BETWEEN = re.compile(r"[\s|+,;.\[\]()_-]|\\\\|&")


def make_sudoku(seed: int, level: int) -> Puzzle:
    """A grid with exactly one solution; its cells are emptied in random order while that holds."""
    random = Random(derive_seed(seed, "sudoku"))
    size, holes = _LEVELS[level]
    box, side = Box(size, size), size * size
    solution = solve([0] * side**2, box, random)
    assert solution is not None
    grid = list(solution)
    for cell in random.sample(range(side**2), side**2):
        if holes == 0:
            break
        grid[cell] = 0
        if is_forced(grid, box, cell, solution[cell]):
            holes -= 1
        else:
            grid[cell] = solution[cell]
    question = ask_sudoku("\n".join(_rows(grid, side)).replace("0", "."), box)
    return Puzzle(question, " ".join(_rows(solution, side)), "", {"grid": grid, "box": size})


def ask_sudoku(rows: str, box: Box) -> str:
    """The question for a grid in lines, its blanks as dots."""
    last = str(box.side) if box.side < 10 else "9, A" if box.side == 10 else f"9, A to {chr(ord('A') + box.side - 10)}"
    return (
        f"Solve this Sudoku: every row, column and {box.rows}x{box.columns} box holds 1 to {last} once.\n{rows}\n"
        "Write the rows in \\boxed{}."
    )


def _rows(grid: Sequence[int], side: int) -> list[str]:
    return ["".join(map(str, grid[start : start + side])) for start in range(0, side**2, side)]


def check(data: Mapping[str, Any], text: str) -> Check:
    """Whether the digits fill the grid by the rules and keep what was given; how they are laid out does not matter."""
    box, given = Box(data["box"], data["box"]), data["grid"]
    side = box.side
    digits = _BETWEEN.sub("", normalize(text))
    if not digits.isdecimal() or not digits.isascii():
        return "wrong", "something else than digits in the grid"
    if len(digits) != side**2:
        return "wrong", f"{len(digits)} cells instead of {side**2}"
    grid = [int(digit) for digit in digits]
    for cell, value in enumerate(grid):
        place = f"row {cell // side + 1}, column {cell % side + 1}"
        if not 1 <= value <= side:
            return "wrong", f"{value} at {place}"
        if given[cell] and given[cell] != value:
            return "wrong", f"{place} was given as {given[cell]}"
        if any(grid[peer] == value for peer in peers(box)[cell]):
            return "wrong", f"{value} at {place} is there twice in its row, column or box"
    return RIGHT


SUDOKU = PuzzleKind("sudoku", make_sudoku, check)
