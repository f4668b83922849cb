"""Sudoku of any band shape: rules, an exact solver, minimal puzzles from a seed, symmetries.

Grids are lists of cells row by row, 0 where empty. A box has `rows` x `columns` cells, and a grid as many rows, columns
and digits as a box has cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np

from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.symmetry import Symmetry, draw_exchange
from tafkir.errors import DataError

__all__ = [
    "BLANK",
    "DIGITS",
    "Box",
    "Grid",
    "check_solution",
    "count_solutions",
    "draw_symmetry",
    "find_conflict",
    "fingerprint",
    "is_forced",
    "make_puzzle",
    "peers",
    "solve",
    "solve_unique",
    "sudoku_format",
    "units",
]

Grid = list[int]

_Integers = np.ndarray[Any, np.dtype[np.int64]]

DIGITS = "123456789ABCDEFG"
BLANK: Literal["."] = "."


class Box(NamedTuple):
    """Cells of a box, which make the whole geometry."""

    rows: int
    columns: int

    @property
    def side(self) -> int:
        return self.rows * self.columns


@cache
def units(box: Box) -> tuple[tuple[int, ...], ...]:
    """The cells of each row, column and box."""
    side = box.side
    rows = [tuple(range(r * side, (r + 1) * side)) for r in range(side)]
    columns = [tuple(range(c, side * side, side)) for c in range(side)]
    corners = [(r, c) for r in range(0, side, box.rows) for c in range(0, side, box.columns)]
    inside = [(i, j) for i in range(box.rows) for j in range(box.columns)]
    boxes = [tuple((r + i) * side + c + j for i, j in inside) for r, c in corners]
    return (*rows, *columns, *boxes)


@cache
def peers(box: Box) -> tuple[tuple[int, ...], ...]:
    """For each cell, in rising order, the other cells of its row, column and box."""
    return tuple(
        tuple(sorted({other for unit in units(box) if cell in unit for other in unit} - {cell}))
        for cell in range(box.side**2)
    )


class _Search:
    """Depth-first search on the cell with the fewest candidates; candidates are bit masks.

    Without a `random`, digits that have one place left in a unit go first, which solves hard puzzles quickly; with it
    the order of cells depends on nothing else, so that its draws stay what they are.
    """

    def __init__(self, grid: Sequence[int], box: Box, random: Random | None = None) -> None:
        self.peers, self.units, self.random = peers(box), units(box), random
        self.grid = list(grid)
        full = (1 << box.side) - 1
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
        mask = self.masks[cell]
        if self.random is None and mask.bit_count() > 1:
            cell, mask = self._single_place() or (cell, mask)
        values = [v for v in range(1, mask.bit_length() + 1) if mask >> v - 1 & 1]
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

    def _single_place(self) -> tuple[int, int] | None:
        """A cell and the mask of the digit that has no other place in one of its units."""
        for unit in self.units:
            once = twice = 0
            for cell in unit:
                if not self.grid[cell]:
                    twice |= once & self.masks[cell]
                    once |= self.masks[cell]
            once &= ~twice
            if once:
                bit = once & -once
                return next(c for c in unit if not self.grid[c] and self.masks[c] & bit), bit
        return None


def solve(grid: Sequence[int], box: Box, random: Random | None = None) -> Grid | None:
    """A solution of the grid, any one of them by `random`; None where there is none."""
    search = _Search(grid, box, random)
    return search.grid if search.run(1) else None


def count_solutions(grid: Sequence[int], box: Box, limit: int = 2) -> int:
    """How many solutions a grid has, counted up to `limit`."""
    return _Search(grid, box).run(limit)


def is_forced(grid: Grid, box: Box, cell: int, value: int) -> bool:
    """Whether no other value than `value` in an emptied cell leads to a solution."""
    taken = {grid[peer] for peer in peers(box)[cell]}
    for other in range(1, box.side + 1):
        if other != value and other not in taken:
            grid[cell] = other
            alternatives = count_solutions(grid, box, 1)
            grid[cell] = 0
            if alternatives:
                return False
    return True


def find_conflict(grid: Sequence[int], box: Box) -> tuple[int, int] | None:
    """Two cells of a row, column or box with the same digit; None where the rules are kept."""
    for unit in units(box):
        seen: dict[int, int] = {}
        for cell in unit:
            if grid[cell] and grid[cell] in seen:
                return seen[grid[cell]], cell
            seen[grid[cell]] = cell
    return None


def check_solution(puzzle: Sequence[int], answer: Sequence[int], box: Box) -> bool:
    """Whether an answer fills the grid by the rules and keeps what was given."""
    kept = all(not given or given == value for given, value in zip(puzzle, answer, strict=True))
    return kept and all(answer) and find_conflict(answer, box) is None


def solve_unique(grid: Sequence[int], box: Box, where: str | None = None) -> Grid:
    """The one solution of a puzzle.

    Raises:
        DataError: givens contradict each other, there is no solution, or there are several.
    """
    conflict = find_conflict(grid, box)
    if conflict is not None:
        places = " and ".join(f"row {c // box.side + 1}, column {c % box.side + 1}" for c in conflict)
        raise DataError(f"{DIGITS[grid[conflict[0]] - 1]} stands at {places}, which see each other", where=where)
    solution = solve(grid, box)
    if solution is None:
        raise DataError("the puzzle has no solution", where=where, fix="look for a wrong digit")
    if count_solutions(grid, box) > 1:
        raise DataError("the puzzle has several solutions", where=where, fix="give more digits")
    return solution


def make_puzzle(random: Random, box: Box, extra_givens: int = 0) -> tuple[Grid, Grid]:
    """A puzzle with one solution, and the solution.

    Cells of a random solution are emptied in random order while that leaves it the only one; then every given is
    needed (a minimal puzzle), and `extra_givens` of the emptied cells are given back.
    """
    cells = box.side**2
    solution = solve([0] * cells, box, random)
    assert solution is not None
    grid = list(solution)
    for cell in random.sample(range(cells), cells):
        grid[cell] = 0
        if not is_forced(grid, box, cell, solution[cell]):
            grid[cell] = solution[cell]
    empty = [cell for cell in range(cells) if not grid[cell]]
    for cell in random.sample(empty, min(extra_givens, len(empty))):
        grid[cell] = solution[cell]
    return grid, solution


def sudoku_format(box: Box) -> PuzzleFormat:
    """Tokens as in the reference: padding, blank, then the digits."""
    symbols = ("", BLANK, *DIGITS[: box.side])
    side = box.side
    return PuzzleFormat(
        kind="sudoku", rows=side, columns=side, symbols=symbols, blank=BLANK, box=(box.rows, box.columns)
    )


def draw_symmetry(random: Random, box: Box) -> Symmetry:
    """Bands, stacks, and the rows and columns within them change places, digits too; square boxes may be transposed."""
    rows = _draw_lines(random, box.side // box.rows, box.rows)
    columns = _draw_lines(random, box.side // box.columns, box.columns)
    moves = np.add.outer(np.array(rows) * box.side, np.array(columns))
    if box.rows == box.columns and random.random() < 0.5:
        moves = moves.T
    return Symmetry(moves.flatten(), draw_exchange(random, box.side + 2, range(2, box.side + 2)))


def _draw_lines(random: Random, groups: int, size: int) -> list[int]:
    return [g * size + i for g in random.sample(range(groups), groups) for i in random.sample(range(size), size)]


def fingerprint(cells: Cells, box: Box) -> int:
    """A number that all symmetric forms of a puzzle share (and, rarely, another puzzle does).

    Colour refinement: a cell's colour is hashed with the colours in its row, column and box, and those of equal
    digits; sums over a unit do not see the order of what they add.
    """
    digit = cells.astype(np.int64) - 1
    colour = _hash(np.where(digit > 0, 1, 2).astype(np.uint64))
    equal = ((digit[:, None] == digit[None, :]) & (digit > 0)).astype(np.uint64)
    places, unit_of = _unit_tables(box)
    # Rows and columns are told apart only where a transposed form is no form of the same puzzle.
    weights = np.array([3, 3 if box.rows == box.columns else 5, 7], dtype=np.uint64)
    with np.errstate(over="ignore"):
        for _ in range(4):
            sums = _hash(colour[places].sum(1))
            colour = _hash(colour + _hash(sums[unit_of]) @ weights + _hash(equal @ colour))
        return int(_hash(colour).sum())


@cache
def _unit_tables(box: Box) -> tuple[_Integers, _Integers]:
    """The cells of every unit, and the row, column and box of every cell as indices of units."""
    places = np.array(units(box))
    unit_of = np.empty((box.side**2, 3), dtype=np.int64)
    for number, unit in enumerate(places):
        unit_of[unit, number // box.side] = number
    return places, unit_of


def _hash(x: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """splitmix64."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
