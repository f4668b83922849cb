"""`tafkir.solve` and `tafkir solve`: right answers are shown, wrong ones never, and bad puzzles are named."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from typer.testing import CliRunner

import tafkir
from tafkir.checkpoint.trm import load_trm, save_trm
from tafkir.cli.main import app
from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.maze import make_maze
from tafkir.data.puzzles.sudoku import Box, sudoku_format
from tafkir.engine import puzzles
from tafkir.engine.puzzles import find_solver, fit_to_grid, solve, split_puzzles
from tafkir.errors import CheckpointError, DataError, RequestError
from tafkir.models import search
from tafkir.models.solving import Solved
from tafkir.models.trm import build_trm
from tafkir.recipe.trm import TrmModelConfig

FORMAT = sudoku_format(Box(2, 2))
GRID = ("1234", "3412", "2143", "4321")
QUESTION = "1..43.1...43...."


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model that has learned nothing."""
    network = TrmModelConfig(
        mixer="mlp", hidden_size=8, intermediate_multiple=8, prefix_length=0, num_recursions=1, num_latent_steps=1
    )
    model = build_trm(network.for_puzzles(FORMAT.vocab_size, FORMAT.num_cells), 0)
    save_trm(tmp_path / "fresh", model, FORMAT)
    return tmp_path / "fresh"


def thinking(
    monkeypatch: pytest.MonkeyPatch, answers: list[str], q: list[float], format: PuzzleFormat = FORMAT
) -> None:
    """Let the model answer this, step by step."""

    def fake(model: object, inputs: Cells, *, steps: int | None = None, **how: object) -> Solved:
        count = steps or len(answers)
        tokens = np.stack([format.encode(answer) for answer in answers[:count]])[:, None]
        return Solved(tokens, np.array(q[:count], dtype=np.float32)[:, None])

    monkeypatch.setattr(search, "solve_puzzles", fake)


RIGHT = "".join(GRID)
WRONG = "1" * 16


