"""What is recorded of a model's thinking, and which puzzles it fails."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tafkir.checkpoint.trm import TrmCheckpoint, load_trm, save_trm
from tafkir.cli.main import app
from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.maze import maze_format
from tafkir.data.puzzles.parts import PuzzleSet
from tafkir.data.puzzles.sudoku import Box, sudoku_format
from tafkir.engine import difficulty
from tafkir.engine.difficulty import measure_by_difficulty, puzzle_difficulty
from tafkir.engine.trace import confidence, trace_puzzle
from tafkir.errors import RequestError
from tafkir.models.solving import Solved
from tafkir.models.trm import Trm, TrmOutput, build_trm
from tafkir.recipe.trm import TrmModelConfig
from tafkir.runlog.rundir import RunDir

FORMAT = sudoku_format(Box(2, 2))
QUESTION = "1..43.1...43...."
RIGHT = "1234341221434321"


@pytest.fixture
def solver(tmp_path: Path) -> TrmCheckpoint:
    """A solver that has learned nothing."""
    network = TrmModelConfig(
        mixer="mlp", hidden_size=8, intermediate_multiple=8, prefix_length=0, num_recursions=1, num_latent_steps=1
    )
    save_trm(tmp_path / "fresh", build_trm(network.for_puzzles(FORMAT.vocab_size, FORMAT.num_cells), 0), FORMAT)
    return load_trm(tmp_path / "fresh")


def saying(monkeypatch: pytest.MonkeyPatch, answers: list[str], q: list[float]) -> None:
    """Let models say this, step by step, with a logit of 3 for what they say and 0 for the rest."""

    def steps(self: Trm, inputs: torch.Tensor, puzzle_ids: None = None, count: int | None = None) -> list[TrmOutput]:
        state = self.start(1)
        return [
            TrmOutput(state, 3.0 * torch.eye(6)[torch.from_numpy(FORMAT.encode(answer)).long()][None], said, said)
            for answer, said in zip(answers[:count], torch.tensor(q)[:, None], strict=False)
        ]

    monkeypatch.setattr(Trm, "steps", steps)


def test_confidence_is_a_share_by_either_function() -> None:
    logits = torch.tensor([[3.0, 0.0, -1.0], [1.0, 1.0, 1.0]])
    # s(3) = 4, s(0) = 1, s(-1) = 1/2.
    assert confidence(logits, "stable_max") == pytest.approx([4 / 5.5, 1 / 3])
    shares = math.exp(3) / (math.exp(3) + 1 + math.exp(-1))
    assert confidence(logits, "softmax") == pytest.approx([shares, 1 / 3])


def test_every_step_is_kept(solver: TrmCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    near = RIGHT[:-1] + "2"
    saying(monkeypatch, [near, RIGHT, RIGHT, near], [-2.0, -1.0, 4.0, 5.0])
    trace = trace_puzzle(solver, FORMAT.encode(QUESTION))
    assert (trace.taken, trace.halted, trace.verdict) == (2, 3, "solved")
    assert [thought.right for thought in trace.thoughts] == [False, True, True, False]
    assert trace.thoughts[0].changed == (1, 2, 5, 7, 8, 9, 12, 13, 14, 15) and trace.thoughts[1].changed == (15,)
    assert [thought.q for thought in trace.thoughts] == pytest.approx([1 / (1 + math.exp(-q)) for q in (-2, -1, 4, 5)])
    assert len(trace.shown()) == 3, "up to the answer and to halting"
    as_dict = json.loads(json.dumps(trace.to_dict()))
    assert as_dict["steps"][1]["answer"] == ["1234", "3412", "2143", "4321"]
    assert as_dict["question"] == ["1..4", "3.1.", "..43", "...."]


def test_no_right_answer_is_unsolved(solver: TrmCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    saying(monkeypatch, ["1" * 16] * 3, [4.0, 4.0, 4.0])
    trace = trace_puzzle(solver, FORMAT.encode(QUESTION), max_steps=2)
    assert (trace.verdict, trace.taken, trace.halted, len(trace.shown())) == ("unsolved", None, 1, 2)


def test_watching_in_the_terminal(solver: TrmCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    saying(monkeypatch, [RIGHT[:-1] + "2", RIGHT], [-2.0, 4.0])
    runner, model = CliRunner(), ["--model", str(solver.path)]
    shown = runner.invoke(app, ["trm", "watch", QUESTION, *model], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    lines = shown.stdout.split("\n")
    assert lines[0].split() == ["puzzle", "step", "1", "step", "2"]
    assert lines[1].split()[1::2] == ["12%", "98%"]
    assert lines[5].split() == [*"····", *"4322", *"4321"]
    assert "solved at step 2; it takes itself for right at step 2" in shown.stdout
    assert json.loads(runner.invoke(app, ["trm", "watch", QUESTION, *model, "--json"]).stdout)["taken"] == 2
    both = runner.invoke(app, ["trm", "watch", f"{QUESTION}\n\n{QUESTION}", *model])
    assert isinstance(both.exception, RequestError) and "2 puzzles; expected one to watch" in str(both.exception)
    saying(monkeypatch, ["1" * 16], [4.0])
    wrong = runner.invoke(app, ["trm", "watch", QUESTION, *model])
    assert wrong.exit_code == 1 and "unsolved: no answer keeps the rules" in wrong.stdout


def test_what_makes_a_puzzle_hard() -> None:
    sudoku = np.stack([FORMAT.encode(QUESTION), FORMAT.encode("1234" + "." * 12)])
    assert (puzzle_difficulty(FORMAT, sudoku, sudoku)[1]).tolist() == [6, 4]
    maze = maze_format(3, 5)
    labels = maze.encode("#####SooG######")[None]
    assert puzzle_difficulty(maze, labels, labels) == ("moves from S to G", np.array([3]))
    own = PuzzleFormat(kind="grids", rows=1, columns=3, symbols=("", "a", "b"))
    changed = puzzle_difficulty(own, np.array([[1, 1, 1]]), np.array([[2, 1, 0]]))
    assert changed == ("cells to change", np.array([1]))


def test_accuracy_by_givens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three puzzles with 6 givens, of which two are solved at steps 2 and 1; one with 10 that is never solved."""
    right, wrong = FORMAT.encode(RIGHT), FORMAT.encode("1" * 16)
    easy = FORMAT.encode("123434122.......")
    inputs = np.stack([FORMAT.encode(QUESTION)] * 3 + [easy])
    said: Cells = np.stack([[wrong, right, right, wrong], [right, right, wrong, wrong]])
    monkeypatch.setattr(difficulty, "solve_puzzles", lambda *_, **__: Solved(said, np.zeros((2, 4), dtype=np.float32)))
    model = build_trm(TrmModelConfig(hidden_size=8, num_attention_heads=2).for_puzzles(6, 16), 0)
    table = measure_by_difficulty(model, FORMAT, PuzzleSet(inputs, np.stack([right] * 4)))
    assert table.measure == "givens"
    assert [(row.low, row.high, row.exact.value, row.steps) for row in table.rows] == [
        (9, 9, 0.0, None),
        (6, 6, pytest.approx(2 / 3), 1.5),
    ]
    assert table.total.exact.value == 0.5 and table.total.exact.num_problems == 4
    assert table.rows[0].cells == pytest.approx(0.25), "a quarter of the cells is 1"


