"""Laboratories as tables of the recipe: `[lab]`, told apart by `method`. Imports without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import product
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from tafkir.recipe.rl import Acceptance, IcePop, KPop, NoAcceptance, PolicyTable, Tis
from tafkir.recipe.rollout import RolloutConfig
from tafkir.recipe.tables import Positive, TrainTable

__all__ = [
    "LAB_LOSSES",
    "LabConfig",
    "LabLoss",
    "LabRollout",
    "MismatchLabConfig",
    "ResidualLabConfig",
    "lab_variant_name",
]

_METHOD = "What the variants differ in: their residual, or how their rollouts and losses deal with mismatch."
LabRollout = Literal["float32", "bfloat16", "fp8", "nvfp4", "nvfp4_w4a4", "noise"]
LabLoss = Literal["grpo", "tis", "icepop", "icepop_narrow", "kpop"]

LAB_LOSSES: Mapping[LabLoss, Acceptance] = {
    "grpo": NoAcceptance(),
    "tis": Tis(),
    "icepop": IcePop(alpha=0.5, beta=5.0),
    "icepop_narrow": IcePop(alpha=0.5, beta=2.0),
    "kpop": KPop(),
}
"""The acceptance regions that the laboratory compares, by name."""


def lab_variant_name(rollout: LabRollout, loss: LabLoss, replay: bool, seed: int) -> str:
    """What a variant of the mismatch laboratory is called, such as `nvfp4-icepop-own-seed0`."""
    return f"{rollout}-{loss}-{'replay' if replay else 'own'}-seed{seed}"


class ResidualLabConfig(TrainTable):
    """Twins that differ in their residual alone, trained at growing depth on running text, byte by byte.

    Every combination of kind, depth and repeat is one variant; `model.num_hidden_layers` and `model.residual.kind` are
    theirs to set. A variant leaves its measurements and no weights.
    """

    method: Literal["residual"] = Field("residual", description=_METHOD)
    kinds: tuple[Literal["plain", "hc", "mhc"], ...] = Field(
        ("plain", "hc", "mhc"), min_length=1, description="Residual kinds to compare."
    )
    depths: tuple[Positive, ...] = Field((4, 8, 16, 32), min_length=1, description="Decoder blocks of the twins.")
    seeds: Positive = Field(1, description="Repeats, each with weights and a data order of its own.")
    text: str = Field("tinyshakespeare", description="Bundled text, or path of a UTF-8 file, its last tenth held out.")
    sequence_length: int = Field(128, ge=2, description="Bytes of a window.")
    batch_sequences: Positive = Field(4, description="Windows per optimiser step.")
    validation_sequences: Positive = Field(64, description="Held-out windows that the validation loss is taken on.")

    @model_validator(mode="after")
    def _check_lab(self) -> Self:
        for name in ("kinds", "depths"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names something twice")
        if self.ema or self.checkpoint_every or self.checkpoint_dtype != "float32":
            raise ValueError("a lab writes no checkpoint: leave out ema, checkpoint_every and checkpoint_dtype")
        return self


class MismatchLabConfig(PolicyTable):
    """The same small task trained on rollouts in several number formats, with several losses, with replay or without.

    Every combination of rollouts, loss, replay and repeat is one variant; `rollout` and `acceptance` are theirs to set.
    The task is to write a number's digits from the last to the first, after a supervised warm start that all variants
    of a repeat share. A variant leaves its measurements and no weights.
    """

    method: Literal["mismatch"] = Field("mismatch", description=_METHOD)
    rollouts: tuple[LabRollout, ...] = Field(
        get_args(LabRollout), min_length=1, description="Rollouts to compare: number formats, or noise on the weights."
    )
    noise: float = Field(0.1, gt=0, description="Std of the noise in the rollouts called noise, see rollout.noise.")
    losses: tuple[LabLoss, ...] = Field(
        get_args(LabLoss),
        min_length=1,
        description="Losses to compare: plain GRPO, TIS, IcePop in [0.5, 5] and [0.5, 2] (narrow), KPop.",
    )
    replay: tuple[bool, ...] = Field(
        (False, True), min_length=1, description="Without and with replayed experts, where rollouts are not exact."
    )
    skip: tuple[str, ...] = Field(
        (), description="Variants that are left out, by patterns of their names such as bfloat16-*-replay-*."
    )
    seeds: Positive = Field(3, description="Repeats, each with weights, problems and draws of its own.")
    digits: Positive = Field(8, description="Digits of the numbers to reverse.")
    warm_start_steps: Positive = Field(150, description="Supervised steps before reinforcement begins.")
    warm_start_learning_rate: float = Field(3e-3, gt=0, description="Peak learning rate of those steps.")
    warm_start_batch: Positive = Field(64, description="Problems of such a step.")

    @model_validator(mode="after")
    def _check_lab(self) -> Self:
        for name in ("rollouts", "losses", "replay"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names something twice")
        for name in ("rollout", "acceptance", "engine", "long_tail", "keep_rollouts"):
            if getattr(self, name) != MismatchLabConfig.model_fields[name].default:
                raise ValueError(f"{name} is not a lab's to choose: leave it out")
        if self.ema or self.checkpoint_every or self.checkpoint_dtype != "float32":
            raise ValueError("a lab writes no checkpoint: leave out ema, checkpoint_every and checkpoint_dtype")
        if self.kl.coef:
            raise ValueError("the lab compares losses without a reference policy: leave kl.coef at 0")
        if self.max_completion_tokens <= self.digits:
            raise ValueError("max_completion_tokens must leave room for the digits and the end of the turn")
        every = [lab_variant_name(*variant) for variant in self._combinations()]
        for pattern in self.skip:
            if not any(fnmatchcase(name, pattern) for name in every):
                raise ValueError(f"skip: {pattern!r} is the name of no variant, such as {every[0]!r}; leave it out")
        if not self.variants():
            raise ValueError("skip leaves no variant")
        return self

    def _combinations(self) -> Iterator[tuple[LabRollout, LabLoss, bool, int]]:
        for seed, rollout, replay in product(range(self.seeds), self.rollouts, sorted(self.replay)):
            if not replay or not self.rollout_of(rollout, replay=False).is_exact:
                yield from ((rollout, loss, replay, seed) for loss in self.losses)

    def variants(self) -> list[tuple[LabRollout, LabLoss, bool, int]]:
        """Rollouts, loss, replay and repeat of all variants, in their order; exact rollouts have nothing to replay."""
        return [
            variant
            for variant in self._combinations()
            if not any(fnmatchcase(lab_variant_name(*variant), pattern) for pattern in self.skip)
        ]

    def rollout_of(self, name: LabRollout, *, replay: bool) -> RolloutConfig:
        """The rollouts of a variant."""
        if name == "noise":
            return RolloutConfig(noise=self.noise, replay_experts=replay)
        return RolloutConfig(precision=name, replay_experts=replay)


def _method(value: Any) -> str:
    """A table without a `method` is the residual laboratory's."""
    method = value.get("method", "residual") if isinstance(value, Mapping) else getattr(value, "method", "residual")
    return str(method)


LabConfig = Annotated[
    Annotated[ResidualLabConfig, Tag("residual")] | Annotated[MismatchLabConfig, Tag("mismatch")],
    Discriminator(_method),
]
"""What `[lab]` may hold, told apart by `method`."""
