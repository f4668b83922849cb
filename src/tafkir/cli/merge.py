"""`tafkir merge CHECKPOINT...`: one checkpoint from several of a run, in place of a learning-rate decay."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["merge"]


class Decay(StrEnum):
    """The decays of `recipe.schema.DecayShape`, as a command line names them."""

    LINEAR = "linear"
    COSINE = "cosine"
    ONE_MINUS_SQRT = "1-sqrt"


def merge(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT...", help="Folders, the oldest first.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new checkpoint; must not be there.")],
    decay: Annotated[
        Decay, typer.Option("--decay", help="The learning-rate decay to stand in for; linear is the plain mean.")
    ] = Decay.LINEAR,
) -> None:
    """Merge checkpoints of one run, written at equal distances with `checkpoint_every` at a constant rate (WSM)."""
    from tafkir.train.merge import merge_checkpoints

    manifest = merge_checkpoints(checkpoints, out, decay.value)
    for folder, coefficient in zip(checkpoints, manifest.lineage["coefficients"], strict=True):
        print(f"{coefficient:8.5f}  {folder}")
    print(f"{out}: {len(manifest.tensors):,} tensors, {manifest.num_parameters:,} parameters")
