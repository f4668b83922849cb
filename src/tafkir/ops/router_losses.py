"""Losses that keep routers healthy: the sequence-wise balance loss and the z-loss, each beside a loop over tokens.

Shapes: N tokens, E experts, A active experts per token, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "router_z_loss",
    "router_z_loss_reference",
    "sequence_balance_loss",
    "sequence_balance_loss_reference",
]


def sequence_balance_loss_reference(scores_NE: Tensor, top_k: int, cu_seqlens: Sequence[int]) -> Tensor:
    """`sequence_balance_loss`, sequence by sequence and token by token, in the letters of the paper."""
    num_experts = scores_NE.shape[1]
    total = scores_NE.new_zeros(())
    for start, end in pairwise(cu_seqlens):
        length = end - start
        f = [0.0] * num_experts
        p = [scores_NE.new_zeros(()) for _ in range(num_experts)]
        for t in range(start, end):
            for i in scores_NE[t].topk(top_k).indices.tolist():
                f[i] += num_experts / (top_k * length)
            for i in range(num_experts):
                p[i] = p[i] + scores_NE[t, i] / scores_NE[t].sum() / length
        for i in range(num_experts):
            total = total + f[i] * p[i]
    return total


def sequence_balance_loss(scores_NE: Tensor, top_k: int, cu_seqlens: Sequence[int]) -> Tensor:
    """Sum over sequences of sum_i f_i P_i (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20), without the factor.

    f_i = E / (A T) times the number of the sequence's T tokens that have expert i among their A best unbiased
    scores (no gradient); P_i = the mean over its tokens of s_i / sum_j s_j. One when all experts share alike.

    Args:
        scores_NE: the router's scores before the bias, positive (sigmoid or softmax), float.
        top_k: A.
        cu_seqlens: bounds of the sequences in the flat batch, S + 1 numbers from 0 to N; none is empty.

    Returns:
        A scalar in the scores' dtype; divide by the number of sequences for the mean.
    """
    num_experts = scores_NE.shape[1]
    bounds = torch.tensor(cu_seqlens, device=scores_NE.device)
    lengths_S = bounds.diff()
    sequence_N = torch.repeat_interleave(torch.arange(len(lengths_S), device=scores_NE.device), lengths_S)
    share_NE = scores_NE / scores_NE.sum(1, keepdim=True)
    share_SE = scores_NE.new_zeros(len(lengths_S), num_experts).index_add(0, sequence_N, share_NE)
    with torch.no_grad():
        best_NA = scores_NE.topk(top_k, dim=1).indices
        slot_NA = sequence_N.unsqueeze(1) * num_experts + best_NA
        count_SE = torch.bincount(slot_NA.reshape(-1), minlength=share_SE.numel()).view_as(share_SE).to(share_SE)
        # f and P both divide by the sequence's length.
        factor_SE = count_SE * (num_experts / top_k) / lengths_S.unsqueeze(1).square()
    return (share_SE * factor_SE).sum()


def router_z_loss_reference(logits_NE: Tensor) -> Tensor:
    """`router_z_loss`, token by token."""
    total = logits_NE.new_zeros(())
    for row in logits_NE:
        total = total + row.exp().sum().log() ** 2
    return total


def router_z_loss(logits_NE: Tensor) -> Tensor:
    """Sum over tokens of (log sum_j exp x_j)^2 (ST-MoE, arXiv 2202.08906), without the factor.

    Args:
        logits_NE: the router's outputs before sigmoid or softmax, float32.

    Returns:
        A scalar; divide by the number of tokens for the mean.
    """
    return torch.logsumexp(logits_NE, dim=-1).square().sum()
