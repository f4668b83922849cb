"""Which tasks a stage learns from, and how their problems are chosen. Imports without torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from tafkir.recipe.tables import Positive, Table

__all__ = ["LEVELS", "CurriculumConfig", "PassRateConfig", "TaskConfig", "TaskKind", "Tasks"]

TaskKind = Literal[
    "word_problems",
    "countdown",
    "game_24",
    "sudoku",
    "maze",
    "knights_and_knaves",
    "grids",
    "code",
    "instructions",
    "multiple_choice",
]

LEVELS: dict[TaskKind, int] = {
    "word_problems": 1,
    "countdown": 6,
    "game_24": 3,
    "sudoku": 6,
    "maze": 6,
    "knights_and_knaves": 5,
    "grids": 5,
    "code": 3,
    "instructions": 4,
    "multiple_choice": 3,
}
"""How many levels of difficulty each kind has; 1 is the easiest."""


class TaskConfig(Table):
    """One kind of problem in the mixture."""

    kind: TaskKind = Field(description="What is asked: the recipe's word problems, or a kind with a verifier.")
    weight: float = Field(1.0, gt=0, description="Share of the problems, relative to the other kinds' weights.")
    difficulty: tuple[Positive, ...] = Field(
        (1,), min_length=1, description="Levels that problems are drawn from, 1 being the easiest."
    )
    sandbox: Literal["bwrap", "rlimit", "remote"] = Field(
        "bwrap",
        description="Where code runs: under bubblewrap; at your own risk with your own rights and limits alone "
        "(rlimit); or on the SandboxFusion server of $TAFKIR_SANDBOX_URL (remote).",
    )
    timeout_s: float = Field(5.0, gt=0, description="Computing time that a program of kind code may take.")

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        top = LEVELS[self.kind]
        if max(self.difficulty) > top:
            raise ValueError(f"{self.kind} has levels 1 to {top}, not {max(self.difficulty)}")
        if list(self.difficulty) != sorted(set(self.difficulty)):
            raise ValueError("difficulty must name levels in rising order, each once")
        if self.kind != "code" and (self.sandbox, self.timeout_s) != ("bwrap", 5.0):
            raise ValueError(f"{self.kind} runs no programs: leave out sandbox and timeout_s")
        return self


def _check_tasks(tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
    kinds = [task.kind for task in tasks]
    twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
    if twice:
        raise ValueError(f"{twice[0]} stands there twice: give one table all of its levels")
    return tasks


Tasks = Annotated[tuple[TaskConfig, ...], AfterValidator(_check_tasks)]
"""A mixture of tasks; empty means the recipe's word problems alone."""


class CurriculumConfig(Table):
    """Each kind begins at the first of its levels, and rises to the next one when it is solved often enough."""

    threshold: float = Field(0.7, gt=0, le=1, description="Pass rate from which on the level rises.")
    window: Positive = Field(5, description="Steps that the pass rate is taken over.")
    review_share: float = Field(0.2, ge=0, lt=1, description="Share of the problems from levels already passed.")


class PassRateConfig(Table):
    """Only problems that the stage's first policy solves sometimes are trained on."""

    pool: Positive = Field(256, description="Problems whose pass rate is measured before the first step.")
    samples: Positive = Field(8, description="Completions per problem.")
    low: float = Field(0.1, ge=0, le=1, description="Smallest pass rate that stays.")
    high: float = Field(0.9, ge=0, le=1, description="Largest pass rate that stays.")

    @model_validator(mode="after")
    def _check_band(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")
        return self
