"""Rollout Routing Replay (arXiv 2510.11370): the experts that rollouts went to, laid out for a training forward.

Shapes: N input tokens, L MoE layers, A active experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from tafkir.errors import TrainingError
from tafkir.train.rollout import RolloutGroup

__all__ = ["ExpertAgreement", "compare_experts", "recorded_experts"]


def recorded_experts(groups: Sequence[RolloutGroup]) -> list[Tensor]:
    """The experts of every input token in the shared-prompt layout, int64 [N, A] for each MoE layer.

    A prompt's tokens take the record of its group's first completion that has one. Tokens without a record get a row
    of -1 and choose for themselves.

    Returns:
        One tensor per layer; none where no completion has a record.

    Raises:
        TrainingError: a record does not have one row for each token that was fed.
    """
    records = [r.completion.expert_ids for group in groups for r in group.rollouts]
    known = next((ids for ids in records if ids is not None), None)
    if known is None:
        return []
    nothing = torch.full_like(known[:1], -1)
    parts: list[Tensor] = []
    for group in groups:
        prompt = len(group.prompt_ids)
        own = [_checked(r.completion.expert_ids, prompt + len(r.completion.token_ids) - 1) for r in group.rollouts]
        first = next((ids for ids in own if ids is not None), None)
        parts.append(nothing.expand(prompt, -1, -1) if first is None else first[:prompt])
        for ids, rollout in zip(own, group.rollouts, strict=True):
            num_fed = len(rollout.completion.token_ids) - 1
            parts.append(nothing.expand(num_fed, -1, -1) if ids is None else ids[prompt:])
    return list(torch.cat(parts).long().unbind(1))


def _checked(ids: Tensor | None, length: int) -> Tensor | None:
    if ids is not None and len(ids) != length:
        raise TrainingError(
            f"a completion records the experts of {len(ids)} tokens", expected=f"{length} that were fed"
        )
    return ids


@dataclass(frozen=True, slots=True)
class ExpertAgreement:
    """How often training and rollouts sent a token to the same experts; sums over micro-batches add up.

    Attributes:
        shared: experts in common, over all choices.
        choices: experts chosen by either.
        same_tokens: by layer, tokens whose experts are all the same.
        tokens: tokens with a record.
    """

    shared: int = 0
    choices: int = 0
    same_tokens: tuple[int, ...] = ()
    tokens: int = 0

    def __add__(self, other: ExpertAgreement) -> ExpertAgreement:
        layers = zip_longest(self.same_tokens, other.same_tokens, fillvalue=0)
        return ExpertAgreement(
            self.shared + other.shared,
            self.choices + other.choices,
            tuple(a + b for a, b in layers),
            self.tokens + other.tokens,
        )

    def metrics(self) -> dict[str, float]:
        """`mismatch/expert_agreement`, the share of experts in common; nothing without a record.

        `mismatch/same_experts/<layer>` is the share of tokens whose experts are all the same (arXiv 2510.11370).
        """
        if not self.tokens:
            return {}
        by_layer = {f"mismatch/same_experts/{i}": same / self.tokens for i, same in enumerate(self.same_tokens)}
        return {"mismatch/expert_agreement": self.shared / self.choices, **by_layer}


def compare_experts(chosen: Sequence[Tensor], recorded: Sequence[Tensor]) -> ExpertAgreement:
    """Compare what training took with the record, int64 [N, A] for each layer; rows of -1 are left out."""
    if not recorded:
        return ExpertAgreement()
    known_N = recorded[0][:, 0] >= 0
    shared, same_tokens = 0, []
    for own_NA, recorded_NA in zip(chosen, recorded, strict=True):
        common_NA = (own_NA[known_N, :, None] == recorded_NA[known_N, None, :]).any(-1)
        shared += int(common_NA.sum())
        same_tokens.append(int(common_NA.all(1).sum()))
    num_tokens = int(known_N.sum())
    choices = num_tokens * recorded[0].shape[1] * len(recorded)
    return ExpertAgreement(shared, choices, tuple(same_tokens), num_tokens)
