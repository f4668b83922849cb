"""Cross entropy of the stable-max, which replaces the exponential of the softmax by a piecewise rational function.

s(v) = v + 1 for v >= 0 and 1 / (1 - v) below; p_i = s(v_i) / sum_j s(v_j) (arXiv 2501.04697).

Shapes: ... any leading dims, V symbols.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["IGNORE_INDEX", "stable_max_log_probs", "stable_max_loss", "stable_max_loss_reference"]

IGNORE_INDEX = -100


def _numerators(logits: Tensor) -> Tensor:
    """s(v), with the branch that is not taken kept away from its pole."""
    return torch.where(logits < 0, 1 / (1 - logits.clamp(max=0)), logits + 1)


def stable_max_log_probs(logits: Tensor) -> Tensor:
    """log p of every symbol, float32 [..., V]; differentiable."""
    numerators = _numerators(logits.float())
    return numerators.log() - numerators.sum(-1, keepdim=True).log()


def stable_max_loss_reference(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of every label in float64; 0 where the label is IGNORE_INDEX."""
    numerators = _numerators(logits.double())
    logprobs = torch.log(numerators / numerators.sum(-1, keepdim=True))
    known = labels != IGNORE_INDEX
    picked = logprobs.gather(-1, labels.where(known, 0).unsqueeze(-1)).squeeze(-1)
    return -picked.where(known, 0.0)


class _StableMaxLoss(torch.autograd.Function):
    """Keeps s(v), their sum and the labels: ds/dv is 1 for v >= 0 and s^2 below, both functions of s alone."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        numerators = _numerators(logits.float())
        total = numerators.sum(-1, keepdim=True)
        known = (labels != IGNORE_INDEX).unsqueeze(-1)
        index = labels.unsqueeze(-1).where(known, 0)
        picked = numerators.gather(-1, index)
        ctx.save_for_backward(numerators, total, index, known)
        ctx.dtype = logits.dtype
        loss: Tensor = (total.log() - picked.log()).where(known, 0.0).squeeze(-1)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        numerators, total, index, known = ctx.saved_tensors
        slope = numerators.square().clamp(max=1.0)  # s <= 1 exactly where v <= 0
        weight = grad.unsqueeze(-1).where(known, 0.0)
        out = slope * (weight / total)
        out.scatter_add_(-1, index, -weight * slope.gather(-1, index) / numerators.gather(-1, index))
        return out.to(ctx.dtype), None


def stable_max_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The same in float32, which not every device has twice as wide.

    Args:
        logits: [..., V], any floating dtype.
        labels: int64 [...]; IGNORE_INDEX for none.

    Returns:
        float32 [...]; differentiable.
    """
    return cast(Tensor, _StableMaxLoss.apply(logits, labels))  # type: ignore[no-untyped-call]
