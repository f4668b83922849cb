"""Teachers of a recursive model: which answers count, what imitating is, and that a taught stage resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from tafkir.checkpoint.trm import load_trm, save_trm
from tafkir.data.puzzles.sets import build_puzzles
from tafkir.errors import CheckpointError, DataError, RecipeError
from tafkir.models.solving import solve_puzzles
from tafkir.models.trm import build_trm
from tafkir.ops.stable_max import stable_max_log_probs, stable_max_loss, stable_max_loss_reference
from tafkir.recipe.puzzles import GridPuzzles, SudokuPuzzles
from tafkir.recipe.teacher import CheckpointTeacher
from tafkir.recipe.trm import TrmConfig, TrmModelConfig
from tafkir.tasks.puzzle_sets import PuzzleSetTask
from tafkir.train import trm_stage
from tafkir.train.teacher import SoftTeacher, load_teacher, teach
from tests.train.test_deep_supervision import Killed, content, run_stage, weights_of

PUZZLES = SudokuPuzzles(num_train=12, num_validation=4, num_test=6)
SETS = build_puzzles(PUZZLES, trm_stage.derive_seed(0, "trm", "puzzles"))
TASK = PuzzleSetTask("few", SETS)
MODEL = TrmModelConfig(
    hidden_size=16, num_attention_heads=2, intermediate_multiple=8, prefix_length=0, num_recursions=1,
    num_latent_steps=1, max_supervision_steps=2, mixer="mlp", position_encoding="none",
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "checkpoint"
    save_trm(path, build_trm(MODEL.for_puzzles(6, 16), 5), SETS.format)
    return path


def config(**given: Any) -> TrmConfig:
    return TrmConfig.model_validate({"puzzles": PUZZLES.model_dump(), **given})


# ---- soft targets ------------------------------------------------------------------------------------------------


def test_log_probabilities_of_the_stable_max_are_those_of_its_loss() -> None:
    logits = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)).mul(3).requires_grad_()
    labels = torch.arange(12).view(3, 4) % 6
    found = stable_max_log_probs(logits)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3, 4))
    picked = -found.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(picked.double(), stable_max_loss_reference(logits, labels), rtol=1e-5, atol=1e-6)
    (ours,) = torch.autograd.grad(picked.sum(), logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(stable_max_loss(logits, labels).sum(), logits)
    torch.testing.assert_close(ours, theirs)


def test_the_distance_is_the_divergence_at_a_temperature(teacher: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    student, target = (torch.randn(2, 5, 6, generator=generator) for _ in range(2))
    inputs = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 0, 0, 0]])
    soft = SoftTeacher(load_trm(teacher), config(loss="softmax"), 0.5, temperature=3.0)
    by_cell = F.kl_div((student / 3).log_softmax(-1), (target / 3).softmax(-1), reduction="none").sum(-1) * 9
    torch.testing.assert_close(
        soft.distance(student, target, inputs), torch.stack([by_cell[0].mean(), by_cell[1, :2].mean()])
    )
    stable = SoftTeacher(load_trm(teacher), config(), 0.5, temperature=1.0)
    assert stable.distance(student, student, inputs).abs().max() < 1e-6
    assert (stable.distance(student, target, inputs) > 0).all()


def test_a_teacher_says_what_it_says_after_all_its_steps(teacher: Path) -> None:
    solver = load_trm(teacher)
    said = SoftTeacher(solver, config(), 0.5, 1.0).logits(torch.from_numpy(SETS.train.inputs))
    assert (said.argmax(-1).numpy() == solve_puzzles(solver.model, SETS.train.inputs).answers[-1]).all()


# ---- answers -----------------------------------------------------------------------------------------------------


def write_answers(path: Path) -> Path:
    """Puzzles 3 to 6 of training answered: 3 right twice and wrong once, 4 wrong, 5 unreadably; and three others."""
    examples, labels = TASK.examples("train"), SETS.train.labels
    rows = [(examples[place], TASK.write(labels[place])) for place in (3, 3, 0)]
    rows += [(examples[3], TASK.write(labels[5])), (examples[4], TASK.write(labels[5])), (examples[5], "\\boxed{12}")]
    rows += [(TASK.examples("test")[0], TASK.write(SETS.test.labels[0]))]
    lines = [json.dumps({"question": example.question, "text": text}) for example, text in rows]
    bare = {"question": SETS.format.show(SETS.train.inputs[6]), "text": SETS.format.show(SETS.train.labels[6])}
    path.write_text("\n".join([*lines, json.dumps(bare), ""]))
    return path


@pytest.mark.parametrize(("keep", "places"), [("right", [3, 6]), ("all", [3, 4, 6])])
def test_answers_of_any_model_teach(keep: str, places: list[int], tmp_path: Path) -> None:
    """The most frequent answer counts; known puzzles keep theirs, held-out ones never come in."""
    path = write_answers(tmp_path / "answers.jsonl")
    taught = teach(config(num_labelled=2, teacher={"kind": "answers", "path": str(path), "keep": keep}), SETS, None)
    train = taught.puzzles.train
    assert (train.inputs == SETS.train.inputs[[0, 1, *places]]).all()
    wanted = SETS.train.labels[[0, 1, *[5 if place == 4 else place for place in places]]]
    assert (train.labels == wanted).all()
    assert taught.counts == {
        "labelled": 2, "held_out": 1, "foreign": 1, "unreadable": 1, "unlabelled": 10, "answered": 3,
        "kept": len(places),
    }  # fmt: skip
    assert taught.puzzles.test is SETS.test


def test_a_checkpoint_answers_what_is_unknown(teacher: Path) -> None:
    solver = load_trm(teacher)
    table = {"kind": "checkpoint", "checkpoint": str(teacher), "keep": "all"}
    taught = teach(config(num_labelled=5, teacher=table), SETS, solver)
    said = solve_puzzles(solver.model, SETS.train.inputs[5:]).answers[-1]
    assert (taught.puzzles.train.labels == np.concatenate([SETS.train.labels[:5], said])).all()
    right = teach(config(num_labelled=5, teacher={**table, "keep": "right"}), SETS, solver)
    assert right.counts == {"labelled": 5, "unlabelled": 7, "answered": 7, "kept": 0}, "fresh weights know nothing"
    assert len(teach(config(num_labelled=3), SETS, None).puzzles.train) == 3


def test_bad_teachers(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    answers = config(num_labelled=2, teacher={"kind": "answers", "path": str(path)})
    with pytest.raises(DataError, match=r"answers.jsonl.*cannot be read"):
        teach(answers, SETS, None)
    for line, message in (("{", "is not JSON"), ("[]", "is no answer"), ('{"question": "12", "text": ""}', "2 cells")):
        path.write_text(f"\n{line}\n")
        with pytest.raises(DataError, match=rf"answers.jsonl:2.*{message}"):
            teach(answers, SETS, None)
    path.write_text("")
    with pytest.raises(DataError, match="no training puzzle has an answer"):
        teach(answers.model_copy(update={"num_labelled": 0}), SETS, None)
    table = CheckpointTeacher(checkpoint=str(teacher))
    with pytest.raises(CheckpointError, match=r"solves sudoku, 4 x 4.*sudoku, 6 x 6"):
        load_teacher(table, SETS.format.model_copy(update={"rows": 6, "columns": 6}))
    grids = replace(SETS, format=SETS.format.model_copy(update={"kind": "grids"}))
    with pytest.raises(RecipeError, match=r"trm.teacher.keep.*no rules of grids"):
        teach(config(teacher=table.model_dump()), grids, None)
    with pytest.raises(ValidationError, match="needs num_labelled"):
        config(teacher={"kind": "answers", "path": "x"})
    assert isinstance(config(puzzles=GridPuzzles(path="x").model_dump(), num_labelled=3), TrmConfig)
    with pytest.raises(ValidationError, match="not for puzzles of kind official"):
        config(puzzles={"kind": "official", "path": "x"}, num_labelled=3)


# ---- the stage ---------------------------------------------------------------------------------------------------


def test_a_taught_stage_goes_on_bit_for_bit(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the teacher said of the puzzles in work comes back with them, and another teacher is another stage."""
    taught = (
        "trm.num_labelled=4", f"trm.teacher.checkpoint={json.dumps(str(teacher))}", "trm.teacher.kind=checkpoint",
        "trm.teacher.keep=all", "trm.teacher.weight=0.3", "trm.teacher.temperature=1.5", "trm.model.prefix_length=0",
        "trm.model.puzzle_embedding_size=0",
    )  # fmt: skip
    result, stage = run_stage(tmp_path / "unbroken", *taught)
    assert result["teacher"] == {"labelled": 4, "unlabelled": 8, "answered": 8, "kept": 8}
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        whole = 0.7 * row["train/token_loss"] + 0.3 * row["train/teacher_loss"] + 0.5 * row["train/q_loss"]
        assert row["train/loss"] == pytest.approx(whole, rel=1e-5)
    real = trm_stage.deep_supervision_step

    def dying(*args: Any, **how: Any) -> Any:
        step = real(*args, **how)

        def train(number: int) -> Any:
            if number == 3:
                raise Killed
            return step(number)

        return train

    monkeypatch.setattr(trm_stage, "deep_supervision_step", dying)
    with pytest.raises(Killed):
        run_stage(tmp_path / "killed", *taught)
    monkeypatch.setattr(trm_stage, "deep_supervision_step", real)
    again, other = run_stage(tmp_path / "killed", *taught)
    assert again == result and weights_of(content(other)) == weights_of(content(stage))
    save_trm(teacher, build_trm(MODEL.for_puzzles(6, 16), 6), SETS.format)
    changed, _ = run_stage(tmp_path / "killed", *taught)
    assert changed["fingerprint"] != result["fingerprint"]
