"""Reinforcement learning as tables of the recipe: `[rlvr]`, and what its loss is made of. Imports without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from tafkir.recipe.cluster import InProcessEngine, RolloutEngine
from tafkir.recipe.long_tail import KeepRollouts, LongTailConfig
from tafkir.recipe.rollout import RolloutConfig
from tafkir.recipe.tables import Positive, Table, TrainTable
from tafkir.recipe.tasks import CurriculumConfig, PassRateConfig, Tasks

__all__ = [
    "Acceptance",
    "AdvantageKind",
    "DppoTv",
    "GeoRs",
    "IcePop",
    "KPop",
    "KlConfig",
    "KlEstimator",
    "Mis",
    "MonitorConfig",
    "NoAcceptance",
    "OverlongConfig",
    "PolicyLossTable",
    "PolicyTable",
    "Reduction",
    "RlvrConfig",
    "SeqTis",
    "SurrogateKind",
    "Tis",
]

SurrogateKind = Literal["ppo", "cispo", "gspo", "reinforce"]
Reduction = Literal["sequence_mean", "token_mean", "constant"]
AdvantageKind = Literal["grpo", "dr_grpo", "rloo", "reinforce++", "leave_one_out"]
KlEstimator = Literal["k1", "k2", "k3"]

_KIND = "How k, the probability ratio of training to sampling engine at equal weights, weights and drops tokens."


class NoAcceptance(Table):
    """Every token counts as it was sampled: plain GRPO."""

    kind: Literal["none"] = Field("none", description=_KIND)


class Tis(Table):
    """Truncated importance sampling: tokens weigh min(k, cap), none is dropped."""

    kind: Literal["tis"] = Field("tis", description=_KIND)
    cap: float = Field(2.0, gt=0, description="Largest weight (tis, seq_tis), or largest K that stays (mis).")


class SeqTis(Table):
    """Truncated importance sampling of completions: every token weighs min(K, cap), K the product of all its k."""

    kind: Literal["seq_tis"] = Field("seq_tis", description=_KIND)
    cap: float = Field(2.0, gt=0, description="Largest weight (tis, seq_tis), or largest K that stays (mis).")


class Mis(Table):
    """Masked importance sampling: tokens weigh K, and completions with K above the cap are dropped whole."""

    kind: Literal["mis"] = Field("mis", description=_KIND)
    cap: float = Field(3.0, gt=0, description="Largest weight (tis, seq_tis), or largest K that stays (mis).")


class IcePop(Table):
    """Tokens inside the band weigh k, those outside 0 (arXiv 2510.18855, equations 1-3); both ends are inside."""

    kind: Literal["icepop"] = Field("icepop", description=_KIND)
    alpha: float = Field(0.5, ge=0, description="Lower end of IcePop's band.")
    beta: float = Field(5.0, gt=0, description="Upper end of IcePop's band; Ring's authors saw 2 destabilise at once.")

    @model_validator(mode="after")
    def _check_band(self) -> Self:
        if self.alpha > self.beta:
            raise ValueError(f"the band is empty: alpha={self.alpha:g} is above beta={self.beta:g}")
        return self


class KPop(Table):
    """Tokens weigh k unless the two engines' Bernoulli distributions of them are further apart than phi."""

    kind: Literal["kpop"] = Field("kpop", description=_KIND)
    phi: float = Field(2.0, gt=0, description="Largest binary KL divergence, of both directions, that stays.")


class DppoTv(Table):
    """Tokens weigh k unless p_train - p_sampling leads further than delta in the advantage's direction (DPPO)."""

    kind: Literal["dppo_tv"] = Field("dppo_tv", description=_KIND)
    delta: float = Field(0.2, gt=0, le=1, description="Largest difference of probabilities that stays.")


class GeoRs(Table):
    """Tokens weigh k; completions whose geometric mean of k leaves the band are dropped whole."""

    kind: Literal["geo_rs"] = Field("geo_rs", description=_KIND)
    low: float = Field(0.99, ge=0, description="Lower end of the band of the geometric mean.")
    high: float = Field(1.01, gt=0, description="Upper end of the band of the geometric mean.")

    @model_validator(mode="after")
    def _check_band(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"the band is empty: low={self.low:g} is above high={self.high:g}")
        return self


def _acceptance_kind(value: Any) -> str:
    """A table without a `kind` is the default's."""
    kind = value.get("kind", "icepop") if isinstance(value, Mapping) else getattr(value, "kind", "icepop")
    return str(kind)


Acceptance = Annotated[
    Annotated[IcePop, Tag("icepop")]
    | Annotated[NoAcceptance, Tag("none")]
    | Annotated[Tis, Tag("tis")]
    | Annotated[SeqTis, Tag("seq_tis")]
    | Annotated[Mis, Tag("mis")]
    | Annotated[KPop, Tag("kpop")]
    | Annotated[DppoTv, Tag("dppo_tv")]
    | Annotated[GeoRs, Tag("geo_rs")],
    Discriminator(_acceptance_kind),
]
"""What `[rlvr.acceptance]` may hold, told apart by `kind`."""


class KlConfig(Table):
    """The penalty towards the stage's first policy."""

    coef: float = Field(0.0, ge=0, description="Weight of the penalty towards the stage's first policy; 0 is off.")
    estimator: KlEstimator = Field("k3", description="How a token's divergence is estimated from its log-probability.")
    masked_tokens: bool = Field(True, description="Penalise tokens that the acceptance region drops, too.")


