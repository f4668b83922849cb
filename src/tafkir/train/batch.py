"""From rollouts to tensors: the flat batch that the policy loss reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tafkir.models.shared_prompt import SharedPromptCausal
from tafkir.train.replay import recorded_experts
from tafkir.train.rollout import RolloutGroup

__all__ = ["RlBatch", "build_rl_batch"]


@dataclass(frozen=True, slots=True)
class RlBatch:
    """Groups in the shared-prompt layout. N input tokens; T sampled tokens of S completions.

    `source_T[t]` is the input position whose hidden state predicts sampled token t. `expert_ids` is what the rollouts'
    tokens went to, int64 [N, A] for each MoE layer, or nothing where they do not say.
    """

    input_ids_N: Tensor
    positions_N: Tensor
    attention: SharedPromptCausal
    source_T: Tensor
    targets_T: Tensor
    sampling_logprobs_T: Tensor
    advantages_T: Tensor
    sequence_T: Tensor
    lengths_S: Tensor
    expert_ids: Sequence[Tensor] = ()


def build_rl_batch(groups: Sequence[RolloutGroup], advantages: Sequence[Sequence[float]]) -> RlBatch:
    """Lay out groups so that each prompt stands once, before its completions.

    Args:
        groups: rollouts of each prompt.
        advantages: one advantage per completion of each group.
    """
    input_ids: list[int] = []
    positions: list[int] = []
    source: list[int] = []
    targets: list[int] = []
    logprobs: list[float] = []
    token_advantages: list[float] = []
    sequence: list[int] = []
    lengths: list[int] = []
    for group, group_advantages in zip(groups, advantages, strict=True):
        prompt = len(group.prompt_ids)
        input_ids.extend(group.prompt_ids)
        positions.extend(range(prompt))
        last_prompt = len(input_ids) - 1
        for rollout, advantage in zip(group.rollouts, group_advantages, strict=True):
            tokens = rollout.completion.token_ids
            start = len(input_ids)
            # The last token predicts nothing; the first is predicted by the prompt's last position.
            input_ids.extend(tokens[:-1])
            positions.extend(range(prompt, prompt + len(tokens) - 1))
            # A completion without a token has no loss; it counts in the mean over completions.
            source.extend([last_prompt, *range(start, start + len(tokens) - 1)][: len(tokens)])
            targets.extend(tokens)
            logprobs.extend(rollout.completion.logprobs)
            token_advantages.extend([advantage] * len(tokens))
            sequence.extend([len(lengths)] * len(tokens))
            lengths.append(len(tokens))
    return RlBatch(
        input_ids_N=torch.tensor(input_ids),
        positions_N=torch.tensor(positions),
        attention=SharedPromptCausal(
            [len(group.prompt_ids) for group in groups],
            [[max(0, len(rollout.completion.token_ids) - 1) for rollout in group.rollouts] for group in groups],
        ),
        source_T=torch.tensor(source),
        targets_T=torch.tensor(targets),
        sampling_logprobs_T=torch.tensor(logprobs),
        advantages_T=torch.tensor(token_advantages),
        sequence_T=torch.tensor(sequence),
        lengths_S=torch.tensor(lengths),
        expert_ids=recorded_experts(groups),
    )
