"""ARC tasks answered by votes of their forms, learned at test time where they are new, and handed in as a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tafkir.checkpoint.trm import TrmCheckpoint, load_trm, save_trm
from tafkir.cli.main import app
from tafkir.data.puzzles.arc import ArcTask, read_tasks
from tafkir.data.puzzles.arc_sets import build_arc
from tafkir.data.puzzles.canvas import arc_format, crop, place
from tafkir.data.puzzles.format import Cells
from tafkir.data.puzzles.sudoku import Box, sudoku_format
from tafkir.data.puzzles.votes import build_submission
from tafkir.engine.arc import answer_tasks, split_known
from tafkir.errors import CheckpointError, DataError, RequestError
from tafkir.models import arc_votes
from tafkir.models.search import Search
from tafkir.models.solving import Solved
from tafkir.models.trm import build_trm
from tafkir.ops.stable_max import IGNORE_INDEX
from tafkir.recipe.puzzles import ArcPuzzles
from tafkir.recipe.trm import TrmConfig, TrmModelConfig
from tafkir.train.arc_adaptation import learn_tasks
from tafkir.train.arc_scores import score_arc
from tafkir.train.deep_supervision import token_losses
from tests.data.test_arc import swap

NETWORK = TrmModelConfig(
    hidden_size=16,
    num_attention_heads=2,
    intermediate_multiple=8,
    prefix_length=1,
    puzzle_embedding_size=16,
    num_recursions=1,
    num_latent_steps=1,
    max_supervision_steps=2,
)


@pytest.fixture
def tasks_file(tmp_path: Path) -> str:
    (tmp_path / "tasks.json").write_text(json.dumps({f"t{seed}": swap(seed, tests=2) for seed in range(6)}))
    return str(tmp_path / "tasks.json")


@pytest.fixture
def solver(tasks_file: str, tmp_path: Path) -> TrmCheckpoint:
    """A model that has learned nothing, with rows for six tasks in four forms each."""
    puzzles = build_arc(ArcPuzzles(path=tasks_file, num_copies=3, num_validation=2, canvas=(4, 4)), 0)
    model = build_trm(NETWORK.for_puzzles(12, 16, puzzles.num_puzzle_ids), 0)
    assert model.puzzle_table is not None
    model.puzzle_table.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    save_trm(tmp_path / "model", model, puzzles.format, identifiers=puzzles.identifiers)
    return load_trm(tmp_path / "model")


def oracle(tasks: list[ArcTask], solver: TrmCheckpoint, monkeypatch: pytest.MonkeyPatch, wrong: int = 0) -> list[int]:
    """Let the model answer rightly in every form but the first few, which shout; returns the rows that it is asked."""
    asked: list[int] = []
    assert solver.identifiers is not None
    known, _ = split_known(solver, tasks)
    by_row = {row: (forms, form) for forms in known for row, form in zip(forms.ids, forms.forms, strict=True)}

    def fake(model: object, inputs: Cells, *, puzzle_ids: np.ndarray, **_: object) -> Solved:
        answers, q = [], []
        for cells, row in zip(inputs, puzzle_ids.tolist(), strict=True):
            asked.append(row)
            forms, form = by_row[row]
            question = form.undo(crop(cells, 4, 4))
            (pair,) = [p for p in forms.task.test if np.array_equal(p.input, question)]
            assert pair.output is not None
            right = forms.forms.index(form) >= wrong
            answers.append(place(form.apply(pair.output if right else pair.input * 0), 4, 4))
            q.append(0.0 if right else 5.0)
        return Solved(np.stack(answers)[None], np.array(q, dtype=np.float32)[None])

    monkeypatch.setattr(arc_votes, "solve_puzzles", fake)
    return asked


def test_every_form_votes_in_the_form_of_the_task(
    solver: TrmCheckpoint, tasks_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = read_tasks(tasks_file)
    asked = oracle(tasks, solver, monkeypatch, wrong=1)
    answers = answer_tasks(solver, tasks)
    assert sorted(asked) == sorted([*range(1, 25)] * 2)
    for task in tasks:
        for pair, ranking in zip(task.test, answers[task.id], strict=True):
            assert np.array_equal(ranking[0].grid, pair.output) and [c.votes for c in ranking] == [3, 1]
            assert ranking[0].q == pytest.approx(0.5) and ranking[1].q > 0.99
    asked.clear()
    answer_tasks(solver, tasks[:1], max_forms=2, search=Search(runs=3, noise=0.1))
    assert sorted(asked) == [1] * 6 + [2] * 6


def test_the_stage_scores_tasks_and_writes_attempts(
    solver: TrmCheckpoint, tasks_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    puzzles = build_arc(ArcPuzzles(path=tasks_file, num_copies=3, num_validation=2, canvas=(4, 4)), 0)
    oracle([forms.task for forms in puzzles.tasks], solver, monkeypatch, wrong=1)
    scores, submission = score_arc(solver.model, puzzles)
    assert scores["tasks"] == 4 and scores["forms"] == 4 and scores["pass_at"]["1"]["value"] == 1.0
    assert list(scores["pass_at"]) == ["1", "2"] and set(submission) == {t.task.id for t in puzzles.held_out["test"]}
    assert scores["baselines"]["rules"]["2"]["value"] == 1.0, "renamed colours are among the rules"
    assert scores["over_rules"]["value"] == 0.0 and scores["baselines"]["copy"]["1"]["value"] < 1.0
    oracle([forms.task for forms in puzzles.tasks], solver, monkeypatch, wrong=4)
    worse, _ = score_arc(solver.model, puzzles, max_forms=2)
    assert worse["pass_at"]["2"]["value"] == 0.0 and worse["over_rules"]["value"] == -1.0 and worse["forms"] == 2


def demonstration_loss(solver: TrmCheckpoint, tasks: list[ArcTask]) -> float:
    """After one supervision step on every demonstration in the task's own form."""
    losses = []
    for task in tasks:
        row = (solver.identifiers or ()).index(task.id)
        sides = [[place(grid, 4, 4) for grid in (p.input, p.output) if grid is not None] for p in task.train]
        inputs, labels = (torch.from_numpy(np.stack(side)).long() for side in zip(*sides, strict=True))
        with torch.no_grad():
            out = solver.model(solver.model.start(len(inputs)), inputs, torch.full((len(inputs),), row))
        losses.append(token_losses(TrmConfig(), out.logits, labels.where(labels > 0, IGNORE_INDEX)).mean())
    return float(sum(losses))