class OverlongConfig(Table):
    """What completions at the length limit cost (DAPO, arXiv 2503.14476, section 3.4)."""

    buffer_tokens: int = Field(
        0, ge=0, description="Tokens before the limit over which the reward falls linearly; 0 is off."
    )
    penalty: float = Field(1.0, ge=0, description="What a completion at the limit loses.")
    drop_truncated: bool = Field(False, description="Learn nothing from completions that the limit cut off.")


class MonitorConfig(Table):
    """When the mismatch between sampling and training engine turns the light yellow or red, and what red does."""

    warn: float = Field(0.02, gt=0, description="Mean |Δ log p| (nats a token) above which the light is yellow.")
    stop: float = Field(0.05, gt=0, description="Mean |Δ log p| above which it is red: Ring's authors call a run lost.")
    min_ess: float = Field(0.3, ge=0, le=1, description="Effective sample size, as a share, below which it is yellow.")
    max_out_of_band: float = Field(
        0.01, ge=0, le=1, description="Share of tokens out of the band that turns it yellow."
    )
    low: float = Field(0.5, ge=0, description="Lower end of the band of k that the monitor counts by.")
    high: float = Field(5.0, gt=0, description="Upper end of that band.")
    on_red: Literal["warn", "stop", "protect"] = Field(
        "warn", description="At red: say so, stop after the step (resumable), or go on with monitor.protection."
    )
    protection: Acceptance = IcePop()
    dump_tokens: int = Field(
        20, ge=0, description="Tokens furthest apart that a step with any out of the band leaves in mismatch.jsonl."
    )

    @model_validator(mode="after")
    def _check_lights(self) -> Self:
        if self.warn > self.stop:
            raise ValueError(f"warn={self.warn:g} is above stop={self.stop:g}")
        if self.low > self.high:
            raise ValueError(f"low={self.low:g} is above high={self.high:g}")
        return self


class PolicyLossTable(Table):
    """What the policy loss is made of."""

    surrogate: SurrogateKind = Field("ppo", description="What is maximised: clipped PPO, CISPO, GSPO or REINFORCE.")
    clip_eps_low: float = Field(0.2, ge=0, description="Clip of the policy's ratio below one (GSPO: about 3e-4).")
    clip_eps_high: float = Field(0.2, ge=0, description="Clip above one (DAPO: 0.28; GSPO: about 4e-4; CISPO: 4).")
    dual_clip: float | None = Field(
        None, gt=1, description="PPO: largest ratio that a negative advantage is multiplied by; not set, there is none."
    )
    acceptance: Acceptance = IcePop()
    kl: KlConfig = KlConfig()
    reduction: Reduction = Field(
        "sequence_mean",
        description="Mean over a completion's tokens, then over completions; over all tokens; or, constant, the sum "
        "over completions times max_completion_tokens (Dr. GRPO).",
    )
    max_completion_tokens: Positive = Field(96, description="Length limit of a rollout.")


class PolicyTable(PolicyLossTable, TrainTable):
    """What stages that learn from rollouts have in common."""

    prompts_per_step: Positive = Field(32, description="Problems per step.")
    group_size: int = Field(8, ge=2, description="Completions per problem.")
    updates_per_rollout: Positive = Field(1, description="Optimiser steps on each batch of rollouts.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the rollouts.")
    advantage: AdvantageKind = Field(
        "grpo", description="How rewards become advantages: within the group, or over the whole step (reinforce++)."
    )
    drop_zero_variance: bool = Field(True, description="Leave out groups whose rewards are all equal.")
    rollout: RolloutConfig = RolloutConfig()
    engine: RolloutEngine = InProcessEngine()
    long_tail: LongTailConfig = LongTailConfig()
    keep_rollouts: KeepRollouts = Field(
        "256 MB", description="Newest rollouts that stay on disk: all, none, or such as 50 steps, 256 MB."
    )
    max_resamples: int = Field(
        0, ge=0, description="How often a step draws new problems in place of groups that are left out (DAPO)."
    )
    overlong: OverlongConfig = OverlongConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="after")
    def _check_policy(self) -> Self:
        if self.overlong.buffer_tokens > self.max_completion_tokens:
            raise ValueError("overlong.buffer_tokens is longer than max_completion_tokens")
        if self.monitor.on_red == "protect" and self.monitor.protection == self.acceptance:
            raise ValueError("monitor.on_red = protect changes nothing: monitor.protection is what acceptance is")
        return self


class RlvrConfig(PolicyTable):
    """Reinforcement learning on problems with a checkable answer; the defaults are GRPO with IcePop."""

    max_steps: int = Field(
        0, ge=0, description="Only problems whose solution has at most this many steps; 0 takes all."
    )
    story_share: float = Field(0.0, ge=0, le=1, description="Share of the problems that are made up.")
    tasks: Tasks = Field((), description="Kinds of problems in the mixture; none means the word problems alone.")
    curriculum: CurriculumConfig | None = None
    pass_rate: PassRateConfig | None = None
    reward_file: str | None = Field(
        None, description="Python file with a function reward(example, text) -> float in place of the tasks' rewards."
    )
    reward_timeout_s: float = Field(5.0, gt=0, description="How long one call of that function may take.")
