"""Reinforcement learning as tables of the recipe: `[rlvr]`, and what its loss is made of. Imports without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from tafkir.recipe.cluster import InProcessEngine, RolloutEngine
from tafkir.recipe.tables import Positive, Table, TrainTable

__all__ = ["Acceptance", "AcceptanceKind", "IcePop", "KlConfig", "NoAcceptance", "RlvrConfig"]

AcceptanceKind = Literal["none", "icepop"]


class NoAcceptance(Table):
    """Every token counts as it was sampled: plain GRPO."""

    kind: Literal["none"] = Field("none", description="How the training / inference ratio k weights and drops tokens.")


class IcePop(Table):
    """Tokens inside the band weigh k, those outside 0 (arXiv 2510.18855, equations 1-3); both ends are inside."""

    kind: Literal["icepop"] = Field(
        "icepop", description="How the training / inference ratio k weights and drops tokens."
    )
    alpha: float = Field(0.5, ge=0, description="Lower end of the band.")
    beta: float = Field(5.0, gt=0, description="Upper end of the band.")


def _acceptance_kind(value: Any) -> str:
    """A table without a `kind` is the default's."""
    kind = value.get("kind", "icepop") if isinstance(value, Mapping) else getattr(value, "kind", "icepop")
    return str(kind)


Acceptance = Annotated[
    Annotated[NoAcceptance, Tag("none")] | Annotated[IcePop, Tag("icepop")],
    Discriminator(_acceptance_kind),
]
"""What `[rlvr.acceptance]` may hold, told apart by `kind`."""


class KlConfig(Table):
    """The penalty towards the stage's first policy."""

    coef: float = Field(0.0, ge=0, description="Weight of the k3 penalty towards the stage's first policy.")


class RlvrConfig(TrainTable):
    """GRPO advantages with the IcePop loss, on problems with a checkable answer."""

    prompts_per_step: Positive = Field(32, description="Problems per step.")
    group_size: int = Field(8, ge=2, description="Completions per problem.")
    max_steps: int = Field(
        0, ge=0, description="Only problems whose solution has at most this many steps; 0 takes all."
    )
    story_share: float = Field(0.0, ge=0, le=1, description="Share of the problems that are made up.")
    updates_per_rollout: Positive = Field(1, description="Optimiser steps on each batch of rollouts.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the rollouts.")
    max_completion_tokens: Positive = Field(96, description="Length limit of a rollout.")
    clip_eps_low: float = Field(0.2, ge=0, description="PPO clip below one.")
    clip_eps_high: float = Field(0.2, ge=0, description="PPO clip above one.")
    kl: KlConfig = KlConfig()
    acceptance: Acceptance = IcePop()
    normalize_std: bool = Field(True, description="Divide group advantages by the group's standard deviation.")
    reduction: Literal["sequence_mean", "token_mean"] = Field(
        "sequence_mean", description="Mean over tokens per completion, then over completions; or over all tokens."
    )
    drop_zero_variance: bool = Field(True, description="Leave out groups whose rewards are all equal.")
    engine: RolloutEngine = InProcessEngine()
