"""Which of a stage's checkpoints goes on: `[sft.select]`. Imports without torch."""

from __future__ import annotations

from pydantic import Field

from tafkir.recipe.tables import Positive, Table

__all__ = ["SelectConfig"]


class SelectConfig(Table):
    """The best score among the checkpoints whose entropy is above a floor: what reinforcement learning can start from.

    More epochs raise the score and lower the entropy, until reinforcement learning has nothing left to explore
    (Ring-lite, arXiv 2506.14731). Candidates are what `checkpoint_every` keeps, and the last one.
    """

    entropy_floor: float = Field(
        0.1, ge=0, description="Least entropy of sampled tokens, nats; below it the highest entropy is taken."
    )
    problems: Positive = Field(64, description="Validation problems that every candidate answers.")
    samples: Positive = Field(2, description="Answers to each of them, sampled at temperature 1.")
    max_tokens: Positive = Field(128, description="Length limit of such an answer.")
