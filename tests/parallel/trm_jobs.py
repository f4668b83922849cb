"""What the test processes do: a tiny recursive training, whatever the number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tafkir.data.puzzles.parts import Samples
from tafkir.data.puzzles.sets import build_puzzles
from tafkir.models.trm import build_trm
from tafkir.recipe.puzzles import SudokuPuzzles
from tafkir.recipe.schema import ParallelConfig
from tafkir.recipe.trm import TrmConfig
from tafkir.runlog.metrics import read_jsonl
from tafkir.runlog.rundir import StageDir
from tafkir.train.deep_supervision import RecursiveTrainer, deep_supervision_step
from tafkir.train.loop import fit
from tafkir.train.puzzle_scores import score_puzzles
from tafkir.train.replicas import open_replicas

PUZZLE_IDS = 5
TABLE = {
    "steps": 6,
    "batch_size": 7,
    "warmup_steps": 1,
    "learning_rate": 1e-3,
    "halt_exploration": 0.3,
    "puzzle_learning_rate": 1e-3,
    "log_every": 1,
    "save_every": 2,
    "validate_every": 3,
    "ema": {"decay": 0.5, "warmup": False},
    "model": {
        "hidden_size": 16, "num_attention_heads": 2, "intermediate_multiple": 8, "mixer": "attention",
        "position_encoding": "rope", "prefix_length": 1, "puzzle_embedding_size": 16, "num_recursions": 2,
        "num_latent_steps": 2, "max_supervision_steps": 3,
    },
    "puzzles": {"num_train": 20, "num_validation": 3, "num_test": 4},
}  # fmt: skip


def train_recursively(folder: Path, table: dict[str, Any], *, stop: int = 0) -> dict[str, Any]:
    """Train, resuming from `folder`; returns metric rows, weights, samples drawn, and how many rows were held here.

    Args:
        stop: end after so many steps; 0 is all of them.
    """
    config = TrmConfig.model_validate({**TABLE, **table})
    assert isinstance(config.puzzles, SudokuPuzzles)
    puzzles = build_puzzles(config.puzzles, 0)
    model = build_trm(config.model.for_puzzles(6, 16, PUZZLE_IDS), 0)
    # All would halt at once but for the exploration, which keeps some of them.
    assert model.q_head.bias is not None
    torch.nn.init.constant_(model.q_head.bias, 3.0)
    trainer = RecursiveTrainer(model, config, open_replicas(ParallelConfig()))
    stream = puzzles.stream(augment=True, seed=0)

    def take(first: int, size: int) -> Samples:
        samples = stream.take(first, size)
        return samples._replace(puzzle_ids=samples.puzzle_ids + [(first + i) % PUZZLE_IDS for i in range(size)])

    step = deep_supervision_step(trainer, take, seed=1, label="trm")

    def one(number: int) -> Any:
        if stop and number == stop:
            raise InterruptedError
        return step(number)

    stage = StageDir(folder, "trm")
    try:
        fit(
            trainer,
            stage,
            one,
            validate=lambda: {"validation/cells": score_puzzles(model, puzzles.validation)["cells"]},
            label="trm",
        )
    except InterruptedError:
        return {}
    rows = list(read_jsonl(stage.metrics_path)) if trainer.is_main else None
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return {"rows": rows, "weights": weights, "drawn": int(trainer.carry.drawn), "held": len(trainer.carry.y)}
