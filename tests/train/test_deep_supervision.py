"""Deep supervision: the official code's steps, carries that resume bit for bit, and its options one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from tafkir.checkpoint.trm import load_trm
from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.data.puzzles.sets import PuzzleStream, Samples, build_puzzles
from tafkir.errors import RecipeError
from tafkir.models.solving import solve_puzzles
from tafkir.models.trm import Trm, build_trm
from tafkir.models.trm_names import official_names
from tafkir.plan.estimate import estimate_stages
from tafkir.recipe.fingerprint import fingerprint_stages
from tafkir.recipe.load import load_recipe
from tafkir.recipe.puzzles import SudokuPuzzles
from tafkir.recipe.resolve import resolve_recipe
from tafkir.recipe.tables import EmaConfig
from tafkir.recipe.trm import TrmConfig, TrmModelConfig
from tafkir.runlog.rundir import RunDir
from tafkir.train import trm_stage
from tafkir.train.deep_supervision import RecursiveTrainer, deep_supervision_step, token_losses
from tafkir.train.loop import StepOutput
from tafkir.train.puzzle_scores import score_puzzles
from tests.models.test_trm_official import RECORDED, shape_of
from tests.models.trm_official import BATCH, CELLS, NUM_TRAIN_STEPS, PUZZLE_DECAY, PUZZLE_LR, batches, fill, sample

TINY_MODEL = TrmModelConfig(
    mixer="mlp",
    hidden_size=16,
    num_attention_heads=2,
    intermediate_multiple=8,
    prefix_length=0,
    num_recursions=2,
    num_latent_steps=2,
    max_supervision_steps=4,
)
TINY = TrmConfig(batch_size=6, steps=8, warmup_steps=0, learning_rate=1e-2, model=TINY_MODEL)
PUZZLES = build_puzzles(SudokuPuzzles(num_train=24, num_validation=4, num_test=6), 0)


# ---- against the official code -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [name for name in RECORDED if name != "hrm"])
def test_three_steps_of_the_official_code(variant: str) -> None:
    """Losses, carries, halting and puzzle vectors; the network's weights stay as they are."""
    model = Trm(shape_of(variant))
    names = official_names(list(model.state_dict()), model.shape)
    with torch.no_grad():
        fill({names[name]: tensor for name, tensor in model.state_dict().items() if name in names})
    config = TrmConfig(
        batch_size=BATCH,
        warmup_steps=0,
        schedule="constant",
        puzzle_learning_rate=PUZZLE_LR,
        puzzle_weight_decay=PUZZLE_DECAY,
        halt_exploration=0.0,
        select="last",
        model=TrmModelConfig.model_validate(model.shape.model_dump(include=set(TrmModelConfig.model_fields))),
    )
    trainer = RecursiveTrainer(model, config)
    trainer.optimizers = trainer.optimizers[1:]
    data = batches()

    def take(first: int, size: int) -> Samples:
        """In the official code a place always takes what the step's batch holds there."""
        batch, places = data[now], trainer.carry.halted.nonzero().squeeze(1)
        assert size == len(places)
        labels = (batch["labels"][places] + 1).clamp(min=0)
        return Samples(
            batch["inputs"][places].to(torch.uint8).numpy(),
            labels.to(torch.uint8).numpy(),
            batch["puzzle_identifiers"][places].numpy(),
        )

    step = deep_supervision_step(shifted(trainer), take, seed=0, label="test")
    for now in range(NUM_TRAIN_STEPS):
        trainer.set_step(now)
        metrics, recorded = step(now).metrics, RECORDED[variant]["train"][now]
        assert metrics["train/token_loss"] == pytest.approx(recorded["loss"], rel=1e-5)
        assert metrics["train/q_loss"] == pytest.approx(recorded["q_loss"], rel=1e-4, abs=1e-6)
        assert trainer.carry.steps.tolist() == recorded["steps"]
        assert trainer.carry.halted.tolist() == recorded["halted"]
        if model.puzzle_table is not None:
            got, want = sample(model.puzzle_table.weight), recorded["puzzle_table"]
            torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-6)


def shifted(trainer: RecursiveTrainer) -> RecursiveTrainer:
    """The official labels use token 0, which is our padding: here labels come one higher, and logits, too."""
    forward = trainer.model.forward

    def shift(*args: Any, **how: Any) -> Any:
        out = forward(*args, **how)
        return out._replace(logits=F.pad(out.logits, (1, 0), value=-1e30))

    trainer.model.forward = shift  # type: ignore[method-assign]
    return trainer


