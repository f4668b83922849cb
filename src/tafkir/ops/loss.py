"""Next-token log-probabilities and cross entropy; the head runs only where there is a label, a chunk at a time.

Shapes: N tokens, M labelled tokens, D hidden, V vocab.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tafkir.ops import native

__all__ = [
    "CHUNK_TOKENS",
    "IGNORE_INDEX",
    "distillation_loss",
    "distillation_loss_reference",
    "linear_logprobs",
    "linear_logprobs_reference",
    "next_token_loss",
    "next_token_loss_reference",
    "token_logprobs",
]

IGNORE_INDEX = -100
# Small enough for a chunk's logits to stay in the cache between the steps that touch them.
CHUNK_TOKENS = 128


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


def _head_logprobs(hidden_CD: Tensor, head_VD: Tensor, temperature: float = 1.0) -> Tensor:
    logits_CV = F.linear(hidden_CD, head_VD).float()
    if temperature != 1.0:
        logits_CV.div_(temperature)
    return torch.log_softmax(logits_CV, -1)


def _nll_and_grad(hidden_CD: Tensor, head_VD: Tensor, targets_C: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    """Each target's log-probability [C], and d(-their sum) / d logits [C, V] where it is asked for."""
    if native.takes(hidden_CD, head_VD):
        logits_CV = F.linear(hidden_CD, head_VD)
        # The gather also raises for a target that is not in the vocabulary.
        logprobs_C = logits_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1)
        sizes = (*logits_CV.shape, int(with_grad))
        native.call("tafkir_softmax_minus_onehot", logits_CV, targets_C.contiguous(), *sizes, logprobs_C)
        return logprobs_C, logits_CV
    logprobs_CV = _head_logprobs(hidden_CD, head_VD)
    logprobs_C = logprobs_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1)
    return logprobs_C, _softmax_minus_onehot_(logprobs_CV, targets_C) if with_grad else logprobs_CV


def _softmax_minus_onehot_(logprobs_CV: Tensor, targets_C: Tensor) -> Tensor:
    """d(-logprob of the target) / d logits, in place of the log-probabilities."""
    targets_C1 = targets_C.unsqueeze(1)
    minus_one = torch.full(targets_C1.shape, -1.0, device=targets_C.device)
    return logprobs_CV.exp_().scatter_add_(1, targets_C1, minus_one)


class _LinearLogprobs(torch.autograd.Function):
    """Logits live one chunk at a time, in the forward and (made again) in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor, temperature: float) -> Tensor:
        out_M = hidden_MD.new_empty(len(targets_M), dtype=torch.float32)
        parts = (torch.split(part, CHUNK_TOKENS) for part in (hidden_MD, targets_M, out_M))
        for hidden_CD, targets_C, out_C in zip(*parts, strict=True):
            logprobs_CV = _head_logprobs(hidden_CD, head_VD, temperature)
            out_C.copy_(logprobs_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1))
        ctx.temperature = temperature
        ctx.save_for_backward(hidden_MD, head_VD, targets_M)
        return out_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_MD, head_VD, targets_M = ctx.saved_tensors
        grad_hidden, grad_head = torch.empty_like(hidden_MD), torch.zeros_like(head_VD)
        scale_M1 = grad_M.unsqueeze(1).div(-ctx.temperature)
        parts = (torch.split(part, CHUNK_TOKENS) for part in (hidden_MD, targets_M, scale_M1, grad_hidden))
        for hidden_CD, targets_C, scale_C1, grad_CD in zip(*parts, strict=True):
            logprobs_CV = _head_logprobs(hidden_CD, head_VD, ctx.temperature)
            grad_CV = _softmax_minus_onehot_(logprobs_CV, targets_C).mul_(scale_C1).to(head_VD.dtype)
            torch.mm(grad_CV, head_VD, out=grad_CD)
            grad_head.addmm_(grad_CV.t(), hidden_CD)
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
    def forward(ctx: Any, hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor, with_grad: bool) -> Tensor:
        grad_hidden = torch.empty_like(hidden_MD)
        grad_head = torch.zeros_like(head_VD)
        total = torch.zeros((), dtype=torch.float64, device=hidden_MD.device)
        parts = (torch.split(part, CHUNK_TOKENS) for part in (hidden_MD, targets_M, grad_hidden))
        for hidden_CD, targets_C, grad_CD in zip(*parts, strict=True):
            logprobs_C, grad_CV = _nll_and_grad(hidden_CD, head_VD, targets_C, with_grad)
            total -= logprobs_C.sum(dtype=torch.float64)
            if with_grad:
                grad_CV = grad_CV.to(head_VD.dtype)
                torch.mm(grad_CV, head_VD, out=grad_CD)
                grad_head.addmm_(grad_CV.t(), hidden_CD)
        ctx.save_for_backward(grad_hidden, grad_head)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad, grad_head * grad, None, None


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
    return cast(Tensor, _NextTokenLoss.apply(hidden_ND, head_VD, labels_N, torch.is_grad_enabled()))  # type: ignore[no-untyped-call]


def distillation_loss_reference(hidden_MD: Tensor, teacher_MD: Tensor, head_VD: Tensor) -> Tensor:
    """Summed KL divergence of the student's token distributions from the teacher's, all logits at once."""
    student_MV = torch.log_softmax(F.linear(hidden_MD, head_VD.detach()).float(), -1)
    teacher_MV = torch.log_softmax(F.linear(teacher_MD, head_VD).float(), -1).detach()
    return F.kl_div(student_MV, teacher_MV, reduction="sum", log_target=True)


class _DistillationLoss(torch.autograd.Function):
    """As in `_NextTokenLoss`, each chunk's logits live only while its loss and gradient are computed."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, teacher_MD: Tensor, head_VD: Tensor) -> Tensor:
        grad_hidden = torch.empty_like(hidden_MD)
        total = torch.zeros((), dtype=torch.float64, device=hidden_MD.device)
        parts = (torch.split(part, CHUNK_TOKENS) for part in (hidden_MD, teacher_MD, grad_hidden))
        for hidden_CD, teacher_CD, grad_CD in zip(*parts, strict=True):
            student_CV, teacher_CV = _head_logprobs(hidden_CD, head_VD), _head_logprobs(teacher_CD, head_VD)
            wanted_CV = teacher_CV.exp()
            total += (wanted_CV * (teacher_CV - student_CV)).sum(dtype=torch.float64)
            torch.mm(student_CV.exp_().sub_(wanted_CV).to(head_VD.dtype), head_VD, out=grad_CD)
        ctx.save_for_backward(grad_hidden)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grad, None, None


def distillation_loss(hidden_MD: Tensor, teacher_MD: Tensor, head_VD: Tensor) -> Tensor:
    """Summed KL(teacher || student) of the token distributions that both hidden states have under one head.

    Only `hidden_MD` gets a gradient: teacher and head are held fixed.

    Returns:
        A float32 scalar, 0 where both agree.
    """
    return cast(Tensor, _DistillationLoss.apply(hidden_MD, teacher_MD, head_VD))  # type: ignore[no-untyped-call]
