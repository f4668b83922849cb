"""The puzzles of a recipe by part: read from files, or made from a seed.

A puzzle's part depends on what it is, whatever symmetric form it has: no form of a training puzzle is ever tested on.

Shapes: N puzzles, L cells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

import numpy as np

from tafkir.data.puzzles.arc_sets import build_arc
from tafkir.data.puzzles.files import RawPuzzle, read_puzzles
from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.maze import make_maze, maze_format
from tafkir.data.puzzles.official import read_official
from tafkir.data.puzzles.parts import Pair, PuzzleSet, PuzzleSets, PuzzleStream, Samples
from tafkir.data.puzzles.rules import has_rules, is_right, solve_by_rules, symmetry_of
from tafkir.data.puzzles.sudoku import Box, fingerprint, make_puzzle, sudoku_format
from tafkir.data.puzzles.symmetry import DrawSymmetry, dihedral_moves, identity
from tafkir.errors import DataError
from tafkir.recipe.puzzles import ArcPuzzles, GridPuzzles, MazePuzzles, OfficialPuzzles, Puzzles, SudokuPuzzles
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Split
from tafkir.runlog.progress import Progress

__all__ = ["PuzzleSet", "PuzzleSets", "PuzzleStream", "Samples", "build_puzzles"]

# Shares of a file that are tested on and that choose the checkpoint.
_TEST_SHARE, _VALIDATION_SHARE = 0.2, 0.1
# Puzzles of a file are looked at up to this many times those that are wanted.
_SPARE = 2
# Puzzles in a row that are made and thrown away before giving up.
_MAX_MISSES = 2000


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the parts need of a kind of puzzle: a number that all forms of a question share, and a draw of a form."""

    format: PuzzleFormat
    fingerprint: Callable[[Cells], int]
    draw_symmetry: DrawSymmetry | None
    make: Callable[[Random], Pair] | None = None


def build_puzzles(config: Puzzles, seed: int) -> PuzzleSets:
    """The puzzles that a recipe names: read from its file, or made from the seed. Equal arguments, equal puzzles.

    Raises:
        DataError: the file is not what it should be, or there are too few different puzzles of this kind.
    """
    if isinstance(config, ArcPuzzles):
        return build_arc(config, seed)
    if isinstance(config, OfficialPuzzles):
        return read_official(config)
    if isinstance(config, GridPuzzles):
        raw = read_puzzles(config.path, limit=_limit(config), seed=derive_seed(seed, "sample"))
        kind = _grid_kind(config, raw)
    else:
        kind = _sudoku_kind(config) if isinstance(config, SudokuPuzzles) else _maze_kind(config)
        raw = (
            read_puzzles(config.path, limit=_limit(config), seed=derive_seed(seed, "sample"))
            if config.path is not None
            else []
        )
    wanted: dict[Split, int] = {"test": config.num_test, "validation": config.num_validation, "train": config.num_train}
    parts = _share_out(raw, kind, wanted, config.path) if raw else _make_parts(kind, wanted, seed)
    sets = {part: PuzzleSet(*(np.stack(side) for side in zip(*pairs, strict=True))) for part, pairs in parts.items()}
    return PuzzleSets(kind.format, sets["train"], sets["validation"], sets["test"], kind.draw_symmetry)


def _limit(config: SudokuPuzzles | MazePuzzles | GridPuzzles) -> int:
    """So many puzzles of a file fill every part, with room to spare."""
    shares = (_TEST_SHARE, _VALIDATION_SHARE, 1 - _TEST_SHARE - _VALIDATION_SHARE)
    sizes = (config.num_test, config.num_validation, config.num_train)
    return round(_SPARE * max(size / share for size, share in zip(sizes, shares, strict=True)))


def _make_parts(kind: _Kind, wanted: dict[Split, int], seed: int) -> dict[Split, list[Pair]]:
    """Different puzzles until every part is full; which part a puzzle is for depends on its fingerprint."""
    assert kind.make is not None
    total = sum(wanted.values())
    parts: dict[Split, list[Pair]] = {part: [] for part in wanted}
    seen: set[int] = set()
    misses = 0
    with Progress("puzzles", total=total) as progress:
        for number in count():
            if len(seen) == total:
                break
            if misses > _MAX_MISSES:
                found = ", ".join(f"{len(pairs)} of {wanted[part]} for {part}" for part, pairs in parts.items())
                raise DataError(
                    f"hardly any more different puzzles of this kind turn up: {found}",
                    where="trm.puzzles",
                    fix="ask for fewer, or allow more extra givens or larger grids",
                )
            pair = kind.make(Random(derive_seed(seed, "puzzle", number)))
            mark = kind.fingerprint(pair[0])
            part = _part(mark, wanted["test"] / total, wanted["validation"] / total)
            misses += 1
            if mark not in seen and len(parts[part]) < wanted[part]:
                seen.add(mark)
                parts[part].append(pair)
                misses = 0
                progress.update(len(seen))
    return parts


