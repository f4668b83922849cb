"""The `trm` stage: puzzles from the recipe, deep supervision, a checkpoint of the best weights, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from tafkir.checkpoint.trm import save_trm
from tafkir.data.puzzles.arc_sets import ArcSets
from tafkir.data.puzzles.sets import PuzzleSets, build_puzzles
from tafkir.models.trm import build_trm
from tafkir.ops.native import select_kernels
from tafkir.recipe.puzzles import ArcPuzzles
from tafkir.recipe.seeds import derive_seed
from tafkir.recipe.stage import StageContext
from tafkir.recipe.teacher import CheckpointTeacher
from tafkir.recipe.trm import TrmConfig
from tafkir.runlog.atomic import write_json
from tafkir.runlog.metrics import Metric
from tafkir.runlog.progress import Progress
from tafkir.train.arc_scores import score_arc
from tafkir.train.deep_supervision import RecursiveTrainer, deep_supervision_step
from tafkir.train.loop import fit
from tafkir.train.puzzle_scores import score_puzzles
from tafkir.train.replicas import open_replicas
from tafkir.train.teacher import SoftTeacher, load_teacher, teach

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
    puzzles, teacher, taught = _learn_from(config, puzzles)
    format = puzzles.format
    shape = config.model.for_puzzles(
        format.vocab_size, format.num_cells, puzzles.num_puzzle_ids, grid_columns=format.columns
    )
    model = build_trm(shape, derive_seed(ctx.seed, "trm", "weights"))
    replicas = open_replicas(ctx.recipe.parallel)
    trainer = RecursiveTrainer(model.to(replicas.device), config, replicas, teacher)
    stream = puzzles.stream(augment=config.puzzles.augment, seed=derive_seed(ctx.seed, "trm", "samples"))
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
        # As the checkpoint is loaded.
        model.dtype = torch.float32
        test = _score(trainer, puzzles, "test")
        voted = _vote(ctx, trainer, puzzles)
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "wall_s": result.wall_s,
        "cpu_s": result.cpu_s,
        "peak_rss_bytes": result.peak_rss_bytes,
        "puzzles": puzzles.counts(),
        **taught,
        "parameters": shape.num_parameters(),
        "flops_per_supervision_step": shape.flops_per_supervision_step(),
        "test": test,
        **voted,
    }


def _learn_from(config: TrmConfig, puzzles: PuzzleSets) -> tuple[PuzzleSets, SoftTeacher | None, dict[str, Any]]:
    """The puzzles with the answers that are known or taught, whom to imitate, and counts under `teacher`."""
    teacher = config.teacher
    if teacher is None and config.num_labelled is None:
        return puzzles, None, {}
    solver = load_teacher(teacher, puzzles.format) if isinstance(teacher, CheckpointTeacher) else None
    taught = teach(config, puzzles, solver)
    soft = None
    if isinstance(teacher, CheckpointTeacher) and solver is not None and teacher.weight:
        soft = SoftTeacher(solver, config, teacher.weight, teacher.temperature)
    return taught.puzzles, soft, {"teacher": taught.counts}


def _as_written(trainer: RecursiveTrainer) -> AbstractContextManager[None]:
    """The weights that checkpoints hold: their average, or the last ones."""
    ema = trainer.config.ema
    if trainer.average is not None and ema is not None and ema.checkpoint:
        return trainer.average.applied()
    return nullcontext()


def _score(trainer: RecursiveTrainer, puzzles: PuzzleSets, part: str) -> dict[str, Any]:
    config = trainer.config
    chosen = puzzles.test if part == "test" else puzzles.validation
    return score_puzzles(
        trainer.model,
        chosen,
        halt_threshold=config.halt_threshold,
        batch_size=config.eval_batch_size,
        replicas=trainer.replicas,
    )


def _vote(ctx: StageContext, trainer: RecursiveTrainer, puzzles: PuzzleSets) -> dict[str, Any]:
    """Scores of ARC tasks by voting, under `arc`; their submission goes to `submission.json`."""
    config = trainer.config
    if not isinstance(puzzles, ArcSets) or not isinstance(config.puzzles, ArcPuzzles) or not trainer.is_main:
        return {}
    with Progress("trm votes", 1) as progress:

        def tell(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        scores, submission = score_arc(
            trainer.model,
            puzzles,
            max_forms=config.puzzles.num_votes,
            batch_size=config.eval_batch_size,
            on_progress=tell,
        )
    write_json(ctx.stage.path / "submission.json", submission)
    return {"arc": scores}


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
    if not trainer.is_main:
        return
    lineage = {"recipe": ctx.recipe.name, "stage": "trm", **lineage, "seed": ctx.seed}
    save_trm(
        path,
        trainer.model,
        puzzles.format,
        extra=lineage,
        dtype=getattr(torch, config.checkpoint_dtype),
        identifiers=puzzles.identifiers,
    )
