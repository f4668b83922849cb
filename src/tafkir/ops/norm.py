"""RMSNorm with a hand-written backward, beside its reference.

Shapes: ... any leading dims, D normalised width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["rms_norm", "rms_norm_reference"]


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) as Ling 2.0 computes it: statistics in float32, cast back, then the weight."""
    x_fp32 = x.float()
    x_fp32 = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * x_fp32.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd = rstd.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, rstd)
        out: Tensor = (x * rstd).mul_(weight_D)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D, rstd = ctx.saved_tensors
        width = x.shape[-1]
        x_hat = x * rstd
        grad_x_hat = grad * x_hat
        grad_weight = grad_x_hat.reshape(-1, width).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        # dx = rstd * (w g - x_hat * mean(w g x_hat))
        mean = (grad_x_hat @ weight_D).unsqueeze(-1).div_(width)
        grad_x = (grad * weight_D).sub_(x_hat.mul_(mean)).mul_(rstd)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim; the same numbers as `rms_norm_reference`, with fewer passes in float32.

    Args:
        x: [..., D], any floating dtype.
        weight_D: [D], same dtype as x.
        eps: added to the mean square.
    """
    if x.dtype != torch.float32:
        return rms_norm_reference(x, weight_D, eps)
    return cast(Tensor, _RMSNorm.apply(x, weight_D, eps))  # type: ignore[no-untyped-call]