def test_a_task_that_is_new_is_learned_from_its_demonstrations(solver: TrmCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text(json.dumps({"new": swap(50), "newer": swap(51)}))
    tasks = read_tasks(str(tmp_path / "new.json"))
    with pytest.raises(DataError, match=r"has never seen 2 of 2 tasks, such as new, newer.* Fix: .*--train-steps"):
        answer_tasks(solver, tasks)
    told: list[int] = []
    how = {"num_copies": 2, "batch_size": 16, "puzzle_learning_rate": 0.1}
    learned = learn_tasks(solver, tasks, steps=12, **how, on_step=lambda step, _: told.append(step))  # type: ignore[arg-type]
    assert told == list(range(1, 13))
    untouched = learn_tasks(solver, tasks, steps=1, **{**how, "puzzle_learning_rate": 1e-9})  # type: ignore[arg-type]
    assert demonstration_loss(learned, tasks) < demonstration_loss(untouched, tasks) - 0.05
    before, after = solver.model.state_dict(), learned.model.state_dict()
    rows = len(solver.identifiers or ())
    assert after["puzzle_table.weight"].shape[0] == rows + 6 == len(learned.identifiers or ())
    assert torch.equal(after["puzzle_table.weight"][:rows], before["puzzle_table.weight"])
    for name in set(before) - {"puzzle_table.weight"}:
        assert torch.equal(before[name], after[name]), name
    mean = before["puzzle_table.weight"][1:].mean(0)
    assert not torch.allclose(after["puzzle_table.weight"][rows:], mean.expand(6, -1), atol=1e-3)
    assert set(answer_tasks(learned, tasks)) == {"new", "newer"}
    again = learn_tasks(solver, tasks, steps=12, **how)  # type: ignore[arg-type]
    assert torch.equal(again.model.state_dict()["puzzle_table.weight"], after["puzzle_table.weight"])
    along = learn_tasks(solver, tasks, steps=2, learning_rate=1e-3, **how).model.state_dict()  # type: ignore[arg-type]
    assert not torch.equal(along["lm_head.weight"], before["lm_head.weight"])


def test_models_that_are_not_for_arc(tasks_file: str, tmp_path: Path) -> None:
    format = sudoku_format(Box(2, 2))
    save_trm(tmp_path / "sudoku", build_trm(NETWORK.for_puzzles(6, 16), 0), format)
    sudoku = load_trm(tmp_path / "sudoku")
    with pytest.raises(CheckpointError, match=r"sudoku: the model solves puzzles of kind 'sudoku'"):
        answer_tasks(sudoku, read_tasks(tasks_file))
    with pytest.raises(CheckpointError, match="the model has no vectors for tasks"):
        learn_tasks(sudoku, read_tasks(tasks_file), steps=1)
    with pytest.raises(ValueError, match=r"set model\.puzzle_embedding_size"):
        TrmConfig(puzzles=ArcPuzzles(path="mini-arc"))


def test_a_grid_that_does_not_fit_the_canvas_of_the_model(solver: TrmCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "large.json").write_text(json.dumps({"t0": swap(0, side=5)}))
    with pytest.raises(DataError, match=r"task t0: test 1: the grid is 5 x 5; expected at most 4 x 4"):
        answer_tasks(solver, read_tasks(str(tmp_path / "large.json")))


def test_identifiers_that_do_not_fit(solver: TrmCheckpoint) -> None:
    (solver.path / "identifiers.json").write_text('["<blank>"]')
    with pytest.raises(CheckpointError, match=r"identifiers\.json: does not name the rows .* a list of 25 names"):
        load_trm(solver.path)


@pytest.fixture
def command() -> Iterator[CliRunner]:
    yield CliRunner()


def test_the_command(
    solver: TrmCheckpoint, tasks_file: str, tmp_path: Path, command: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "submission.json"
    ask = ["solve", "--arc", tasks_file, "--model", str(solver.path)]
    done = command.invoke(app, [*ask, "--submission", str(out), "--json"])
    assert done.exit_code == 0, done.output
    tasks = read_tasks(tasks_file)
    answers = answer_tasks(solver, tasks)
    assert json.loads(out.read_text()) == build_submission(answers, tasks)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["id"] for row in rows] == [task.id for task in tasks]
    assert rows[0]["test"][0][0]["grid"] == answers["t0"][0][0].grid.tolist()
    assert "6 tasks have known outputs: pass@1" in done.stderr
    shown = command.invoke(app, [*ask, "--forms", "1", "--runs", "2", "--noise", "0.1", "--halt", "0"])
    assert shown.exit_code == 0 and "t0 test 1 attempt 1:" in shown.stdout
    (tmp_path / "new.json").write_text(json.dumps({"new": swap(50), "t0": swap(0)}))
    new = command.invoke(
        app, ["solve", "--arc", str(tmp_path / "new.json"), "--model", str(solver.path), "--train-steps", "2"]
    )
    assert new.exit_code == 0 and "new test 1 attempt 1:" in new.stdout
    for wrong in (["solve"], ["solve", "1..4", *ask[1:]], ask[:3], [*ask, "--permute"]):
        assert isinstance(command.invoke(app, wrong).exception, RequestError)


def test_a_canvas_as_text() -> None:
    format = arc_format(3, 3)
    assert format.show(place(np.array([[4, 0]], dtype=np.uint8), 3, 3)) == "40#\n## \n   "
