"""Who teaches a recursive model beside the puzzles' own answers: `[trm.teacher]`. Imports without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.tables import Table
from tafkir.runlog.rundir import RunDir

__all__ = ["AnswersTeacher", "CheckpointTeacher", "Teacher"]

_KIND = "Another recursive model, or a file of answers by any model."
_KEEP = "Which of its answers to puzzles without one count: those that keep the rules (right), or all of them."


class CheckpointTeacher(Table):
    """Another recursive model: it answers puzzles whose answer is unknown, and is imitated in every cell."""

    kind: Literal["checkpoint"] = Field("checkpoint", description=_KIND)
    checkpoint: str = Field(description="Its checkpoint folder, run directory or bundled name.")
    weight: float = Field(
        0.5, ge=0, le=1, description="Share of the loss that is the distance to its distribution; 0 takes answers only."
    )
    temperature: float = Field(2.0, gt=0, description="Both distributions are softened by this.")
    keep: Literal["right", "all"] = Field("right", description=_KEEP)

    def folder(self) -> Path:
        """The checkpoint's folder.

        Raises:
            CheckpointError: there is none.
        """
        of_run = RunDir(Path(self.checkpoint)).stage("trm").checkpoint_dir
        return of_run if of_run.is_dir() else find_checkpoint(self.checkpoint)


class AnswersTeacher(Table):
    """Answers that somebody wrote down, such as a language model through `tafkir card --split train`."""

    kind: Literal["answers"] = Field("answers", description=_KIND)
    path: str = Field(description="JSON lines with `question` (a grid, or a prompt that holds it) and `text`.")
    keep: Literal["right", "all"] = Field("right", description=_KEEP)


Teacher = Annotated[CheckpointTeacher | AnswersTeacher, Field(discriminator="kind")]
"""What `[trm.teacher]` may hold, told apart by `kind`."""
