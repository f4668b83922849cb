"""Builds the in-process engine of a checkpoint; what stages get as `build_completer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tafkir.errors import CheckpointError

if TYPE_CHECKING:
    from tafkir.engine.engine import Engine

__all__ = ["build_completer", "checkpoint_of"]

# Stages hand over whole batches of rollouts; nobody waits for a single one.
_MAX_BATCH = 256


def build_completer(checkpoint: Path) -> Engine:
    """An engine with the weights and the tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: the folder is missing or damaged.
        DataError: it has no tokenizer.
    """
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.serve.loading import build_engine

    return build_engine(checkpoint, Tokenizer.load(checkpoint), None, max_batch=_MAX_BATCH)


def checkpoint_of(name: str) -> Path:
    """The checkpoint folder that a person means: a folder, a bundled name, or a run, whose last one is taken.

    Raises:
        CheckpointError: there is none.
    """
    from tafkir.recipe.bundled import find_checkpoint
    from tafkir.runlog.rundir import RunDir

    folder = find_checkpoint(name)
    run = RunDir(folder)
    if not run.stages_dir.is_dir():
        return folder
    for kind in ("rlhf", "rlvr", "dpo", "sft", "pretrain"):
        if (checkpoint := run.stage(kind).checkpoint_dir).is_dir():
            return checkpoint
    raise CheckpointError("this run has no checkpoint yet", where=name, fix="finish it with `tafkir run`")
