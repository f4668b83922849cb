"""Mazes as text: any way from S to E that crosses no wall is right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from tafkir.data.puzzles.maze import MOVES, carve, shortest_path
from tafkir.recipe.seeds import derive_seed
from tafkir.tasks.answers import normalize
from tafkir.tasks.generated import RIGHT, Check, Puzzle, PuzzleKind

__all__ = ["MAZE", "ask_maze", "make_maze", "read_moves"]

_CELLS = {1: 3, 2: 4, 3: 5, 4: 6, 5: 8, 6: 10}
_WORDS = {"UP": "U", "DOWN": "D", "LEFT": "L", "RIGHT": "R", "↑": "U", "↓": "D", "←": "L", "→": "R"}
_WORD = re.compile("|".join(_WORDS))
_BETWEEN = re.compile(r"[\s,;.>\[\]()'\"-]")


def _carve(random: Random, cells: int) -> list[list[str]]:
    """A spanning tree of the cells, with a few more walls taken out, so that ways differ."""
    grid = carve(random, cells, cells, ".")
    size = len(grid)
    for _ in range(cells // 2):
        row, column = random.randrange(1, size - 1), random.randrange(1, size - 1)
        if (row + column) % 2:  # between two cells, not a corner post
            grid[row][column] = "."
    return grid


def make_maze(seed: int, level: int) -> Puzzle:
    """A maze of 3x3 to 10x10 cells, S and E far apart."""
    random = Random(derive_seed(seed, "maze"))
    grid = _carve(random, _CELLS[level])
    size = len(grid)
    corners = [(1, 1), (1, size - 2), (size - 2, 1), (size - 2, size - 2)]
    start, end = random.sample(corners, 2)
    grid[start[0]][start[1]], grid[end[0]][end[1]] = "S", "E"
    rows = ["".join(row) for row in grid]
    path = shortest_path(rows, start, end)
    assert path is not None
    return Puzzle(ask_maze("\n".join(rows)), path, "", {"rows": rows})


def ask_maze(rows: str) -> str:
    """The question for a maze in lines."""
    return f"Find a way from S to E; # is a wall.\n{rows}\nWrite the moves in \\boxed{{}} as letters U, D, L, R."


def read_moves(text: str) -> str:
    """Moves as letters U, D, L, R, where they are written as letters, words or arrows; what is no move stays."""
    return _BETWEEN.sub("", _WORD.sub(lambda word: _WORDS[word[0]], normalize(text).upper()))


def _find(rows: Sequence[str], sign: str) -> tuple[int, int]:
    return next((r, row.index(sign)) for r, row in enumerate(rows) if sign in row)


def check(data: Mapping[str, Any], text: str) -> Check:
    """Whether the moves, as letters, words or arrows, lead from S to E without crossing a wall."""
    rows = data["rows"]
    moves = read_moves(text)
    unknown = next((move for move in moves if move not in MOVES), None)
    if unknown is not None:
        return "wrong", f"{unknown!r} is no move"
    row, column = _find(rows, "S")
    for number, move in enumerate(moves, start=1):
        row, column = row + MOVES[move][0], column + MOVES[move][1]
        if rows[row][column] == "#":
            return "wrong", f"move {number} ({move}) runs into a wall"
    if rows[row][column] != "E":
        return "wrong", f"{len(moves)} moves end before E"
    return RIGHT


MAZE = PuzzleKind("maze", make_maze, check)