def test_the_errors_of_a_run(tmp_path: Path, solver: TrmCheckpoint) -> None:
    run = RunDir.create(tmp_path / "run")
    recipe = 'name = "x"\n[trm]\n[trm.puzzles]\nnum_train = 8\nnum_validation = 2\nnum_test = 20\n'
    run.recipe_path.write_text(recipe, encoding="utf-8")
    stage = run.stage("trm")
    stage.make()
    solver.path.rename(stage.checkpoint_dir)
    runner = CliRunner()
    table = json.loads(runner.invoke(app, ["trm", "errors", str(run.path), "--steps", "2", "--json"]).stdout)
    assert table["total"]["exact"]["num_problems"] == 20 and table["total"]["exact"]["value"] == 0.0
    assert sum(row["exact"]["num_problems"] for row in table["rows"]) == 20
    assert [row["low"] for row in table["rows"]] == sorted((row["low"] for row in table["rows"]), reverse=True)
    shown = runner.invoke(app, ["trm", "errors", str(run.path), "--steps", "2"], env={"COLUMNS": "100"}).stdout
    assert shown.split("\n")[0].split()[:2] == ["givens", "puzzles"] and "all" in shown
    run.recipe_path.write_text('name = "x"\nbase = "base-tiny"\n[sft]\n', encoding="utf-8")
    other = runner.invoke(app, ["trm", "errors", str(run.path)])
    assert isinstance(other.exception, RequestError) and "no stage trm" in str(other.exception)