# ---- the carry ---------------------------------------------------------------------------------------------------


def start(**given: Any) -> tuple[RecursiveTrainer, Callable[[int], StepOutput]]:
    config = TrmConfig.model_validate(TINY.model_dump() | given)
    model = build_trm(config.model.for_puzzles(PUZZLES.format.vocab_size, PUZZLES.format.num_cells), 1)
    trainer = RecursiveTrainer(model, config)
    stream = PuzzleStream(PUZZLES, augment=True, seed=0)
    return trainer, deep_supervision_step(trainer, stream.take, seed=2, label="test")


def run(trainer: RecursiveTrainer, step: Callable[[int], StepOutput], count: int) -> list[StepOutput]:
    outputs = []
    for number in range(count):
        trainer.set_step(number)
        outputs.append(step(number))
    return outputs


def test_puzzles_that_halt_make_room_for_the_next_ones() -> None:
    trainer, step = start()
    carry = trainer.carry
    run(trainer, step, 1)
    assert carry.drawn == 6 and carry.steps.tolist() == [1] * 6 and not carry.halted.any()
    before = carry.inputs.clone()
    carry.halted[[1, 4]] = True
    trainer.set_step(1)
    step(1)
    assert carry.drawn == 8 and carry.steps.tolist() == [2, 1, 2, 2, 1, 2]
    assert [bool(same) for same in (carry.inputs == before).all(1)] == [True, False, True, True, False, True]
    expected = PuzzleStream(PUZZLES, augment=True, seed=0).take(6, 2)
    assert (carry.inputs[[1, 4]].numpy() == expected.inputs).all()


def test_a_fresh_puzzle_begins_with_fresh_states() -> None:
    trainer, step = start()
    run(trainer, step, 2)
    carry = trainer.carry
    assert not torch.equal(carry.y[0, 0], trainer.model.y_init)
    carry.halted[0] = True
    carry.refill(trainer.model, PuzzleStream(PUZZLES, augment=True, seed=0).take)
    assert torch.equal(carry.y[0, 3], trainer.model.y_init) and torch.equal(carry.z[0, 0], trainer.model.z_init)


@pytest.mark.parametrize(("act", "halts_at"), [(True, 1), (False, 4)])
def test_act_ends_what_is_taken_for_solved(act: bool, halts_at: int) -> None:
    trainer, step = start(act=act, halt_exploration=0.0, learning_rate=1e-9)
    bias = trainer.model.q_head.bias
    assert bias is not None
    with torch.no_grad():
        bias.fill_(3.0)
    outputs = run(trainer, step, 4)
    # Where none halts early, rows begin with 0, 1, 2, 3, 0 and 1 steps behind them, and do not stay together.
    assert [out.metrics["train/halted"] for out in outputs] == ([6] * 4 if act else [1, 1, 2, 2])
    assert outputs[-1].metrics["train/supervision_steps"] == halts_at


def test_exploration_keeps_puzzles_for_a_random_number_of_steps() -> None:
    trainer, step = start(halt_exploration=1.0, batch_size=64, learning_rate=1e-9)
    bias = trainer.model.q_head.bias
    assert bias is not None
    with torch.no_grad():
        bias.fill_(3.0)
    outputs = run(trainer, step, 3)
    # At least U{2, 3, 4} steps, drawn anew at each step: none halts after one, a third after two.
    assert outputs[0].metrics["train/halted"] == 0
    assert 10 <= int(outputs[1].metrics["train/halted"]) <= 34  # type: ignore[call-overload]


def test_nothing_halts_later_than_n_sup() -> None:
    trainer, step = start(halt_exploration=1.0)
    outputs = run(trainer, step, 8)
    assert [out.metrics["train/halted"] for out in outputs] == [0, 0, 0, 6] * 2


# ---- options -----------------------------------------------------------------------------------------------------


def first_loss(**given: Any) -> float:
    trainer, step = start(**given)
    return float(run(trainer, step, 1)[0].metrics["train/loss"])  # type: ignore[arg-type]