def test_the_first_answer_that_keeps_the_rules_counts(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thinking(monkeypatch, [WRONG, RIGHT, WRONG], [5.0, -1.0, 5.0])
    answer = solve(QUESTION, checkpoint)
    assert answer.verdict == "solved" and answer.grid == GRID and answer.steps == 2
    assert answer.q == pytest.approx(1 / (1 + np.e)) and str(answer) == "\n".join(GRID)
    assert str(tafkir.solve(QUESTION, checkpoint)) == "\n".join(GRID)


def test_a_wrong_answer_is_not_shown(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thinking(monkeypatch, [WRONG, WRONG], [9.0, 9.0])
    answer = solve(QUESTION, checkpoint)
    assert answer.verdict == "unsolved" and answer.grid is None and str(answer) == "unsolved"
    thinking(monkeypatch, [WRONG, RIGHT], [9.0, 9.0])
    assert solve(QUESTION, checkpoint, max_steps=1).verdict == "unsolved"
    changed = "2143" + RIGHT[4:8] + "1234" + RIGHT[12:]
    thinking(monkeypatch, [changed], [9.0])
    assert solve(QUESTION, checkpoint).verdict == "unsolved", "what was given must stay"


def test_an_untrained_model_leaves_puzzles_unsolved(checkpoint: Path) -> None:
    answer = solve(QUESTION, checkpoint, max_steps=20)
    assert answer.verdict == "unsolved" and answer.steps == 20 and 0 < answer.q < 0.01


def test_without_rules_the_halting_head_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    format = PuzzleFormat(kind="grids", rows=1, columns=2, symbols=("", "a", "b"))
    network = TrmModelConfig(hidden_size=8, num_attention_heads=2, intermediate_multiple=8, prefix_length=0)
    save_trm(tmp_path / "own", build_trm(network.for_puzzles(3, 2), 0), format)
    thinking(monkeypatch, ["aa", "ab", "bb"], [-1.0, 2.0, 3.0], format)
    answer = solve("ba", tmp_path / "own")
    assert answer.verdict == "unchecked" and answer.grid == ("ab",) and answer.steps == 2


@pytest.mark.parametrize(
    ("puzzle", "message"),
    [
        ("1" * 81, r"the grid has 81 cells; expected 4 x 4 = 16"),
        ("1..9" + "." * 12, r"unknown symbol '9' in row 1, column 4"),
        ("." * 16, r"several solutions"),
        ("11" + "." * 14, r"which see each other"),
        ("123....4" + "." * 8, r"no solution"),
    ],
)
def test_puzzles_that_are_none(checkpoint: Path, puzzle: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        solve(puzzle, checkpoint)


def test_who_solves(checkpoint: Path, tmp_path: Path) -> None:
    bundled = {"small": checkpoint}
    assert find_solver(None, QUESTION, lambda: bundled) == checkpoint
    assert find_solver("small", QUESTION, lambda: bundled) == checkpoint
    with pytest.raises(CheckpointError, match=r"no bundled model solves grids of 81 cells"):
        find_solver(None, "." * 81, lambda: bundled)
    with pytest.raises(CheckpointError, match="no such checkpoint or run directory"):
        find_solver("none", QUESTION, lambda: bundled)
    run = tmp_path / "run" / "stages" / "13-trm"
    run.mkdir(parents=True)
    checkpoint.rename(run / "checkpoint")
    assert find_solver(tmp_path / "run", QUESTION) == run / "checkpoint"
    with pytest.raises(RequestError, match="max_steps is 0"):
        solve(QUESTION, load_trm(run / "checkpoint"), max_steps=0)


def test_several_puzzles_in_a_file() -> None:
    rows = "1..4\n3.1.\n..43\n...."
    assert split_puzzles(f"{rows}\n\n\n{rows}\n", 16) == [rows, rows]
    assert split_puzzles(f"{QUESTION}\n{QUESTION}\n", 16) == [QUESTION, QUESTION]
    assert split_puzzles(rows, 16) == [rows]


def test_the_command(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thinking(monkeypatch, [RIGHT], [3.0])
    runner, file = CliRunner(), tmp_path / "two.txt"
    file.write_text(f"{QUESTION}\n{QUESTION}\n", encoding="utf-8")
    done = runner.invoke(app, ["solve", str(file), "--model", str(checkpoint)])
    assert done.exit_code == 0 and done.stdout == "\n".join((*GRID, "", *GRID, ""))
    as_json = runner.invoke(app, ["solve", QUESTION, "--model", str(checkpoint), "--json"])
    row = json.loads(as_json.stdout)
    assert row["verdict"] == "solved" and row["grid"] == list(GRID)
    piped = runner.invoke(app, ["solve", "-", "--model", str(checkpoint)], input=QUESTION)
    assert piped.exit_code == 0 and piped.stdout.startswith("1234\n")
    thinking(monkeypatch, [WRONG], [3.0])
    wrong = runner.invoke(app, ["solve", QUESTION, "--model", str(checkpoint)])
    assert wrong.exit_code == 1 and wrong.stdout == "unsolved\n"
    missing = runner.invoke(app, ["solve", "none.txt", "--model", str(checkpoint)])
    assert isinstance(missing.exception, DataError) and "no such file" in str(missing.exception)


def test_several_runs(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules pick the run that is right, whatever the others are sure of; without rules q or the vote does."""
    tokens = np.stack([FORMAT.encode(answer) for answer in (WRONG, RIGHT, WRONG)])[None]
    asked: list[dict[str, object]] = []

    def fake(model: object, inputs: Cells, **how: object) -> Solved:
        asked.append(how)
        return Solved(tokens, np.array([[5.0, -1.0, 4.0]], dtype=np.float32))

    monkeypatch.setattr(search, "solve_puzzles", fake)
    answer = tafkir.solve(QUESTION, checkpoint, runs=3, noise=0.3, max_steps=7)
    assert answer.grid == GRID and (answer.run, answer.runs) == (2, 3)
    assert np.allclose(asked[0]["noise"], [0, 0.3, 0.3]) and asked[0]["steps"] == 7  # type: ignore[arg-type]
    monkeypatch.setattr(puzzles, "has_rules", lambda format: False)
    unchecked = solve(QUESTION, checkpoint, search=search.Search(runs=3, noise=0.3))
    assert unchecked.verdict == "unchecked" and unchecked.run == 1
    tokens[0, 2] = tokens[0, 1]
    voted = solve(QUESTION, checkpoint, search=search.Search(runs=3, noise=0.3, pick="vote"), halt_threshold=None)
    assert voted.grid == GRID and voted.run == 3
    monkeypatch.undo()
    done = CliRunner().invoke(
        app, ["solve", QUESTION, "--model", str(checkpoint), "--runs", "4", "--permute", "--steps", "2", "--json"]
    )
    assert done.exit_code == 1 and json.loads(done.stdout)["runs"] == 4


def test_the_bundled_solver_takes_mazes_of_any_size() -> None:
    for rows, columns in ((9, 9), (9, 17), (17, 17)):
        question, answer = make_maze(Random(rows + columns), rows, columns, rows)
        text = "\n".join(question[r * columns : (r + 1) * columns] for r in range(rows))
        found = solve(text)
        assert found.verdict == "solved" and "".join(found.grid or ()) == answer


def test_a_network_for_one_size_says_so(checkpoint: Path) -> None:
    solver = load_trm(checkpoint)
    assert fit_to_grid(solver, "#####\n#S G#\n#####") is solver
    with pytest.raises(DataError, match="made for grids of one size"):
        solver.model.resized(9, 9)
