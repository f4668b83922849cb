"""Mazes as grids of `#` (wall), space (way), S and G; the answer marks the one way between them by `o`.

Format of the published Maze-Hard set: its symbols, in its order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from random import Random

from tafkir.data.puzzles.format import PuzzleFormat
from tafkir.errors import DataError

__all__ = ["MOVES", "carve", "check_path", "distances_from", "make_maze", "maze_format", "shortest_path"]

MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}

_MAX_ATTEMPTS = 2000

Place = tuple[int, int]


def carve(random: Random, rows: int, columns: int, way: str = " ") -> list[list[str]]:
    """A spanning tree of rows x columns cells by depth-first search: exactly one way between any two.

    Cell (r, c) stands at row 2r + 1, column 2c + 1 of a grid with walls between and around.
    """
    height, width = 2 * rows + 1, 2 * columns + 1
    grid = [["#"] * width for _ in range(height)]
    stack = [(1, 1)]
    grid[1][1] = way
    while stack:
        row, column = stack[-1]
        ways = [
            (row + 2 * down, column + 2 * right, row + down, column + right)
            for down, right in MOVES.values()
            if 0 < row + 2 * down < height and 0 < column + 2 * right < width
        ]
        ways = [way for way in ways if grid[way[0]][way[1]] == "#"]
        if not ways:
            stack.pop()
            continue
        row, column, wall_row, wall_column = random.choice(ways)
        grid[wall_row][wall_column] = grid[row][column] = way
        stack.append((row, column))
    return grid


def distances_from(rows: Sequence[Sequence[str]], start: Place) -> Mapping[Place, tuple[int, str]]:
    """For every place that can be reached: the fewest moves, and the last of them."""
    found: dict[Place, tuple[int, str]] = {start: (0, "")}
    queue = deque([start])
    while queue:
        place = queue.popleft()
        moves = found[place][0] + 1
        for move, (down, right) in MOVES.items():
            row, column = place[0] + down, place[1] + right
            if not (0 <= row < len(rows) and 0 <= column < len(rows[row])) or rows[row][column] == "#":
                continue
            if (row, column) not in found:
                found[row, column] = moves, move
                queue.append((row, column))
    return found


def shortest_path(rows: Sequence[Sequence[str]], start: Place, end: Place) -> str | None:
    """The moves U, D, L, R of a shortest way; None where there is none."""
    found = distances_from(rows, start)
    return _moves_to(end, found) if end in found else None


def _moves_to(end: Place, found: Mapping[Place, tuple[int, str]]) -> str:
    """The moves to a place from where the distances were measured."""
    moves: list[str] = []
    while found[end][1]:
        moves.append(found[end][1])
        down, right = MOVES[moves[-1]]
        end = end[0] - down, end[1] - right
    return "".join(reversed(moves))


def make_maze(random: Random, height: int, width: int, min_path: int) -> tuple[str, str]:
    """A maze and its answer, cells row by row; S and G are at least `min_path` moves apart.

    Raises:
        DataError: mazes of this size have hardly any way that long.
    """
    for _ in range(_MAX_ATTEMPTS):
        grid = carve(random, height // 2, width // 2)
        start = 2 * random.randrange(height // 2) + 1, 2 * random.randrange(width // 2) + 1
        found = distances_from(grid, start)
        ends = [p for p, (n, _) in found.items() if n >= min_path and p[0] % 2 and p[1] % 2]
        if not ends:
            continue
        end = random.choice(sorted(ends))
        moves = _moves_to(end, found)
        grid[start[0]][start[1]], grid[end[0]][end[1]] = "S", "G"
        question = "".join("".join(row) for row in grid)
        place = start
        for move in moves[:-1]:
            place = place[0] + MOVES[move][0], place[1] + MOVES[move][1]
            grid[place[0]][place[1]] = "o"
        return question, "".join("".join(row) for row in grid)
    raise DataError(
        f"no {height} x {width} maze with a way of {min_path} moves in {_MAX_ATTEMPTS} attempts",
        where="min_path",
        fix="lower min_path or make the mazes larger",
    )


def maze_format(rows: int, columns: int) -> PuzzleFormat:
    """Tokens as in the reference: padding, then `# SGo`."""
    return PuzzleFormat(kind="maze", rows=rows, columns=columns, symbols=("", *"# SGo"))


def check_path(question: Sequence[str], answer: Sequence[str]) -> bool:
    """Whether an answer is the question with a shortest way marked: rows of signs each."""
    if [row.replace("o", " ") for row in answer] != list(question):
        return False
    places = {sign: (r, row.index(sign)) for r, row in enumerate(question) for sign in "SG" if sign in row}
    if len(places) != 2:
        return False
    shortest = shortest_path(question, places["S"], places["G"])
    marked = [row.translate({ord(" "): "#"}) for row in answer]
    inside = shortest_path(marked, places["S"], places["G"])
    if shortest is None or inside is None or len(inside) != len(shortest):
        return False
    return sum(row.count("o") for row in answer) == len(shortest) - 1
