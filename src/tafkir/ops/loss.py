"""Next-token log-probabilities and cross entropy; the head runs only where there is a label, a chunk at a time.

Shapes: N tokens, M labelled tokens, D hidden, V vocab.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "IGNORE_INDEX",
    "linear_logprobs",
    "linear_logprobs_reference",
    "next_token_loss",
    "next_token_loss_reference",
    "token_logprobs",
]

IGNORE_INDEX = -100
CHUNK_TOKENS = 512


def token_logprobs(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Natural log of each target's probability, [N] float32, differentiable in the logits."""
    logits_NV = logits_NV.float()
    picked_N = logits_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1)
    return picked_N - logits_NV.logsumexp(1)


def linear_logprobs_reference(
    hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor, temperature: float = 1.0
) -> Tensor:
    """`token_logprobs` of the head's logits divided by the temperature, all logits at once."""
    return token_logprobs(F.linear(hidden_MD, head_VD).float() / temperature, targets_M)


def _softmax_grad_(logits_CV: Tensor, lse_C: Tensor, targets_C: Tensor) -> Tensor:
    """Turn logits into d logsumexp - d target logit = softmax - onehot, in place."""
    probs_CV = logits_CV.sub_(lse_C.unsqueeze(1)).exp_()
    rows = torch.arange(len(targets_C), device=targets_C.device)
    probs_CV[rows, targets_C] -= 1.0
    return probs_CV


class _LinearLogprobs(torch.autograd.Function):
    """Logits live one chunk at a time, in the forward and (made again) in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor, temperature: float) -> Tensor:
        lse_M = hidden_MD.new_empty(len(targets_M), dtype=torch.float32)
        out_M = torch.empty_like(lse_M)
        for start in range(0, len(targets_M), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits_CV = F.linear(hidden_MD[part], head_VD).float() / temperature
            lse_M[part] = logits_CV.logsumexp(1)
            out_M[part] = logits_CV.gather(1, targets_M[part].unsqueeze(1)).squeeze(1) - lse_M[part]
        ctx.temperature = temperature
        ctx.save_for_backward(hidden_MD, head_VD, targets_M, lse_M)
        return out_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_MD, head_VD, targets_M, lse_M = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_MD)
        grad_head = torch.zeros_like(head_VD) if ctx.needs_input_grad[1] else None
        scale_M = grad_M.div(-ctx.temperature).to(torch.float32)
        for start in range(0, len(targets_M), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits_CV = F.linear(hidden_MD[part], head_VD).float() / ctx.temperature
            grad_CV = _softmax_grad_(logits_CV, lse_M[part], targets_M[part])
            grad_CV = grad_CV.mul_(scale_M[part].unsqueeze(1)).to(head_VD.dtype)
            torch.mm(grad_CV, head_VD, out=grad_hidden[part])
            if grad_head is not None:
                grad_head.addmm_(grad_CV.t(), hidden_MD[part])
        return grad_hidden, grad_head, None, None


def linear_logprobs(hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of targets under the head, without holding all logits; [M] float32, differentiable.

    The same numbers and gradients as `linear_logprobs_reference`.
    """
    return cast(Tensor, _LinearLogprobs.apply(hidden_MD, head_VD, targets_M, temperature))  # type: ignore[no-untyped-call]


def next_token_loss_reference(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cross entropy of the labelled positions, all logits at once."""
    return F.cross_entropy(F.linear(hidden_ND, head_VD).float(), labels_N, ignore_index=IGNORE_INDEX, reduction="sum")


class _NextTokenLoss(torch.autograd.Function):
    """The gradient of a summed loss is known in the forward, so each chunk's logits are made once and dropped."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> Tensor:
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden_MD) if needs_grad else None
        grad_head = torch.zeros_like(head_VD) if needs_grad else None
        loss = hidden_MD.new_zeros((), dtype=torch.float64)
        for start in range(0, len(targets_M), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits_CV = F.linear(hidden_MD[part], head_VD).float()
            lse_C = logits_CV.logsumexp(1)
            loss += (lse_C - logits_CV.gather(1, targets_M[part].unsqueeze(1)).squeeze(1)).sum(dtype=torch.float64)
            if grad_hidden is not None and grad_head is not None:
                grad_CV = _softmax_grad_(logits_CV, lse_C, targets_M[part]).to(head_VD.dtype)
                torch.mm(grad_CV, head_VD, out=grad_hidden[part])
                grad_head.addmm_(grad_CV.t(), hidden_MD[part])
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_head)
        return loss.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad, grad_head * grad, None


def next_token_loss(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cross entropy of the labelled positions; divide by their number for the mean.

    The sum, not the mean, so that micro-batches add up to the whole batch's loss.

    Args:
        hidden_ND: final hidden states.
        head_VD: the output head's weight.
        labels_N: int64; `labels_N[i]` is the token that follows token i, or IGNORE_INDEX for no label.

    Returns:
        A float32 scalar; zero (still differentiable) when nothing is labelled.
    """
    selected_M = (labels_N != IGNORE_INDEX).nonzero().squeeze(1)
    if len(selected_M) < len(labels_N):
        hidden_ND, labels_N = hidden_ND.index_select(0, selected_M), labels_N.index_select(0, selected_M)
    return cast(Tensor, _NextTokenLoss.apply(hidden_ND, head_VD, labels_N))  # type: ignore[no-untyped-call]