def test_the_loss_of_both_kinds() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, -100, 3, 4], [6, -100, -100, -100, 5]])
    soft = TrmConfig(loss="softmax", label_smoothing=0.2)
    expected = [F.cross_entropy(x, y, label_smoothing=0.2) for x, y in zip(logits, labels, strict=True)]
    torch.testing.assert_close(token_losses(soft, logits, labels), torch.stack(expected))
    numerators = torch.where(logits < 0, 1 / (1 - logits), logits + 1).double()
    shares = -(numerators / numerators.sum(-1, keepdim=True)).log()
    stable = torch.stack([(shares[0, 0, 1] + shares[0, 1, 2] + shares[0, 3, 3] + shares[0, 4, 4]) / 4])
    torch.testing.assert_close(token_losses(TrmConfig(), logits, labels)[:1].double(), stable, rtol=1e-5, atol=1e-6)
    assert first_loss(loss="softmax") != first_loss()
    assert token_losses(TrmConfig(), logits, torch.full_like(labels, -100)).tolist() == [0.0, 0.0]


def test_the_weight_of_the_halting_loss() -> None:
    q_loss = -np.log(1 / (1 + np.exp(-5.0)))  # nothing is solved, and q is -5
    assert first_loss(q_loss_weight=2.0) - first_loss(q_loss_weight=0.0) == pytest.approx(2 * q_loss, rel=1e-4)


def test_micro_batches_change_nothing_but_memory() -> None:
    whole, pieces = start(), start(micro_batches=3)
    for a, b in zip(run(*whole, 3), run(*pieces, 3), strict=True):
        assert a.metrics["train/loss"] == pytest.approx(b.metrics["train/loss"], rel=1e-4)
        assert a.metrics["train/grad_norm"] == pytest.approx(b.metrics["train/grad_norm"], rel=1e-3)


def test_recomputing_passes_changes_nothing_but_memory() -> None:
    for a, b in zip(run(*start(), 2), run(*start(recompute=True), 2), strict=True):
        assert a.metrics == b.metrics


@pytest.mark.parametrize("optimizer", ["adamw", "adam_atan2", "muon"])
def test_every_optimiser_learns(optimizer: str) -> None:
    given = {"optimizer": optimizer, "muon_learning_rate": 0.02, "act": False, "steps": 24, "weight_decay": 0.01}
    outputs = run(*start(**given), 24)
    losses = [float(out.metrics["train/token_loss"]) for out in outputs]  # type: ignore[arg-type]
    assert sum(losses[-4:]) < 0.93 * sum(losses[:4])


def test_passes_in_bfloat16_learn() -> None:
    outputs = run(*start(precision="bfloat16"), 3)
    assert all(np.isfinite(out.metrics["train/loss"]) for out in outputs)
    assert first_loss(precision="bfloat16") == pytest.approx(first_loss(), rel=0.05)


def test_the_average_leaves_buffers_alone() -> None:
    model = TINY_MODEL.model_dump() | {"prefix_length": 1, "puzzle_embedding_size": 16}
    trainer, step = start(model=model, ema={"decay": 0.5, "warmup": False}, puzzle_learning_rate=0.1)
    begin = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    run(trainer, step, 1)
    table, average = trainer.model.puzzle_table, trainer.average
    assert table is not None and average is not None and table.weight.any()
    moved = table.weight.clone()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(average.tensors[name], (begin[name] + parameter.detach()) / 2)
    with average.applied():
        assert torch.equal(table.weight, moved) and torch.equal(trainer.model.y_init, begin["y_init"])


