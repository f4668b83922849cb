"""Test-time training on ARC tasks: a trained model gets vectors for tasks that it has never seen.

New rows of the table of puzzle vectors start at the mean of the known ones, as the official code's loading does, and
learn from the tasks' demonstrations in all their forms; the weights stay as they are, or learn along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import torch

from tafkir.checkpoint.trm import TrmCheckpoint
from tafkir.data.puzzles.arc import ArcTask
from tafkir.data.puzzles.arc_sets import ArcStream, TaskForms
from tafkir.data.puzzles.canvas import draw_forms, kept_turns
from tafkir.errors import CheckpointError
from tafkir.models.trm import Trm
from tafkir.recipe.seeds import derive_seed
from tafkir.recipe.trm import TrmConfig
from tafkir.train.deep_supervision import RecursiveTrainer, deep_supervision_step

__all__ = ["learn_tasks"]


def learn_tasks(
    solver: TrmCheckpoint,
    tasks: Sequence[ArcTask],
    *,
    steps: int,
    num_copies: int = 7,
    batch_size: int = 32,
    puzzle_learning_rate: float = 3e-2,
    learning_rate: float | None = None,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> TrmCheckpoint:
    """A copy of a model that knows more tasks; test inputs are not looked at, but to tell forms apart.

    Args:
        solver: trained on ARC tasks.
        tasks: with demonstrations.
        steps: supervision steps of a batch; with none the vectors stay at the mean.
        num_copies: other forms of each task, at most.
        puzzle_learning_rate: step of the vectors' sign-SGD, which falls to a tenth.
        learning_rate: of the weights; None leaves them as they are.
        on_step: told the step and its loss.

    Raises:
        CheckpointError: the model has no vectors for tasks.
        DataError: a grid does not fit the canvas.
        TrainingError: the loss stops being finite.
    """
    format, identifiers = solver.puzzles, solver.identifiers
    if solver.model.puzzle_table is None or identifiers is None:
        raise CheckpointError(
            "the model has no vectors for tasks", where=str(solver.path), expected="one for ARC tasks"
        )
    turns = kept_turns(format.rows, format.columns)
    new: list[TaskForms] = []
    names = list(identifiers)
    for task in tasks:
        forms = draw_forms(Random(derive_seed(seed, "forms", task.id)), task, num_copies, turns=turns)
        ids = tuple(range(len(names), len(names) + len(forms)))
        new.append(TaskForms(task, tuple(forms), ids, task.train))
        names += new[-1].names
    model = _widened(solver.model, len(names))
    config = TrmConfig(
        steps=max(1, steps),
        batch_size=batch_size,
        warmup_steps=0,
        select="last",
        learning_rate=learning_rate or 1e-4,
        puzzle_learning_rate=puzzle_learning_rate,
    )
    trainer = RecursiveTrainer(model, config)
    if learning_rate is None:
        model.requires_grad_(False)
        trainer.optimizers = trainer.optimizers[-1:]
    stream = ArcStream(new, format, translate=True, seed=derive_seed(seed, "samples"))
    step = deep_supervision_step(trainer, stream.take, seed=derive_seed(seed, "halting"), label="test-time training")
    for number in range(steps):
        trainer.set_step(number)
        loss = step(number).metrics["train/loss"]
        assert isinstance(loss, float)
        on_step(number + 1, loss)
    return replace(solver, model=model.eval(), identifiers=tuple(names))


def _widened(model: Trm, num_puzzle_ids: int) -> Trm:
    """A copy with more rows in its table; the new ones are the mean of those that are in use."""
    shape = model.shape.model_copy(update={"num_puzzle_ids": num_puzzle_ids})
    wide = Trm(shape)
    state = model.state_dict()
    table = state["puzzle_table.weight"]
    mean = table[1:].mean(0, keepdim=True) if len(table) > 1 else table
    state["puzzle_table.weight"] = torch.cat((table, mean.expand(num_puzzle_ids - len(table), -1)))
    wide.load_state_dict(state)
    return wide.to(table.device)
