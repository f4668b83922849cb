"""Sinkhorn-Knopp: positive matrices to (nearly) doubly stochastic ones, a few iterations, beside its reference.

Shapes: ... any leading dims, n rows and columns, N tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tafkir.errors import TrainingError
from tafkir.ops import native

__all__ = ["NATIVE_STREAMS", "sinkhorn", "sinkhorn_reference"]

NATIVE_STREAMS = (2, 4)
"""Numbers of streams that the compiled kernels take."""


def sinkhorn_reference(logits: Tensor, iters: int) -> Tensor:
    """mHC's equation 9 (arXiv 2512.24880) word for word: M0 = exp(logits), then columns and rows, `iters` times.

    Overflows where exp does. Rows sum to one exactly, columns as well as the iterations got.
    """
    matrix = logits.exp()
    for _ in range(iters):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


def _first_iteration(logits_nnN: Tensor) -> tuple[Tensor, Tensor]:
    """log T_c(M0) and M1 = T_r(T_c(M0)), through logarithms: no finite input overflows, and no sum is ever zero.

    A column's own factor cancels in T_c, so softmax over the column is T_c(exp(logits)). In M1 each row and each
    column has an entry of at least 1 / n^2, and later iterations keep it so.
    """
    log_columns = torch.log_softmax(logits_nnN, dim=0)
    return log_columns, torch.softmax(log_columns, dim=1)


def _scalings(m1_nnN: Tensor, iters: int) -> tuple[list[Tensor], list[Tensor]]:
    """The vectors by which the iterations after the first one scale M1: columns [1, n, N] and rows [n, 1, N] of each.

    M_t = diag(rows_t) M1 diag(columns_t), so a step is two sums over M1 and touches no matrix of its own.
    """
    columns: list[Tensor] = []
    rows = [torch.ones_like(m1_nnN[:, :1])]
    for _ in range(iters - 1):
        columns.append((m1_nnN * rows[-1]).sum(0, keepdim=True).reciprocal_())
        rows.append((m1_nnN * columns[-1]).sum(1, keepdim=True).reciprocal_())
    return columns, rows


class _Sinkhorn(torch.autograd.Function):
    """Keeps the logits alone; the backward runs the iterations again (paper section 4.3.1)."""

    @staticmethod
    def forward(ctx: Any, logits_nnN: Tensor, iters: int) -> Tensor:
        ctx.iters = iters
        ctx.save_for_backward(logits_nnN)
        _, m1 = _first_iteration(logits_nnN)
        columns, rows = _scalings(m1, iters)
        return m1 * rows[-1] * columns[-1] if columns else m1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        log_columns, m1 = _first_iteration(logits)
        columns, rows = _scalings(m1, ctx.iters)
        grad_m1 = grad
        if columns:
            scaled = grad * m1
            grad_m1 = grad * rows[-1] * columns[-1]
            grad_rows = (scaled * columns[-1]).sum(1, keepdim=True)
            grad_columns = (scaled * rows[-1]).sum(0, keepdim=True)
            for step in reversed(range(len(columns))):
                # rows = 1 / (M1 columns), and before that columns = 1 / (rows' M1), each through its denominator.
                below = grad_rows.mul_(rows[step + 1].square()).neg_()
                grad_m1.addcmul_(below, columns[step])
                grad_columns += (m1 * below).sum(0, keepdim=True)
                below = grad_columns.mul_(columns[step].square()).neg_()
                grad_m1.addcmul_(below, rows[step])
                grad_rows = (m1 * below).sum(1, keepdim=True)
                grad_columns = torch.zeros_like(grad_columns)
        product = grad_m1 * m1
        grad_log = product.addcmul_(m1, product.sum(1, keepdim=True), value=-1.0)
        return grad_log.addcmul(log_columns.exp(), grad_log.sum(0, keepdim=True), value=-1.0), None


class _NativeSinkhorn(torch.autograd.Function):
    """The same in the compiled kernels, on matrices as they come: [N, n, n]."""

    @staticmethod
    def forward(ctx: Any, logits_Nnn: Tensor, iters: int) -> Tensor:
        ctx.iters = iters
        ctx.save_for_backward(logits_Nnn)
        out = torch.empty_like(logits_Nnn)
        native.call("tafkir_sinkhorn", logits_Nnn, *logits_Nnn.shape[:2], iters, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        out = torch.empty_like(logits)
        native.call("tafkir_sinkhorn_backward", logits, grad.contiguous(), *logits.shape[:2], ctx.iters, out)
        return out, None


def sinkhorn(logits: Tensor, iters: int) -> Tensor:
    """`sinkhorn_reference` in float32 for every finite input, with a backward that recomputes.

    The first iteration runs on logarithms; what that lets underflow would have stayed below n^(2 iters) 2^-126 (1e-15
    for n = 4 and 20 iterations).

    Args:
        logits: [..., n, n] float32, a matrix per token.
        iters: t_max, at least one.

    Raises:
        TrainingError: a logit is infinite or not a number. Looked for on the CPU only, where it costs no waiting;
            on an accelerator such a logit makes the loss NaN, which training refuses.
    """
    if logits.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.isfinite(logits).all():
        raise TrainingError(
            "Sinkhorn's input overflowed: a logit of the residual mixing matrix is not finite",
            where="ops/sinkhorn.py",
            expected="finite logits",
            fix="lower the learning rate, or look for the weights or hidden states that became infinite before",
        )
    size = logits.shape[-1]
    if size in NATIVE_STREAMS and native.takes(logits):
        flat_Nnn = logits.reshape(-1, size, size).contiguous()
        return cast(Tensor, _NativeSinkhorn.apply(flat_Nnn, iters)).view_as(logits)  # type: ignore[no-untyped-call]
    flat_nnN = logits.reshape(-1, size, size).permute(1, 2, 0).contiguous()
    mixed_nnN = cast(Tensor, _Sinkhorn.apply(flat_nnN, iters))  # type: ignore[no-untyped-call]
    return mixed_nnN.permute(2, 0, 1).reshape(logits.shape)