def test_a_curriculum_of_depth() -> None:
    config = TrmConfig(steps=10, curriculum=((0.3, 1, 2), (0.5, 2, 4)), model=TINY_MODEL)
    assert [config.depth_at(step) for step in (0, 2, 3, 4, 5, 9)] == [(1, 2)] * 2 + [(2, 4)] * 2 + [(2, 2)] * 2
    trainer, step = start(curriculum=((0.5, 1, 1),))
    calls: list[int] = []
    trainer.model.network.register_forward_hook(lambda *_: calls.append(1))
    sizes = []
    for number in (0, 7):
        calls.clear()
        trainer.set_step(number)
        step(number)
        sizes.append(len(calls))
    assert sizes == [2, 6], "T (n + 1) passes"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label_smoothing": 0.1}, "needs loss"),
        ({"curriculum": ((0.5, 1, 1), (0.3, 1, 2))}, "must rise"),
        ({"micro_batches": 100}, "larger than batch_size"),
    ],
)
def test_settings_that_contradict_each_other(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrmConfig.model_validate(given)


def test_scores() -> None:
    """Halting picks each puzzle's own step; shares are of whole grids."""
    trainer, _ = start()
    solved = solve_puzzles(trainer.model, PUZZLES.test.inputs, steps=6, batch_size=4)
    assert solved.answers.shape == (6, 6, 16) and solved.q_halt.shape == (6, 6)
    whole = solve_puzzles(trainer.model, PUZZLES.test.inputs, steps=3)
    assert (whole.answers == solved.answers[:3]).all(), "more steps go on where fewer end"
    solved.q_halt[:] = -1.0
    solved.q_halt[2, 1] = 0.5
    assert solved.halts(0.0).tolist() == [5, 2, 5, 5, 5, 5]
    assert (solved.pick(solved.halts(0.0))[1] == solved.answers[2, 1]).all()
    assert solved.surest().tolist() == [0, 2, 0, 0, 0, 0]
    found = score_puzzles(trainer.model, PUZZLES.test)
    assert len(found["by_step"]) == 4 and found["exact"]["value"] == found["by_step"][-1]
    assert sum(found["halting"]["histogram"]) == found["puzzles"] == 6 and found["halting"]["never"] == 6
    assert found["halting"]["mean_steps"] == 4
    four = solve_puzzles(trainer.model, PUZZLES.test.inputs)
    right = [max(range(4), key=lambda step, i=i: four.q_halt[step, i]) for i in range(6)]
    whole_grids = four.right(PUZZLES.test.labels).all(-1)
    assert found["surest"]["value"] == sum(whole_grids[step, i] for i, step in enumerate(right)) / 6


def test_the_best_weights_are_kept() -> None:
    trainer, step = start()
    run(trainer, step, 1)
    good = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.keep_if_best((0.5, 0.9))
    run(trainer, step, 1)
    trainer.keep_if_best((0.5, 0.8))
    trainer.use_best()
    assert all(torch.equal(value, good[name]) for name, value in trainer.model.state_dict().items())


# ---- the stage ---------------------------------------------------------------------------------------------------

STAGE = (
    "threads=1",
    'trm.precision="float32"',
    "report=",
    "trm.steps=6",
    "trm.batch_size=6",
    "trm.warmup_steps=1",
    "trm.save_every=2",
    "trm.log_every=1",
    "trm.validate_every=2",
    "trm.halt_exploration=0.5",
    "trm.model.hidden_size=16",
    "trm.model.num_attention_heads=2",
    "trm.model.intermediate_multiple=8",
    "trm.model.max_supervision_steps=3",
    "trm.model.prefix_length=1",
    "trm.model.puzzle_embedding_size=16",
    "trm.puzzles.num_train=12",
    "trm.puzzles.num_validation=4",
    "trm.puzzles.num_test=6",
)
CLOCK = {"wall_s", "cpu_s", "peak_rss_bytes"}


class Killed(BaseException):
    """Stands for the end of the process."""


def run_stage(path: Path, *overrides: str) -> tuple[dict[str, Any], Path]:
    loaded = resolve_recipe(load_recipe(["trm-sudoku4"], [*STAGE, *overrides]))
    directory = RunDir(path)
    result = run_recipe(loaded, directory, select_stages(loaded.recipe))["trm"]
    return {key: value for key, value in result.items() if key not in CLOCK}, directory.stage("trm").path


def content(stage: Path) -> dict[str, bytes]:
    files = [stage / "metrics.jsonl", *(stage / "checkpoint").iterdir(), *(stage / "state").iterdir()]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    return run_stage(tmp_path_factory.mktemp("trm") / "unbroken")


def weights_of(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without the state, whose totals hold seconds."""
    return {name: content for name, content in files.items() if not name.startswith("step-")}


def test_a_stage_leaves_scores_and_a_checkpoint(unbroken: tuple[dict[str, Any], Path]) -> None:
    result, stage = unbroken
    assert result["steps"] == 6 and result["tokens"] == 6 * 6 * 16
    assert result["puzzles"] == {"train": 12, "validation": 4, "test": 6}
    loaded = load_trm(stage / "checkpoint")
    assert result["parameters"] == loaded.model.shape.num_parameters()
    assert loaded.puzzles.kind == "sudoku" and loaded.puzzles.box == (2, 2)
    puzzles = build_puzzles(
        SudokuPuzzles(num_train=12, num_validation=4, num_test=6), trm_stage.derive_seed(0, "trm", "puzzles")
    )
    assert score_puzzles(loaded.model, puzzles.test) == result["test"]
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "validation/exact" in row] == [2, 4, 6]


def test_equal_seeds_give_equal_bits(unbroken: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    result, stage = run_stage(tmp_path / "again")
    assert result == unbroken[0] and weights_of(content(stage)) == weights_of(content(unbroken[1]))
    other = run_stage(tmp_path / "other", "seed=1")[1]
    assert content(other)["model.safetensors"] != content(stage)["model.safetensors"]


@pytest.mark.parametrize("moment", [1, 2, 3, 5])
def test_a_killed_stage_goes_on_bit_for_bit(
    unbroken: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Weights, moments, average, carry, data position and best weights all come back."""
    real = deep_supervision_step

    def dying(*args: Any, **how: Any) -> Callable[[int], StepOutput]:
        step = real(*args, **how)

        def train(number: int) -> StepOutput:
            if number == moment:
                raise Killed
            return step(number)

        return train

    monkeypatch.setattr(trm_stage, "deep_supervision_step", dying)
    with pytest.raises(Killed):
        run_stage(tmp_path / "killed")
    monkeypatch.setattr(trm_stage, "deep_supervision_step", real)
    result, stage = run_stage(tmp_path / "killed")
    assert result == unbroken[0] and weights_of(content(stage)) == weights_of(content(unbroken[1]))


def test_passes_in_bfloat16_go_on_bit_for_bit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of the carry are bfloat16 there; scores are those of the checkpoint as it is loaded, in float32."""
    given = ('trm.precision="bfloat16"', "trm.steps=4")
    result, stage = run_stage(tmp_path / "unbroken", *given)
    real = trm_stage.deep_supervision_step

    def dying(*args: Any, **how: Any) -> Callable[[int], StepOutput]:
        step = real(*args, **how)

        def train(number: int) -> StepOutput:
            if number == 3:
                raise Killed
            return step(number)

        return train

    monkeypatch.setattr(trm_stage, "deep_supervision_step", dying)
    with pytest.raises(Killed):
        run_stage(tmp_path / "killed", *given)
    monkeypatch.setattr(trm_stage, "deep_supervision_step", real)
    again, other = run_stage(tmp_path / "killed", *given)
    assert again == result and weights_of(content(other)) == weights_of(content(stage))
    puzzles = build_puzzles(
        SudokuPuzzles(num_train=12, num_validation=4, num_test=6), trm_stage.derive_seed(0, "trm", "puzzles")
    )
    assert score_puzzles(load_trm(stage / "checkpoint").model, puzzles.test) == result["test"]


def test_the_last_weights_and_those_that_stay(tmp_path: Path) -> None:
    _, stage = run_stage(tmp_path / "last", "trm.select=last", "trm.checkpoint_every=3", "trm.ema.checkpoint=false")
    kept = [folder.name for folder in sorted((stage / "checkpoints").iterdir())]
    assert kept == ["step-00000003", "step-00000006"]
    last, written = (load_trm(stage / name).model.state_dict() for name in ("checkpoints/step-00000006", "checkpoint"))
    assert all(torch.equal(value, written[name]) for name, value in last.items())


def test_a_plan_counts_passes() -> None:
    recipe = resolve_recipe(load_recipe(["trm-sudoku4"], ["threads=1"])).recipe
    (trained, _) = estimate_stages(recipe)
    assert recipe.trm is not None
    shape = recipe.trm.model.for_puzzles(6, 16)
    steps = recipe.trm.steps * recipe.trm.batch_size
    assert trained.kind == "trm" and trained.tokens == steps * 16
    assert trained.flops == pytest.approx(steps * shape.flops_per_supervision_step(train=True), rel=0.5)


def test_a_recipe_with_other_stages_still_needs_a_tokenizer() -> None:
    with pytest.raises(RecipeError, match="neither a base nor a"):
        load_recipe(["trm-sudoku4"], ["sft.steps=1"])


def test_the_average_of_a_recipe_is_the_tables() -> None:
    assert load_recipe(["trm-sudoku4"]).recipe.trm.ema == EmaConfig(decay=0.98, warmup=False)  # type: ignore[union-attr]
    assert CELLS == 16


def test_a_file_of_puzzles_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("1..4.2.....3....\n")
    recipe = load_recipe(["trm-sudoku4"], [f"trm.puzzles.path={json.dumps(str(path))}"]).recipe
    before = fingerprint_stages(recipe, None)["trm"]
    path.write_text("1..4.2.....3...2\n")
    assert fingerprint_stages(recipe, None)["trm"] != before
