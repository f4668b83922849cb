"""What the rules of a puzzle say, where they are known: its answer, whether one is right, and its other forms."""

from __future__ import annotations

from random import Random

from tafkir.data.puzzles.format import PAD, Cells, PuzzleFormat
from tafkir.data.puzzles.maze import MOVES, check_path, distances_from, shortest_path
from tafkir.data.puzzles.sudoku import Box, check_solution, draw_symmetry, solve_unique
from tafkir.data.puzzles.symmetry import DrawSymmetry, Symmetry, dihedral_moves, draw_exchange, identity
from tafkir.errors import DataError

__all__ = ["has_rules", "is_right", "solve_by_rules", "symmetry_of"]


def has_rules(format: PuzzleFormat) -> bool:
    """Whether answers can be checked without knowing the right one."""
    return format.kind in ("sudoku", "maze")


def is_right(format: PuzzleFormat, question: Cells, answer: Cells) -> bool:
    """Whether an answer keeps the rules and what was given.

    Raises:
        DataError: no rules are known for this kind of puzzle.
    """
    if format.kind == "sudoku":
        assert format.box is not None
        return check_solution(_digits(question), _digits(answer), Box(*format.box))
    if format.kind == "maze":
        return bool((answer != PAD).all()) and check_path(_signs(format, question), _signs(format, answer))
    raise DataError(f"no rules are known for {format.kind}", expected="sudoku or maze")


def solve_by_rules(format: PuzzleFormat, question: Cells, where: str | None = None) -> Cells:
    """The one right answer, found by search.

    Raises:
        DataError: there is none, or there are several; or no rules are known for this kind of puzzle.
    """
    if format.kind == "sudoku":
        assert format.box is not None
        solution = solve_unique(_digits(question), Box(*format.box), where)
        return format.encode([format.symbols[digit + 1] for digit in solution], where)
    if format.kind == "maze":
        return format.encode("".join(_mark_way(_signs(format, question), where)), where)
    raise DataError(f"no rules are known for {format.kind}", where=where, expected="sudoku or maze")


def symmetry_of(format: PuzzleFormat) -> DrawSymmetry | None:
    """Draws another form of the same puzzle; None where no form but its own is known."""
    if format.kind == "sudoku":
        assert format.box is not None
        box = Box(*format.box)
        return lambda random: draw_symmetry(random, box)
    turns = format.kind == "maze" or format.turns
    if not turns and not format.exchangeable:
        return None
    plain = identity(format.num_cells, format.vocab_size)
    forms = dihedral_moves(format.rows, format.columns) if turns else [plain.moves]

    def draw(random: Random) -> Symmetry:
        tokens = format.exchangeable
        symbols = draw_exchange(random, format.vocab_size, tokens) if tokens else plain.symbols
        return Symmetry(random.choice(forms), symbols)

    return draw


def _digits(cells: Cells) -> list[int]:
    """0 for a blank (token 1); the padding is no digit, and becomes -1."""
    return [token - 1 for token in cells.tolist()]


def _signs(format: PuzzleFormat, cells: Cells) -> list[str]:
    return format.show(cells).split("\n")


def _mark_way(rows: list[str], where: str | None) -> list[str]:
    """The maze with its one shortest way marked."""
    places = {}
    for sign in "SG":
        found = [(r, c) for r, row in enumerate(rows) for c, cell in enumerate(row) if cell == sign]
        if len(found) != 1:
            raise DataError(f"the maze has {len(found)} {sign}", where=where, expected="one S and one G")
        places[sign] = found[0]
    if any("o" in row for row in rows):
        raise DataError("the maze has its way marked already", where=where, expected="symbols '# SG'")
    moves = shortest_path(rows, places["S"], places["G"])
    if moves is None:
        raise DataError("no way leads from S to G", where=where, fix="look for a wall too many")
    ahead, back = distances_from(rows, places["S"]), distances_from(rows, places["G"])
    on_shortest = [p for p in ahead if p in back and ahead[p][0] + back[p][0] == len(moves)]
    if len(on_shortest) > len(moves) + 1:
        raise DataError("several shortest ways lead from S to G", where=where, fix="close all but one")
    grid = [list(row) for row in rows]
    place = places["S"]
    for move in moves[:-1]:
        place = place[0] + MOVES[move][0], place[1] + MOVES[move][1]
        grid[place[0]][place[1]] = "o"
    return ["".join(row) for row in grid]
