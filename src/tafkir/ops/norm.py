"""RMSNorm with a hand-written backward, beside its reference.

Shapes: ... any leading dims, D normalised width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tafkir.ops import native

__all__ = ["inverse_rms", "rms_norm", "rms_norm_backward", "rms_norm_reference"]


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) as Ling 2.0 computes it: statistics in float32, cast back, then the weight."""
    x_fp32 = x.float()
    x_fp32 = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * x_fp32.to(x.dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dim, which is kept."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm_backward(grad: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor, out: Tensor) -> Tensor:
    """Write dx into `out` and return dw, with dx = rstd (w g - x_hat mean(w g x_hat)) and x_hat = rstd x."""
    width = x.shape[-1]
    x_hat = x * rstd
    product = grad * x_hat
    mean = torch.mv(product.view(-1, width), weight_D).div_(width).view(rstd.shape)
    torch.mul((grad * weight_D).addcmul_(x_hat, mean, value=-1.0), rstd, out=out)
    return product.view(-1, width).sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        rstd = inverse_rms(x, eps)
        ctx.save_for_backward(x, weight_D, rstd)
        out: Tensor = (x * rstd).mul_(weight_D)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, rstd = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight = rms_norm_backward(grad.contiguous(), x, weight_D, rstd, grad_x)
        return grad_x, grad_weight, None


class _NativeRMSNorm(torch.autograd.Function):
    """The same in one pass each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out, rstd, width = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1), x.shape[-1]
        native.call("tafkir_rms_norm", x, weight_D, eps, x.numel() // width, width, out, rstd)
        ctx.save_for_backward(x, weight_D, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, rstd = ctx.saved_tensors
        grad, width = grad.contiguous(), x.shape[-1]
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight_D)
        rows = x.numel() // width
        native.call("tafkir_rms_norm_backward", grad, x, weight_D, rstd, rows, width, grad_x, grad_weight)
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
    function = _NativeRMSNorm if native.takes(x, weight_D) else _RMSNorm
    return cast(Tensor, function.apply(x.contiguous(), weight_D.contiguous(), eps))  # type: ignore[no-untyped-call]
