"""What a stage is given: the recipe, the run, its own directory, and where the stage before left its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tafkir.errors import BackendUnavailable
from tafkir.protocols import Completer, Task
from tafkir.recipe.rollout import RolloutConfig
from tafkir.recipe.schema import Recipe
from tafkir.runlog.rundir import RunDir, StageDir

__all__ = ["BuildCompleter", "StageContext", "StageFunction"]


class BuildCompleter(Protocol):
    """Makes a completer of the checkpoint in a folder; without `rollout`, as the stage's own table says."""

    def __call__(self, checkpoint: Path, rollout: RolloutConfig = ...) -> Completer: ...


def _no_completer(checkpoint: Path, rollout: RolloutConfig | None = None) -> Completer:
    raise BackendUnavailable(
        "this stage was started without a completer",
        where=str(checkpoint),
        fix="pass build_completer to its StageContext",
    )


def _grade_here(task: Task) -> Task:
    return task


@dataclass(frozen=True, slots=True)
class StageContext:
    """Everything that a stage function may read.

    `previous` is the checkpoint folder of the nearest earlier stage, or of the recipe's base, or None where the
    stage starts from nothing. `seed` is the recipe's. `build_completer` is how training reaches the engine without
    importing it: `ctx.build_completer(ctx.previous)`, then `load_weights` after each update. `share_grading` makes a
    task whose answers others grade, where the recipe has verifiers for it.
    """

    recipe: Recipe
    run: RunDir
    stage: StageDir
    previous: Path | None
    seed: int
    build_completer: BuildCompleter = _no_completer
    share_grading: Callable[[Task], Task] = _grade_here


StageFunction = Callable[[StageContext], dict[str, Any]]
"""Runs one stage and returns what goes to its `result.json`; it resumes by itself from what it finds in `stage`."""
