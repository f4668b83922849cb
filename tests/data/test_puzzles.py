"""Puzzles: exactly one answer, symmetric forms of the same puzzle, parts that share none, files with clear errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tafkir.data.puzzles import sets
from tafkir.data.puzzles.files import read_puzzles
from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.maze import check_path, distances_from, make_maze, maze_format, shortest_path
from tafkir.data.puzzles.rules import has_rules, is_right, solve_by_rules
from tafkir.data.puzzles.sets import PuzzleStream, build_puzzles
from tafkir.data.puzzles.sudoku import (
    Box,
    check_solution,
    count_solutions,
    draw_symmetry,
    find_conflict,
    fingerprint,
    is_forced,
    make_puzzle,
    solve,
    solve_unique,
    sudoku_format,
)
from tafkir.data.puzzles.symmetry import dihedral_moves
from tafkir.errors import DataError
from tafkir.recipe.puzzles import GridPuzzles, MazePuzzles, SudokuPuzzles

BOXES = [Box(2, 2), Box(2, 3), Box(3, 2), Box(1, 5)]
SEEDS = st.integers(0, 2**40)
# Arto Inkala's puzzle of 2012; its solution is unique.
HARD = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."
HARD_SOLUTION = "812753649943682175675491283154237896369845721287169534521974368438526917796318452"


def digits(text: str) -> list[int]:
    return [0 if sign in ".0" else int(sign, 36) for sign in text]


# ---- Sudoku ------------------------------------------------------------------------------------------------------


def test_there_are_288_grids_of_four_by_four() -> None:
    assert count_solutions([0] * 16, Box(2, 2), limit=1000) == 288


def test_a_hard_puzzle_of_nine_by_nine() -> None:
    assert solve_unique(digits(HARD), Box(3, 3)) == digits(HARD_SOLUTION)


@pytest.mark.parametrize("box", BOXES)
@settings(max_examples=3)
@given(seed=SEEDS)
def test_made_puzzles_are_minimal_and_have_one_solution(box: Box, seed: int) -> None:
    grid, solution = make_puzzle(Random(seed), box)
    assert check_solution(grid, solution, box) and count_solutions(grid, box) == 1
    for cell in [cell for cell, value in enumerate(grid) if value]:
        fewer = [*grid[:cell], 0, *grid[cell + 1 :]]
        assert count_solutions(fewer, box) == 2 and not is_forced(fewer, box, cell, grid[cell])
    more, same = make_puzzle(Random(seed), box, 3)
    assert same == solution and sum(map(bool, more)) == sum(map(bool, grid)) + 3


@settings(max_examples=6)
@given(seed=SEEDS)
def test_solutions_are_counted_like_by_brute_force(seed: int) -> None:
    """Six empty cells, all 4^6 ways to fill them."""
    random = Random(seed)
    full = solve([0] * 16, Box(2, 2), random)
    assert full is not None
    empty = random.sample(range(16), 6)
    grid = [0 if cell in empty else value for cell, value in enumerate(full)]
    found = 0
    for values in product(range(1, 5), repeat=6):
        filled = list(grid)
        for cell, value in zip(empty, values, strict=True):
            filled[cell] = value
        found += find_conflict(filled, Box(2, 2)) is None
    assert count_solutions(grid, Box(2, 2), limit=10_000) == found


@pytest.mark.parametrize(
    ("puzzle", "message"),
    [
        ("11" + "." * 14, "1 stands at row 1, column 1 and row 1, column 2, which see each other"),
        ("123....4" + "." * 8, "the puzzle has no solution"),
        ("." * 16, "the puzzle has several solutions"),
    ],
)
def test_puzzles_that_are_none(puzzle: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        solve_by_rules(sudoku_format(Box(2, 2)), sudoku_format(Box(2, 2)).read(puzzle), where="here")
    assert str(caught.value).startswith("here: ")


@pytest.mark.parametrize("box", [*BOXES, Box(3, 3)])
@settings(max_examples=4)
@given(seed=SEEDS)
def test_symmetric_forms_are_the_same_puzzle(box: Box, seed: int) -> None:
    random = Random(seed)
    solution = solve([0] * box.side**2, box, random)
    assert solution is not None
    answer = np.array(solution, dtype=np.uint8) + np.uint8(1)
    question = np.where(np.array([random.random() < 0.4 for _ in solution]), answer, 1).astype(np.uint8)
    form = draw_symmetry(random, box)
    assert check_solution(form.apply(question) - 1, form.apply(answer) - 1, box)
    assert fingerprint(form.apply(question), box) == fingerprint(question, box)
    assert (form.undo(form.apply(question)) == question).all()


def test_fingerprints_tell_puzzles_apart() -> None:
    """All 36 classes of minimal 4x4 puzzles (13 with 4 givens, 22 with 5, one with 6), and no more."""
    marks: dict[int, set[int]] = {}
    for seed in range(700):
        grid, _ = make_puzzle(Random(seed), Box(2, 2))
        marks.setdefault(sum(map(bool, grid)), set()).add(
            fingerprint(np.array(grid, dtype=np.uint8) + np.uint8(1), Box(2, 2))
        )
    assert {givens: len(found) for givens, found in sorted(marks.items())} == {4: 13, 5: 22, 6: 1}


# ---- mazes -------------------------------------------------------------------------------------------------------


@settings(max_examples=5)
@given(seed=SEEDS, rows=st.sampled_from([7, 9, 11]), columns=st.sampled_from([7, 11]))
def test_a_maze_has_one_way_of_the_length_asked_for(seed: int, rows: int, columns: int) -> None:
    format = maze_format(rows, columns)
    question, answer = (format.encode(cells) for cells in make_maze(Random(seed), rows, columns, 8))
    assert (solve_by_rules(format, question) == answer).all()
    assert is_right(format, question, answer) and not is_right(format, question, question)
    lines = format.show(answer).split("\n")
    assert sum(line.count("o") for line in lines) >= 7
    inside = [(r, c) for r in range(1, rows, 2) for c in range(1, columns, 2)]
    reached = distances_from(format.show(question).split("\n"), (1, 1))
    assert set(inside) <= set(reached) and len(reached) == 2 * len(inside) - 1, "a spanning tree"
    for moves in dihedral_moves(rows, columns):
        assert is_right(format, question[moves], answer[moves]) or rows != columns


def test_paths() -> None:
    rows = ["#####", "#S  #", "# # #", "#  G#", "#####"]
    assert shortest_path(rows, (1, 1), (3, 3)) in ("DDRR", "RRDD")
    assert shortest_path(["#####", "#S#G#", "#####"], (1, 1), (1, 3)) is None
    assert check_path(["#####", "#S G#", "#####"], ["#####", "#SoG#", "#####"])
    for wrong in (["#####", "#S G#", "#####"], ["#####", "#SoG#", "####o"], ["#####", "#oSG#", "#####"]):
        assert not check_path(["#####", "#S G#", "#####"], wrong)
    with pytest.raises(DataError, match="no 5 x 5 maze with a way of 30 moves"):
        make_maze(Random(0), 5, 5, 30)


@pytest.mark.parametrize(
    ("maze", "message"),
    [
        ("#####\n#S #\n#  G#\n#####", "several shortest ways"),
        ("#####\n#S#G#\n#####\n#####", "no way leads from S to G"),
        ("#####\n#S  #\n#   #\n#####", "the maze has 0 G; expected one S and one G"),
        ("#####\n#SoG#\n#   #\n#####", "marked already"),
        ("#####\n#S xG\n#####\n#####", "unknown symbol 'x' in row 2, column 4"),
        ("#####\n#S G#\n#####", "the grid has 15 cells; expected 4 x 5 = 20"),
    ],
)
def test_mazes_that_are_none(maze: str, message: str) -> None:
    format = maze_format(4, 5)
    with pytest.raises(DataError, match=message):
        solve_by_rules(format, format.read(maze))


# ---- text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "1..4.2.....3....",
        "1 0 0 4\n0 2 0 0\n0 0 0 3\n0 0 0 0",
        "1_|_4\n_2|__\n--+--\n__|_3\n__|__\r\n",
        "1??4?2?????3????",
    ],
)
def test_a_sudoku_is_read_from_any_usual_text(text: str) -> None:
    format = sudoku_format(Box(2, 2))
    assert format.show(format.read(text)) == "1..4\n.2..\n...3\n...."


def test_sizes_and_symbols_of_text() -> None:
    format = sudoku_format(Box(2, 2))
    with pytest.raises(DataError, match=r"x: the grid has 3 cells; expected 4 x 4 = 16"):
        format.read("123", "x")
    with pytest.raises(DataError, match=r"unknown symbol '7' in row 1, column 2; expected one of '.1234'"):
        format.read("17" + "." * 14)
    assert PuzzleFormat.model_validate(format.model_dump(mode="json")) == format
    big = sudoku_format(Box(4, 4))
    assert big.vocab_size == 18 and big.show(big.read("g" + "." * 255))[0] == "G"


# ---- parts and streams -------------------------------------------------------------------------------------------

SMALL = {"num_train": 40, "num_validation": 8, "num_test": 16}


@pytest.mark.parametrize(
    "config", [SudokuPuzzles(**SMALL), SudokuPuzzles(box_columns=3, **SMALL), MazePuzzles(rows=9, columns=9, **SMALL)]
)
def test_no_form_of_a_training_puzzle_is_held_out(config: SudokuPuzzles | MazePuzzles) -> None:
    built = build_puzzles(config, 3)
    assert built.counts() == {"train": 40, "validation": 8, "test": 16}
    forms: list[set[bytes]] = []
    for part in (built.train, built.validation, built.test):
        random = Random(0)
        own = {built.draw_symmetry(random).apply(row).tobytes() for row in part.inputs for _ in range(40)}
        forms.append(own | {row.tobytes() for row in part.inputs})
        for question, answer in zip(part.inputs, part.labels, strict=True):
            assert is_right(built.format, question, answer)
    assert not forms[0] & forms[1] and not forms[0] & forms[2] and not forms[1] & forms[2]
    again = build_puzzles(config, 3)
    assert (again.train.inputs == built.train.inputs).all() and (again.test.labels == built.test.labels).all()
    assert (build_puzzles(config, 4).train.inputs != built.train.inputs).any()


def test_more_puzzles_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "_MAX_MISSES", 50)
    with pytest.raises(DataError, match=r"hardly any more different puzzles .* of 500 for train"):
        build_puzzles(SudokuPuzzles(max_extra_givens=0, num_train=500, num_validation=1, num_test=1), 0)


def test_givens_beyond_the_needed_ones() -> None:
    config = SudokuPuzzles(min_extra_givens=5, max_extra_givens=6, num_train=12, num_validation=1, num_test=1)
    found = {int((question > 1).sum()) for question in build_puzzles(config, 0).train.inputs}
    # Minimal 4x4 puzzles have 4, 5 or (rarely) 6 givens.
    assert found <= set(range(9, 13)) and len(found) > 1


def test_a_sample_depends_on_its_number_alone() -> None:
    built = build_puzzles(SudokuPuzzles(**SMALL), 0)
    stream = PuzzleStream(built, augment=True, seed=5)
    whole = stream.take(30, 60)
    parts = [PuzzleStream(built, augment=True, seed=5).take(30 + i, 1) for i in (59, 3, 17)]
    for i, part in zip((59, 3, 17), parts, strict=True):
        assert (part.inputs[0] == whole.inputs[i]).all() and (part.labels[0] == whole.labels[i]).all()
    assert all(is_right(built.format, q, a) for q, a in zip(whole.inputs, whole.labels, strict=True))
    plain = PuzzleStream(built, augment=False, seed=5)
    epochs = [{row.tobytes() for row in plain.take(40 * e, 40).inputs} for e in (0, 1)]
    assert epochs[0] == epochs[1] == {row.tobytes() for row in built.train.inputs}, "an epoch visits every puzzle"
    assert (plain.take(0, 40).inputs != plain.take(40, 40).inputs).any(), "in another order"
    assert not whole.puzzle_ids.any()


# ---- files -------------------------------------------------------------------------------------------------------


def flipped(random: Random) -> dict[str, list[list[int]]]:
    """A made-up task: the output is the input with 0 and 1 exchanged."""
    grid = [[random.randint(0, 1) for _ in range(3)] for _ in range(3)]
    return {"input": grid, "output": [[1 - cell for cell in row] for row in grid]}


def as_json(path: Path, rows: object) -> str:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def test_grids_of_ones_own(tmp_path: Path) -> None:
    random = Random(0)
    path = as_json(tmp_path / "flip.json", [flipped(random) for _ in range(80)])
    built = build_puzzles(GridPuzzles(path=path, turns=True, exchangeable="01"), 0)
    assert built.format.symbols == ("", "0", "1") and (built.format.rows, built.format.columns) == (3, 3)
    assert not has_rules(built.format)
    for part in (built.train, built.validation, built.test):
        assert len(part) and (part.inputs + part.labels == 3).all()

    def key(cells: Cells) -> bytes:
        """All forms of a grid: turned, mirrored, 0 and 1 exchanged."""
        return min(bytes(c) for m in dihedral_moves(3, 3) for c in (cells[m], 3 - cells[m]))

    keys = [{key(row) for row in part.inputs} for part in (built.train, built.validation, built.test)]
    assert not keys[0] & keys[1] and not keys[0] & keys[2]
    drawn = PuzzleStream(built, augment=True, seed=0).take(0, 50)
    assert (drawn.inputs + drawn.labels == 3).all()


def test_sudokus_of_ones_own(tmp_path: Path) -> None:
    """As in the published CSV, with or without answers: the solver adds them."""
    lines = ["source,question,answer,rating"]
    for seed in range(40):
        grid, solution = make_puzzle(Random(seed), Box(2, 2), 2)
        answer = "".join(map(str, solution)) if seed % 2 else ""
        lines.append(f"x,{''.join(map(str, grid)).replace('0', '.')},{answer},3")
    (tmp_path / "own.csv").write_text("\n".join(lines), encoding="utf-8")
    built = build_puzzles(SudokuPuzzles(path=str(tmp_path / "own.csv")), 0)
    assert sum(built.counts().values()) <= 40 and len(built.train) > 10
    (tmp_path / "own.txt").write_text("\n".join(line.split(",")[1] for line in lines[1:]), encoding="utf-8")
    same = build_puzzles(SudokuPuzzles(path=str(tmp_path / "own.txt")), 0)
    assert (same.train.inputs == built.train.inputs).all() and (same.train.labels == built.train.labels).all()


def test_mazes_of_ones_own(tmp_path: Path) -> None:
    rows = []
    for seed in range(40):
        cells, _ = make_maze(Random(seed), 7, 7, 4)
        rows.append({"input": [cells[i : i + 7] for i in range(0, 49, 7)]})
    built = build_puzzles(MazePuzzles(path=as_json(tmp_path / "own.json", rows), rows=7, columns=7), 0)
    assert all(is_right(built.format, q, a) for q, a in zip(built.test.inputs, built.test.labels, strict=True))


BAD_FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("a.json", lambda p: p.write_text("[{"), r"a.json:1: not valid JSON"),
    ("b.json", lambda p: p.write_text("{}"), r"not a list of puzzles"),
    ("c.json", lambda p: as_json(p, [3]), r"puzzle 1: not an object"),
    ("d.json", lambda p: as_json(p, [{"output": [[1]]}]), r"puzzle 1: there is no input"),
    ("e.json", lambda p: as_json(p, [{"input": [[1, 2], [3]]}]), r"rows have different lengths: 2, 1"),
    ("f.json", lambda p: as_json(p, [{"input": [[10]], "output": [[1]]}]), r"unknown symbol 10"),
    ("g.json", lambda p: as_json(p, [{"input": [[1]]}]), r"puzzle 1: there is no output"),
    (
        "h.json",
        lambda p: as_json(p, [{"input": [[1]], "output": [[1]]}, {"input": [[1, 1]], "output": [[1, 1]]}]),
        r"puzzle 2: the grid is 1 x 2; expected 1 x 1",
    ),
    ("i.json", lambda p: as_json(p, [{"input": [[1]], "output": [[1]]}]), r"none of the 1 puzzles is for"),
    ("j.json", lambda p: as_json(p, []), r"holds no puzzle"),
    ("k.csv", lambda p: p.write_text("x,y\n1,2\n"), r"k.csv:1: the header is 'x, y'"),
    ("l.csv", lambda p: p.write_text("input,output\n,2\n"), r"l.csv:2: there is no input"),
    ("m.json", lambda p: p.write_bytes(b"\xff\xfe"), r"cannot be read as UTF-8"),
    ("n.json", lambda p: None, r"no such file"),
]


@pytest.mark.parametrize(("name", "write", "message"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_files_that_are_not_right(tmp_path: Path, name: str, write: Callable[[Path], object], message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(DataError, match=message):
        build_puzzles(GridPuzzles(path=str(tmp_path / name)), 0)


def test_answers_that_are_wrong_and_symbols_that_are_not_there(tmp_path: Path) -> None:
    row = {"input": "1..4.2.....3....", "output": "1234341221434321"}
    with pytest.raises(
        DataError, match=r"puzzle 1: the puzzle has several solutions|the output is not the puzzle's answer"
    ):
        build_puzzles(SudokuPuzzles(path=as_json(tmp_path / "wrong.json", [row])), 0)
    path = as_json(tmp_path / "flip.json", [flipped(Random(i)) for i in range(9)])
    with pytest.raises(DataError, match=r"no grid holds '7'; expected some of '01'"):
        build_puzzles(GridPuzzles(path=path, exchangeable="017"), 0)


@pytest.mark.parametrize(
    ("table", "given", "message"),
    [
        (SudokuPuzzles, {"box_rows": 5, "box_columns": 5}, "must be 2 to 16"),
        (SudokuPuzzles, {"min_extra_givens": 4}, "larger than max_extra_givens"),
        (MazePuzzles, {"rows": 10}, "must be odd"),
        (MazePuzzles, {"rows": 5, "columns": 5, "min_path": 9}, "larger than 6"),
    ],
)
def test_sizes_that_cannot_be(table: type[SudokuPuzzles], given: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        table.model_validate(given)


def test_a_large_file_is_sampled(tmp_path: Path) -> None:
    lines = [f"{number:04d}" for number in range(2000)]
    (tmp_path / "many.txt").write_text("\n".join(lines))

    def drawn(seed: int, limit: int | None = 300) -> list[str]:
        return [puzzle.question[0] for puzzle in read_puzzles(tmp_path / "many.txt", limit=limit, seed=seed)]

    assert drawn(0) == sorted(drawn(0)) and len(set(drawn(0))) == 300 and drawn(0) != drawn(1)
    assert abs(sum(int(line) for line in drawn(0)) / 300 - 1000) < 100, "from the whole file"
    assert drawn(0, None) == drawn(5, 2000) == lines


def test_a_published_maze_may_have_several_shortest_ways(tmp_path: Path) -> None:
    """Each answer marks one of them, and is taken as it is; without an answer that is an error."""
    rows = []
    for number in range(60):
        cells = [["#"] * 8 for _ in range(8)]
        for row, column in ((1, 1), (1, 2), (2, 1), (2, 2)):
            cells[row][column] = " "
        for bit in range(6):
            cells[4 + bit // 3][4 + bit % 3] = "# "[number >> bit & 1]
        cells[1][1], cells[2][2] = "S", "G"
        question = "".join(map("".join, cells))
        cells[1][2] = "o"
        rows.append({"question": question, "answer": "".join(map("".join, cells))})
    sizes = {"rows": 8, "columns": 8, "num_train": 20, "num_validation": 2, "num_test": 2}
    built = build_puzzles(MazePuzzles(path=as_json(tmp_path / "given.json", rows), **sizes), 0)
    assert all(is_right(built.format, q, a) for q, a in zip(built.train.inputs, built.train.labels, strict=True))
    bare = as_json(tmp_path / "bare.json", [{"question": row["question"]} for row in rows])
    with pytest.raises(DataError, match="several shortest ways"):
        build_puzzles(MazePuzzles(path=bare, **sizes), 0)
