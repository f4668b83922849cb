"""Sudoku with one solution each: 4x4 at levels 1 to 3, 9x9 at levels 4 to 6."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from random import Random
from typing import Any

from tafkir.recipe.seeds import derive_seed
from tafkir.tasks.answers import normalize
from tafkir.tasks.generated import RIGHT, Check, Puzzle, PuzzleKind

__all__ = ["SUDOKU", "count_solutions", "solve"]

# Side of a box, and how many cells are left empty (fewer where the solution would not be the only one).
_LEVELS = {1: (2, 4), 2: (2, 8), 3: (2, 12), 4: (3, 30), 5: (3, 42), 6: (3, 54)}
_BETWEEN = re.compile(r"[\s|+,;.\[\]()_-]|\\\\|&")

Grid = list[int]
"""Cells row by row, 0 where empty."""


@cache
def _peers(box: int) -> tuple[tuple[int, ...], ...]:
    """For each cell, the other cells of its row, column and box."""
    side = box * box

    def see(a: int, b: int) -> bool:
        (r, c), (s, d) = divmod(a, side), divmod(b, side)
        return a != b and (r == s or c == d or (r // box == s // box and c // box == d // box))

    return tuple(tuple(b for b in range(side**2) if see(a, b)) for a in range(side**2))


class _Search:
    """Depth-first search on the cell with the fewest candidates; candidates are bit masks."""

    def __init__(self, grid: Sequence[int], box: int, random: Random | None = None) -> None:
        self.peers, self.random = _peers(box), random
        self.grid = list(grid)
        full = (1 << box * box) - 1
        self.masks = [full] * len(self.grid)
        for cell, value in enumerate(self.grid):
            if value:
                for peer in self.peers[cell]:
                    self.masks[peer] &= ~(1 << value - 1)
        self.valid = all(not value or self.masks[cell] >> value - 1 & 1 for cell, value in enumerate(self.grid))

    def run(self, limit: int) -> int:
        """Count solutions up to `limit`; the grid is left at the last one when the limit is reached."""
        if not self.valid:
            return 0
        empty = [cell for cell, value in enumerate(self.grid) if not value]
        if not empty:
            return 1
        cell = min(empty, key=lambda c: self.masks[c].bit_count())
        values = [v for v in range(1, self.masks[cell].bit_length() + 1) if self.masks[cell] >> v - 1 & 1]
        if self.random is not None:
            self.random.shuffle(values)
        found = 0
        for value in values:
            bit = 1 << value - 1
            changed = [peer for peer in self.peers[cell] if self.masks[peer] & bit]
            self.grid[cell] = value
            for peer in changed:
                self.masks[peer] ^= bit
            found += self.run(limit - found)
            if found >= limit:
                return found
            for peer in changed:
                self.masks[peer] |= bit
            self.grid[cell] = 0
        return found


def solve(grid: Sequence[int], box: int, random: Random | None = None) -> Grid | None:
    """A solution of the grid, any one of them by `random`; None where there is none."""
    search = _Search(grid, box, random)
    return search.grid if search.run(1) else None


def count_solutions(grid: Sequence[int], box: int, limit: int = 2) -> int:
    """How many solutions a grid has, counted up to `limit`."""
    return _Search(grid, box).run(limit)


def _is_forced(grid: Grid, box: int, cell: int, value: int) -> bool:
    """Whether no other value than `value` in an emptied cell leads to a solution."""
    taken = {grid[peer] for peer in _peers(box)[cell]}
    for other in range(1, box * box + 1):
        if other != value and other not in taken:
            grid[cell] = other
            alternatives = count_solutions(grid, box, 1)
            grid[cell] = 0
            if alternatives:
                return False
    return True


def make_sudoku(seed: int, level: int) -> Puzzle:
    """A grid with exactly one solution; its cells are emptied in random order while that holds."""
    random = Random(derive_seed(seed, "sudoku"))
    box, holes = _LEVELS[level]
    side = box * box
    solution = solve([0] * side**2, box, random)
    assert solution is not None
    grid = list(solution)
    for cell in random.sample(range(side**2), side**2):
        if holes == 0:
            break
        grid[cell] = 0
        if _is_forced(grid, box, cell, solution[cell]):
            holes -= 1
        else:
            grid[cell] = solution[cell]
    rows = "\n".join(_rows(grid, side)).replace("0", ".")
    question = (
        f"Solve this Sudoku: every row, column and {box}x{box} box holds 1 to {side} once.\n{rows}\n"
        "Write the rows in \\boxed{}."
    )
    return Puzzle(question, " ".join(_rows(solution, side)), "", {"grid": grid, "box": box})


def _rows(grid: Sequence[int], side: int) -> list[str]:
    return ["".join(map(str, grid[start : start + side])) for start in range(0, side**2, side)]


def check(data: Mapping[str, Any], text: str) -> Check:
    """Whether the digits fill the grid by the rules and keep what was given; how they are laid out does not matter."""
    box, given = data["box"], data["grid"]
    side = box * box
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
        if any(grid[peer] == value for peer in _peers(box)[cell]):
            return "wrong", f"{value} at {place} is there twice in its row, column or box"
    return RIGHT


SUDOKU = PuzzleKind("sudoku", make_sudoku, check)
