"""Every generated puzzle has an answer, any right answer is taken, and a wrong one is told why."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import permutations, product
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tafkir.data.arithmetic import ExpressionError, evaluate, parse_expression
from tafkir.data.puzzles.sudoku import Box, count_solutions
from tafkir.data.split import generated_split
from tafkir.errors import DataError
from tafkir.records import Example
from tafkir.tasks.generated import GeneratedTask, Puzzle, PuzzleKind, generate
from tafkir.tasks.puzzles.countdown import COUNTDOWN, GAME_24, make_countdown, make_game_24, solve
from tafkir.tasks.puzzles.grids import GRIDS, TRANSFORMATIONS, make_grids
from tafkir.tasks.puzzles.knights import KNIGHTS_AND_KNAVES, make_knights
from tafkir.tasks.puzzles.maze import MAZE, make_maze
from tafkir.tasks.puzzles.sudoku import SUDOKU, make_sudoku

KINDS = {"countdown": (COUNTDOWN, 6), "game_24": (GAME_24, 3), "sudoku": (SUDOKU, 6), "maze": (MAZE, 6)}
KINDS |= {"knights_and_knaves": (KNIGHTS_AND_KNAVES, 5), "grids": (GRIDS, 5)}
SEEDS = st.integers(0, 2**60)


def outcome(kind: PuzzleKind, puzzle: Puzzle, answer: str) -> str:
    verdict, reason = kind.check(puzzle.data, answer)
    assert (verdict == "correct") == (reason == "")
    return verdict


@pytest.mark.parametrize("level", [(name, level) for name, (_, top) in KINDS.items() for level in range(1, top + 1)])
def test_the_reference_answer_is_right_at_every_level(level: tuple[str, int]) -> None:
    kind, number = KINDS[level[0]][0], level[1]
    for seed in range(2 if level == ("sudoku", 6) else 5):
        puzzle = kind.make(seed, number)
        assert puzzle == kind.make(seed, number)
        assert outcome(kind, puzzle, puzzle.answer) == "correct"
        assert len(puzzle.answer) < 1000


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, name=st.sampled_from(sorted(KINDS)), data=st.data())
def test_a_changed_answer_is_wrong(seed: int, name: str, data: st.DataObject) -> None:
    kind, _ = KINDS[name]
    puzzle = kind.make(seed, 2)
    place = data.draw(st.integers(0, len(puzzle.answer) - 1))
    for sign in ("9", "0", "+", "U", "X", ""):
        changed = puzzle.answer[:place] + sign + puzzle.answer[place + 1 :]
        if outcome(kind, puzzle, changed) == "correct":
            assert kind in (COUNTDOWN, GAME_24, MAZE) or changed.split() == puzzle.answer.split() or sign in ("", "+")
            assert _still_right(name, puzzle, changed)


def _still_right(name: str, puzzle: Puzzle, text: str) -> bool:
    """An independent, slower judge."""
    data = puzzle.data
    if name in ("countdown", "game_24"):
        return int(eval(text)) == data["target"] == eval(text)
    if name == "maze":
        return _walk(data["rows"], text)
    return True  # nothing but a separator went


def _walk(rows: list[str], moves: str) -> bool:
    at = next(complex(r, row.index("S")) for r, row in enumerate(rows) if "S" in row)
    for move in moves:
        at += {"U": -1, "D": 1, "L": -1j, "R": 1j}[move]
        if rows[int(at.real)][int(at.imag)] == "#":
            return False
    return rows[int(at.real)][int(at.imag)] == "E"


def test_countdown_takes_any_expression_that_keeps_the_rules() -> None:
    data = {"numbers": [3, 5, 8, 2], "target": 24, "all": False}
    right = ["3*8", "8*3", "(5-2)*8", "24 = 3*8"[5:], "3 \\times 8", "3 x 8 = 24", "8×3", "8/(2/(3*2-0))"]
    assert [COUNTDOWN.check(data, text)[0] for text in right] == ["correct"] * 7 + ["wrong"]
    wrong = {
        "3*8*2/2": "uses 2, which is not given (so often)",
        "24": "uses 24, which is not given (so often)",
        "8+5": "makes 13, not 24",
        "8*3=25": "what stands after = is not the target",
        "8**3": "not an expression",
        "import os": "not an expression",
        "8/(5-5)": "not an expression: division by zero",
        "": "not an expression",
        "(" * 300: "too many brackets or signs",
        "-" * 39 + "(" * 2: "too many brackets or signs",
    }
    for text, reason in wrong.items():
        assert COUNTDOWN.check(data, text) == ("wrong", COUNTDOWN.check(data, text)[1])
        assert reason in COUNTDOWN.check(data, text)[1], text
    assert GAME_24.check(data | {"all": True}, "3*8") == ("wrong", "leaves out 2")
    assert GAME_24.check({"numbers": [8, 8, 3, 3], "target": 24, "all": True}, "8/(3-8/3)") == ("correct", "")


def test_the_solver_of_24_agrees_with_trying_every_bracketing() -> None:
    shapes = ["((a.b).c).d", "(a.(b.c)).d", "(a.b).(c.d)", "a.((b.c).d)", "a.(b.(c.d))"]
    for seed in range(5):
        numbers = [Random(seed).randint(1, 9) for seed in range(4 * seed, 4 * seed + 4)]
        reached = False
        for order, shape, operators in product(set(permutations(numbers)), shapes, product("+-*/", repeat=3)):
            text = shape
            for letter, number in zip("abcd", order, strict=True):
                text = text.replace(letter, str(number))
            for operator in operators:
                text = text.replace(".", operator, 1)
            try:
                reached = evaluate(parse_expression(text)) == 24
            except ExpressionError:
                continue
            if reached:
                break
        assert (solve(numbers, 24) is not None) == reached


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, level=st.integers(1, 3))
def test_a_small_sudoku_has_one_solution_by_trying_everything(seed: int, level: int) -> None:
    puzzle = make_sudoku(seed, level)
    grid = puzzle.data["grid"]
    rows = list(permutations((1, 2, 3, 4)))
    fitting = [
        [row for row in rows if all(g in (0, v) for g, v in zip(grid[i : i + 4], row, strict=True))]
        for i in (0, 4, 8, 12)
    ]
    found = [
        "".join(map(str, sum(four, ())))
        for four in product(*fitting)
        if all(len({row[c] for row in four}) == 4 for c in range(4))
        and all(len({*four[r][c : c + 2], *four[r + 1][c : c + 2]}) == 4 for r in (0, 2) for c in (0, 2))
    ]
    assert found == [puzzle.answer.replace(" ", "")]


def test_a_large_sudoku_is_unique_and_an_empty_one_is_not() -> None:
    puzzle = make_sudoku(3, 5)
    assert puzzle.data["grid"].count(0) == 42
    assert count_solutions(puzzle.data["grid"], Box(3, 3)) == 1
    assert count_solutions([0] * 81, Box(3, 3)) == 2
    assert count_solutions([1, 1] + [0] * 14, Box(2, 2)) == 0


def test_a_sudoku_says_which_cell_is_wrong() -> None:
    puzzle = make_sudoku(0, 1)
    digits = puzzle.answer.replace(" ", "")
    layouts = ["|".join(digits), "[" + ", ".join(digits) + "]", puzzle.answer.replace(" ", "\n")]
    layouts.append(puzzle.answer.translate({ord(str(d)): chr(0x660 + d) for d in range(10)}))
    for layout in layouts:
        assert SUDOKU.check(puzzle.data, layout) == ("correct", "")
    cell = puzzle.data["grid"].index(next(v for v in puzzle.data["grid"] if v))
    changed = digits[:cell] + str(int(digits[cell]) % 4 + 1) + digits[cell + 1 :]
    place = f"row {cell // 4 + 1}, column {cell % 4 + 1}"
    assert SUDOKU.check(puzzle.data, changed) == ("wrong", f"{place} was given as {digits[cell]}")
    assert SUDOKU.check(puzzle.data, digits[:-1]) == ("wrong", "15 cells instead of 16")
    assert SUDOKU.check(puzzle.data, "one") == ("wrong", "something else than digits in the grid")


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, level=st.integers(1, 5))
def test_a_maze_can_be_walked_and_detours_count(seed: int, level: int) -> None:
    puzzle = make_maze(seed, level)
    rows, path = puzzle.data["rows"], puzzle.answer
    assert _walk(rows, path)
    back = {"U": "D", "D": "U", "L": "R", "R": "L"}
    detour = path[0] + back[path[0]] + path
    assert MAZE.check(puzzle.data, detour) == ("correct", "")
    words = {"U": "up", "D": "Down", "L": "left", "R": "RIGHT"}
    assert MAZE.check(puzzle.data, ", ".join(words[move] for move in path)) == ("correct", "")
    assert MAZE.check(puzzle.data, path.translate(str.maketrans("UDLR", "↑↓←→"))) == ("correct", "")
    assert "before E" in MAZE.check(puzzle.data, path[:-1])[1]
    blocked = next(move for move in "UDLR" if not _walk_one(rows, move))
    assert MAZE.check(puzzle.data, blocked + path) == ("wrong", f"move 1 ({blocked}) runs into a wall")
    assert MAZE.check(puzzle.data, "north") == ("wrong", "'N' is no move")


def _walk_one(rows: list[str], move: str) -> bool:
    r, c = next((r, row.index("S")) for r, row in enumerate(rows) if "S" in row)
    down, right = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}[move]
    return rows[r + down][c + right] != "#"


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, level=st.integers(1, 5))
def test_knights_and_knaves_leave_one_possibility(seed: int, level: int) -> None:
    puzzle = make_knights(seed, level)
    names = puzzle.data["names"]
    right = []
    for roles in product(("knight", "knave"), repeat=len(names)):
        answer = ", ".join(f"{name} is a {role}" for name, role in zip(names, roles, strict=True))
        if outcome(KNIGHTS_AND_KNAVES, puzzle, answer) == "correct":
            right.append(answer.replace(" is a ", "="))
    assert right == [puzzle.answer]
    both = puzzle.answer + f"; {names[0]}=knight; {names[0]}=knave"
    assert KNIGHTS_AND_KNAVES.check(puzzle.data, both) == ("wrong", f"{names[0]} is called both")
    assert KNIGHTS_AND_KNAVES.check(puzzle.data, "nobody") == ("wrong", f"nothing is said about {names[0]}")


def test_the_classic_of_knights_and_knaves() -> None:
    """Smullyan: A says "at least one of us is a knave": A is a knight and B a knave."""
    data: dict[str, Any] = {
        "names": ["A", "B"],
        "statements": [["or", ["is", 0, False], ["is", 1, False]], ["is", 0, False]],
    }
    assert KNIGHTS_AND_KNAVES.check(data, "A=knight, B=knave") == ("correct", "")
    assert KNIGHTS_AND_KNAVES.check(data, "A=knave, B=knave") == ("wrong", "what A says does not fit")


def test_transformations_do_what_they_are_called() -> None:
    grid = ((0, 1), (2, 0), (0, 0))
    expected = {
        "flip left-right": ((1, 0), (0, 2), (0, 0)),
        "flip top-bottom": ((0, 0), (2, 0), (0, 1)),
        "rotate right": ((0, 2, 0), (0, 0, 1)),
        "rotate left": ((1, 0, 0), (0, 2, 0)),
        "rotate twice": ((0, 0), (0, 2), (1, 0)),
        "transpose": ((0, 2, 0), (1, 0, 0)),
        "fall": ((0, 0), (0, 0), (2, 1)),
        "crop": ((0, 1), (2, 0)),
        "mirror below": ((0, 1), (2, 0), (0, 0), (0, 0), (2, 0), (0, 1)),
        "swap 1 and 2": ((0, 2), (1, 0), (0, 0)),
        "frame": ((5, 5, 5, 5), (5, 0, 1, 5), (5, 2, 0, 5), (5, 0, 0, 5), (5, 5, 5, 5)),
    }
    for name, wanted in expected.items():
        assert TRANSFORMATIONS[name](grid) == wanted, name
    turn = TRANSFORMATIONS["rotate right"]
    assert turn(turn(turn(turn(grid)))) == grid


def test_a_grid_says_how_many_cells_are_wrong() -> None:
    puzzle = make_grids(1, 3)
    rows = puzzle.answer.split("\n")
    for layout in (";".join(rows), " / ".join(" ".join(row) for row in rows), "\\\\".join(rows)):
        assert GRIDS.check(puzzle.data, layout) == ("correct", "")
    changed = [str((int(rows[0][0]) + 1) % 10) + rows[0][1:], *rows[1:]]
    cells = sum(map(len, rows))
    assert GRIDS.check(puzzle.data, "\n".join(changed)) == ("wrong", f"1 of {cells} cells are wrong")
    assert "another size" in GRIDS.check(puzzle.data, "12")[1]
    assert GRIDS.check(puzzle.data, "ab") == ("wrong", "something else than digits in the grid")


def test_no_question_is_in_two_parts_and_examples_repeat() -> None:
    task = GeneratedTask(COUNTDOWN, levels=(2, 3), samples=8, seed=5)
    parts = {split: task.examples(split) for split in ("train", "validation", "test")}
    for split, examples in parts.items():
        assert {generated_split(example.question) for example in examples} == {split}
        assert [example.source for example in examples] == ["countdown/2"] * 8 + ["countdown/3"] * 8
        assert len({example.id for example in examples}) == 16
        assert examples == task.examples(split)
    stuck = PuzzleKind("stuck", lambda seed, level: Puzzle("always the same", ""), COUNTDOWN.check)
    with pytest.raises(DataError, match="stuck makes no"):
        for split in parts:
            generate(stuck, 0, 1, split)


@pytest.mark.parametrize(
    ("text", "finished", "outcome", "reason"),
    [
        ("<think>\n3*8\n</think>\n\\boxed{3*8}", True, "correct", ""),
        ("3*8", True, "correct", ""),
        ("I make it with \\boxed{3+8}", True, "wrong", "makes 11, not 24"),
        ("\\boxed{3*8}", False, "correct", ""),
        ("3*8", False, "length", "cut off before an answer"),
        ("<think>3*8", False, "length", "the chain of thought never ends"),
        ("<think>3*8</think>\n", True, "no_answer", "there is no answer"),
        ("\\boxed{}", True, "no_answer", "the box is empty"),
        ("1+" * 3000, True, "wrong", "the answer has 6000 characters; at most 1000 are read"),
    ],
)
def test_a_verdict_says_why(text: str, finished: bool, outcome: str, reason: str) -> None:
    example = Example("i", "countdown/1", "test", "q", "3*8", {"data": {"numbers": [3, 8], "target": 24, "all": False}})
    verdict = GeneratedTask(COUNTDOWN).grade(example, text, finished=finished)
    assert (verdict.outcome, verdict.reason) == (outcome, reason)
    assert verdict.reward == (outcome == "correct")


@pytest.mark.parametrize("name", sorted(KINDS))
def test_hostile_text_costs_no_time(name: str) -> None:
    kind, _ = KINDS[name]
    puzzle = kind.make(0, 1)
    example = Example("i", name, "test", "q", "a", {"data": puzzle.data})
    began = time.process_time()
    for unit in ("(", "1", "-", " ", "((1+", "\n", "٣", "knight", "=", "{", "\\boxed{", "9" * 900 + "*", "\ud800"):
        for size in (999, 100_000):
            verdict = GeneratedTask(kind).grade(example, (unit * size)[:size])
            assert verdict.outcome != "correct" and verdict.reason
    assert time.process_time() - began < 3


Make = Callable[[int, int], Puzzle]


@pytest.mark.parametrize("make", [make_countdown, make_game_24])
def test_numbers_in_the_question_are_the_numbers_that_count(make: Make) -> None:
    for seed in range(20):
        puzzle = make(seed, 3)
        assert f"from {' '.join(map(str, puzzle.data['numbers']))}." in puzzle.question
        assert f"Make {puzzle.data['target']} " in puzzle.question
        assert puzzle.reasoning.endswith(f"={puzzle.data['target']}")
