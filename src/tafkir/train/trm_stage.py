"""The `trm` stage: puzzles from the recipe, deep supervision, a checkpoint of the best weights, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from tafkir.checkpoint.trm import save_trm
from tafkir.data.puzzles.sets import PuzzleSets, PuzzleStream, build_puzzles
from tafkir.models.trm import build_trm
from tafkir.ops.device import choose_device
from tafkir.ops.native import select_kernels
from tafkir.recipe.seeds import derive_seed
from tafkir.recipe.stage import StageContext
from tafkir.recipe.trm import TrmConfig
from tafkir.runlog.metrics import Metric
from tafkir.train.deep_supervision import RecursiveTrainer, deep_supervision_step
from tafkir.train.loop import fit
from tafkir.train.puzzle_scores import score_puzzles

__all__ = ["run_trm"]


def run_trm(ctx: StageContext) -> dict[str, Any]:
    """Train a recursive model from fresh weights on the recipe's puzzles.

    Raises:
        DataError: the puzzles cannot be read or made.
        TrainingError: the loss stops being finite.
    """
    config = ctx.recipe.trm
    assert config is not None
    torch.set_num_threads(ctx.recipe.threads)
    select_kernels(ctx.recipe.kernels)
    puzzles = build_puzzles(config.puzzles, derive_seed(ctx.seed, "trm", "puzzles"))
    format = puzzles.format
    shape = config.model.for_puzzles(format.vocab_size, format.num_cells)
    model = build_trm(shape, derive_seed(ctx.seed, "trm", "weights"))
    trainer = RecursiveTrainer(model.to(choose_device(ctx.recipe.parallel.device)), config)
    stream = PuzzleStream(puzzles, augment=config.puzzles.augment, seed=derive_seed(ctx.seed, "trm", "samples"))
    step = deep_supervision_step(trainer, stream.take, seed=derive_seed(ctx.seed, "trm", "halting"), label="trm")
    result = fit(
        trainer,
        ctx.stage,
        step,
        validate=_validator(trainer, puzzles),
        keep=_keeper(ctx, trainer, puzzles),
        label="trm",
    )
    with _as_written(trainer):
        if config.select == "best":
            trainer.use_best()
        _save(ctx, trainer, puzzles, ctx.stage.checkpoint_dir, steps=result.steps, select=config.select)
        test = _score(trainer, puzzles, "test")
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "wall_s": result.wall_s,
        "cpu_s": result.cpu_s,
        "peak_rss_bytes": result.peak_rss_bytes,
        "puzzles": puzzles.counts(),
        "parameters": shape.num_parameters(),
        "flops_per_supervision_step": shape.flops_per_supervision_step(),
        "test": test,
    }


def _as_written(trainer: RecursiveTrainer) -> AbstractContextManager[None]:
    """The weights that checkpoints hold: their average, or the last ones."""
    ema = trainer.config.ema
    if trainer.average is not None and ema is not None and ema.checkpoint:
        return trainer.average.applied()
    return nullcontext()


def _score(trainer: RecursiveTrainer, puzzles: PuzzleSets, part: str) -> dict[str, Any]:
    config = trainer.config
    chosen = puzzles.test if part == "test" else puzzles.validation
    return score_puzzles(trainer.model, chosen, halt_threshold=config.halt_threshold, batch_size=config.eval_batch_size)


def _validator(trainer: RecursiveTrainer, puzzles: PuzzleSets) -> Callable[[], Mapping[str, Metric]]:
    """Scores the weights as they would be written, and keeps them where they are the best so far."""

    def validate() -> Mapping[str, Metric]:
        with _as_written(trainer):
            found = _score(trainer, puzzles, "validation")
            exact, cells = found["exact"]["value"], found["cells"]
            trainer.keep_if_best((exact, cells))
        halting = found["halting"]
        return {
            "validation/exact": exact,
            "validation/cells": cells,
            "validation/halted_exact": halting["exact"]["value"],
            "validation/supervision_steps": halting["mean_steps"],
        }

    return validate


def _keeper(ctx: StageContext, trainer: RecursiveTrainer, puzzles: PuzzleSets) -> Callable[[int], None]:
    """Writes `checkpoints/step-<n>`, as the weights are after n steps."""

    def keep(done: int) -> None:
        _save(ctx, trainer, puzzles, ctx.stage.path / "checkpoints" / f"step-{done:08d}", steps=done)

    return keep


def _save(ctx: StageContext, trainer: RecursiveTrainer, puzzles: PuzzleSets, path: Path, **lineage: Any) -> None:
    config: TrmConfig = trainer.config
    lineage = {"recipe": ctx.recipe.name, "stage": "trm", **lineage, "seed": ctx.seed}
    save_trm(path, trainer.model, puzzles.format, extra=lineage, dtype=getattr(torch, config.checkpoint_dtype))
