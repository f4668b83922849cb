"""`[rlvr.long_tail]`: the few rollouts that all would wait for; and how many rollouts are kept. Torch-free."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from tafkir.recipe.tables import Table
from tafkir.runlog.rollouts import Keep

__all__ = ["KeepRollouts", "LongTailConfig"]


def _check_keep(text: str) -> str:
    Keep.parse(text)
    return text


KeepRollouts = Annotated[str, AfterValidator(_check_keep)]
"""What `Keep.parse` reads."""


class LongTailConfig(Table):
    """Partial rollouts under a token budget (C3PO++, arXiv 2510.18855, algorithm 1), and rollouts of older weights.

    Left as it is, every step waits for all of its own rollouts.
    """

    token_budget: int = Field(
        0, ge=0, description="Tokens of finished groups that end a step's sampling (Φ); 0 waits for all rollouts."
    )
    pool_prompts: int = Field(
        0, ge=0, description="Problems that are rolled out at once under the budget (Ω); 0 takes prompts_per_step."
    )
    max_retention: int = Field(
        4, ge=0, description="Cuts that a group of rollouts may go on after (σ); beyond, it is dropped and counted."
    )
    staleness: int = Field(
        0, ge=0, description="Sample the rollouts of a step with the weights of this many steps before."
    )

    @model_validator(mode="after")
    def _check_long_tail(self) -> Self:
        if self.pool_prompts and not self.token_budget:
            raise ValueError("pool_prompts is the pool of a token budget: set token_budget, too")
        return self
