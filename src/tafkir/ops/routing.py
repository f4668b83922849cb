"""Choosing each token's experts from its scores, within the best groups.

Shapes: N tokens, E experts, A active experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tafkir.ops import native

__all__ = ["choose_experts", "choose_experts_reference", "count_tokens"]


def choose_experts_reference(
    scores_NE: Tensor, bias_E: Tensor | None, n_group: int, topk_group: int, active: int
) -> Tensor:
    """The best `active` of the biased scores in the best groups, group by group by `topk`."""
    biased_NE = scores_NE if bias_E is None else scores_NE + bias_E
    if topk_group < n_group:
        grouped = biased_NE.view(len(biased_NE), n_group, -1)
        group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        chosen = group_scores.topk(topk_group, dim=-1, sorted=False).indices
        closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, chosen, False)
        biased_NE = grouped.masked_fill(closed.unsqueeze(-1), -torch.inf).view_as(biased_NE)
    return biased_NE.topk(active, dim=-1).indices


@torch.no_grad()
def choose_experts(scores_NE: Tensor, bias_E: Tensor | None, n_group: int, topk_group: int, active: int) -> Tensor:
    """The same as `choose_experts_reference`; where scores are equal, the kernel takes the lower index.

    A group's score is the sum of its two best biased scores (arXiv 2412.19437, section 2.1.2; Ling 2.0 alike).

    Args:
        scores_NE: float32, without the bias.
        bias_E: float32, or None where the family has none.
        n_group: groups of neighbouring experts, all of one size.
        topk_group: groups that stay eligible.
        active: experts to choose.

    Returns:
        int64 [N, A], best first.
    """
    num_tokens, num_experts = scores_NE.shape
    tensors = (scores_NE,) if bias_E is None else (scores_NE, bias_E)
    if native.takes(*tensors) and active <= topk_group * (num_experts // n_group):
        expert_ids_NA = torch.empty(num_tokens, active, dtype=torch.long)
        sizes = (num_tokens, num_experts, n_group, topk_group, active)
        bias = 0 if bias_E is None else bias_E.contiguous()
        # Where a score is not finite, torch says what comes first.
        if not native.call("tafkir_choose_experts", scores_NE.contiguous(), bias, *sizes, expert_ids_NA):
            return expert_ids_NA
    return choose_experts_reference(scores_NE, bias_E, n_group, topk_group, active)


def count_tokens(expert_ids_NA: Tensor, num_experts: int) -> Tensor:
    """Tokens that each expert got, int64 [E]."""
    flat_P = expert_ids_NA.reshape(-1)
    if flat_P.device.type == "cpu":
        return torch.bincount(flat_P, minlength=num_experts)
    # There a bincount waits for the device to say how long its answer is, and cannot be captured.
    return flat_P.new_zeros(num_experts).scatter_add_(0, flat_P, torch.ones_like(flat_P))