def _share_out(
    raw: Sequence[RawPuzzle], kind: _Kind, wanted: dict[Split, int], path: str | None
) -> dict[Split, list[Pair]]:
    """Puzzles of a file by part; a puzzle that is there twice, in whatever form, counts once outside of training."""
    parts: dict[Split, list[Pair]] = {part: [] for part in wanted}
    seen: set[int] = set()
    for puzzle in raw:
        question = kind.format.read("\n".join(puzzle.question), puzzle.where)
        pair = question, _answer(kind.format, question, puzzle)
        mark = kind.fingerprint(question)
        part = _part(mark, _TEST_SHARE, _VALIDATION_SHARE)
        if len(parts[part]) < wanted[part] and (part == "train" or mark not in seen):
            parts[part].append(pair)
        seen.add(mark)
    for part, pairs in parts.items():
        if not pairs:
            raise DataError(f"none of the {len(raw)} puzzles is for {part}", where=path, fix="give more puzzles")
    return parts


def _answer(format: PuzzleFormat, question: Cells, puzzle: RawPuzzle) -> Cells:
    if not has_rules(format):
        if puzzle.answer is None:
            raise DataError("there is no output", where=puzzle.where, expected="a grid under 'output'")
        return format.read("\n".join(puzzle.answer), puzzle.where)
    given = None
    if puzzle.answer is not None:
        given = format.read("\n".join(puzzle.answer), puzzle.where)
        if not is_right(format, question, given):
            raise DataError(
                "the output is not the puzzle's answer", where=puzzle.where, fix="correct it, or leave it out"
            )
        if format.kind == "maze":
            # Published mazes may have several shortest ways, of which the answer marks one.
            return given
    return solve_by_rules(format, question, puzzle.where)


def _part(mark: int, test_share: float, validation_share: float) -> Split:
    """By a hash of the fingerprint."""
    digest = hashlib.blake2b(mark.to_bytes(16, "big"), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    return "test" if position < test_share else "validation" if position < test_share + validation_share else "train"


# ---- kinds -------------------------------------------------------------------------------------------------------


def _sudoku_kind(config: SudokuPuzzles) -> _Kind:
    box = Box(config.box_rows, config.box_columns)

    def make(random: Random) -> Pair:
        grid, solution = make_puzzle(random, box, random.randint(config.min_extra_givens, config.max_extra_givens))
        return np.array(grid, dtype=np.uint8) + np.uint8(1), np.array(solution, dtype=np.uint8) + np.uint8(1)

    format = sudoku_format(box)
    return _Kind(format, lambda cells: fingerprint(cells, box), symmetry_of(format), make)


def _maze_kind(config: MazePuzzles) -> _Kind:
    format = maze_format(config.rows, config.columns)

    def make(random: Random) -> Pair:
        question, answer = make_maze(random, config.rows, config.columns, config.min_path)
        return format.encode(question), format.encode(answer)

    return _turning_kind(format, turns=True, make=make)


def _grid_kind(config: GridPuzzles, raw: Sequence[RawPuzzle]) -> _Kind:
    """Size and symbols are those of the file's grids, which must all have one size."""
    rows, columns = len(raw[0].question), len(raw[0].question[0])
    for puzzle in raw:
        for grid in (puzzle.question, puzzle.answer or puzzle.question):
            if (len(grid), len(grid[0])) != (rows, columns):
                raise DataError(
                    f"the grid is {len(grid)} x {len(grid[0])}",
                    where=puzzle.where,
                    expected=f"{rows} x {columns}, as the first one is",
                )
    signs = sorted({s for p in raw for grid in (p.question, p.answer or ()) for row in grid for s in row})
    if unknown := sorted(set(config.exchangeable) - set(signs)):
        raise DataError(
            f"no grid holds {''.join(unknown)!r}",
            where="trm.puzzles.exchangeable",
            expected=f"some of {''.join(signs)!r}",
        )
    symbols = ("", *signs)
    tokens = tuple(symbols.index(sign) for sign in config.exchangeable)
    format = PuzzleFormat(
        kind="grids", rows=rows, columns=columns, symbols=symbols, turns=config.turns, exchangeable=tokens
    )
    return _turning_kind(format, turns=config.turns)


def _turning_kind(format: PuzzleFormat, *, turns: bool, make: Callable[[Random], Pair] | None = None) -> _Kind:
    """Puzzles whose forms are turned and mirrored, and have some symbols exchanged."""
    plain = identity(format.num_cells, format.vocab_size)
    forms = dihedral_moves(format.rows, format.columns) if turns else [plain.moves]

    def mark(cells: Cells) -> int:
        found = min(_first_come(cells[moves], format.exchangeable) for moves in forms)
        return int.from_bytes(hashlib.blake2b(found, digest_size=8).digest(), "big")

    return _Kind(format, mark, symmetry_of(format), make)


def _first_come(cells: Cells, exchangeable: Sequence[int]) -> bytes:
    """The grid with its exchangeable symbols renamed in the order in which they turn up."""
    if not exchangeable:
        return cells.tobytes()
    names: dict[int, int] = {}
    for token in cells.tolist():
        if token in exchangeable and token not in names:
            names[token] = exchangeable[len(names)]
    return bytes(names.get(token, token) for token in cells.tolist())
