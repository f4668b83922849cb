"""A residual sublayer with a weightless RMSNorm after it, rms(x + f(x)), whose f is a SwiGLU or any other map.

The SwiGLU may run over the last dim (each position by itself) or over the first one (positions mixed): then the
same matrices stand on the left, and nothing is transposed.

Shapes: ... any dims, D the dim of the norm, I hidden width.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tafkir.ops import native
from tafkir.ops.moe import swiglu, swiglu_backward, swiglu_reference

__all__ = ["post_norm", "post_norm_reference", "swiglu_post_norm", "swiglu_post_norm_reference"]

Dim = Literal[0, -1]

# Up to this many rows or columns a transposed bfloat16 matrix is multiplied as it lies.
_SMALL = 64


def post_norm_reference(x: Tensor, update: Tensor, eps: float, dim: Dim = -1) -> Tensor:
    """(x + update) / rms over `dim`, statistics in float32."""
    total = (x + update).float()
    return (total * torch.rsqrt(total.square().mean(dim, keepdim=True) + eps)).to(x.dtype)


def swiglu_post_norm_reference(x: Tensor, gate_up: Tensor, down: Tensor, eps: float, dim: Dim = -1) -> Tensor:
    """rms(x + down swiglu(gate_up x)) with both matrices applied along `dim`."""
    moved = x.movedim(dim, -1)
    update = swiglu_reference(moved @ gate_up.t()) @ down.t()
    return post_norm_reference(moved, update, eps).movedim(-1, dim)


def _takes(*tensors: Tensor) -> bool:
    return native.takes(*tensors, dtypes=(torch.float32, torch.bfloat16))


def _layout(x: Tensor, dim: Dim) -> tuple[int, int, int]:
    """For the kernels: whether the numbers are bfloat16, whether columns are normed, and the first size."""
    return int(x.dtype == torch.bfloat16), int(dim == 0), x.shape[0] if dim == 0 else x.numel() // x.shape[-1]


def _add_norm(x: Tensor, update: Tensor, eps: float, dim: Dim) -> tuple[Tensor, Tensor]:
    """The normalised sum, and its inverse rms, float32."""
    if not _takes(x, update):
        return _normalize(x + update, eps, dim)
    x, update = x.contiguous(), update.contiguous()
    half, columns, rows = _layout(x, dim)
    out = torch.empty_like(x)
    rstd = x.new_empty((1, *x.shape[1:]) if columns else (*x.shape[:-1], 1), dtype=torch.float32)
    native.call("tafkir_post_norm", half, columns, x, update, eps, rows, x.numel() // rows, out, rstd)
    return out, rstd


def _normalize(total: Tensor, eps: float, dim: Dim) -> tuple[Tensor, Tensor]:
    """In place where the dtype allows; the result and its inverse rms, float32."""
    if dim == 0:
        # A strided vector norm takes fifty times as long.
        rstd = total.float().square().sum(0, keepdim=True)
    else:
        rstd = torch.linalg.vector_norm(total, dim=dim, keepdim=True, dtype=torch.float32).square_()
    rstd = rstd.div_(total.shape[dim]).add_(eps).rsqrt_()
    if total.dtype == torch.float32:
        return total.mul_(rstd), rstd
    return (total * rstd).to(total.dtype), rstd


def _normalize_backward(grad: Tensor, out: Tensor, rstd: Tensor, dim: Dim) -> Tensor:
    """Of the sum that was normalised: rstd (g - out mean(g out))."""
    if _takes(grad, out):
        grad = grad.contiguous()
        half, columns, rows = _layout(out, dim)
        total = torch.empty_like(out)
        native.call("tafkir_post_norm_backward", half, columns, grad, out, rstd, rows, out.numel() // rows, total)
        return total
    mean = (grad * out).sum(dim, keepdim=True, dtype=torch.float32).div_(out.shape[dim])
    if out.dtype == torch.float32:
        return torch.addcmul(grad, out, mean, value=-1.0).mul_(rstd)
    return ((grad - out * mean) * rstd).to(out.dtype)


class _PostNorm(torch.autograd.Function):
    """Keeps the result alone: x + update is the result divided by the inverse rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, eps: float, dim: Dim) -> Tensor:
        out, rstd = _add_norm(x, update, eps, dim)
        ctx.save_for_backward(out, rstd)
        ctx.dim = dim
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        out, rstd = ctx.saved_tensors
        grad_total = _normalize_backward(grad, out, rstd, ctx.dim)
        return grad_total, grad_total, None, None


def _mix(matrix: Tensor, x: Tensor, dim: Dim) -> Tensor:
    """A matrix along the first dim of x [D, M], or along the last one of x [M, D]."""
    return torch.mm(matrix, x) if dim == 0 else torch.mm(x, matrix.t())


def _mix_back(matrix: Tensor, grad: Tensor, dim: Dim) -> Tensor:
    """The gradient of what `_mix` was given."""
    return torch.mm(_turned(matrix), grad) if dim == 0 else torch.mm(grad, matrix)


def _turned(matrix: Tensor) -> Tensor:
    """The transpose, for the left of a product: units for bfloat16 want its rows in order, and a copy is cheaper."""
    turned = matrix.t()
    pays = matrix.dtype == torch.bfloat16 and matrix.device.type == "cpu" and min(matrix.shape) > _SMALL
    return turned.contiguous() if pays else turned


def _halves(gate_up: Tensor, dim: Dim) -> Tensor:
    """Gates before ups along the last dim, as `swiglu` has them: with the positions first, all gates stand first."""
    return gate_up.view(-1) if dim == 0 else gate_up


def _activate(wide: Tensor, dim: Dim) -> Tensor:
    """SwiGLU of the widened x [2I, M], or [M, 2I]."""
    flat = _halves(wide, dim)
    if not _takes(wide):
        return swiglu(flat).view(-1, wide.shape[1]) if dim == 0 else swiglu(wide)
    width = flat.shape[-1] // 2
    hidden = wide.new_empty((wide.shape[0] // 2, wide.shape[1]) if dim == 0 else (wide.shape[0], width))
    half = int(wide.dtype == torch.bfloat16)
    native.call("tafkir_wide_swiglu", half, wide, hidden.numel() // width, width, hidden)
    return hidden


def _activate_backward(grad_hidden: Tensor, wide: Tensor, dim: Dim) -> tuple[Tensor, Tensor]:
    """The gradient of the widened x, and SwiGLU's result once more."""
    flat = _halves(wide, dim)
    if not _takes(grad_hidden, wide):
        hidden = swiglu(flat).view_as(grad_hidden)
        return swiglu_backward(_halves(grad_hidden, dim), flat).view_as(wide), hidden
    grad_wide, hidden = torch.empty_like(wide), torch.empty_like(grad_hidden)
    width, half = flat.shape[-1] // 2, int(wide.dtype == torch.bfloat16)
    rows = hidden.numel() // width
    native.call("tafkir_wide_swiglu_backward", half, grad_hidden, wide, rows, width, grad_wide, hidden)
    return grad_wide, hidden


class _SwigluPostNorm(torch.autograd.Function):
    """Keeps x, the widened x and the result; what SwiGLU made of the widened x is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, eps: float, dim: Dim) -> Tensor:
        wide = _mix(gate_up, x, dim)
        out, rstd = _add_norm(x, _mix(down, _activate(wide, dim), dim), eps, dim)
        ctx.save_for_backward(x, gate_up, down, wide, out, rstd)
        ctx.dim = dim
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, gate_up, down, wide, out, rstd = ctx.saved_tensors
        dim: Dim = ctx.dim
        grad_x = _normalize_backward(grad, out, rstd, dim)
        grad_wide, hidden = _activate_backward(_mix_back(down, grad_x, dim), wide, dim)
        if dim == 0:
            grad_down, grad_gate_up = grad_x @ hidden.t(), grad_wide @ x.t()
            grad_x.addmm_(_turned(gate_up), grad_wide)
        else:
            # The narrow side first: the other way round takes up to twice as long.
            grad_down, grad_gate_up = _turned(grad_x) @ hidden, (_turned(x) @ grad_wide).t()
            grad_x.addmm_(grad_wide, gate_up)
        return grad_x, grad_gate_up, grad_down, None, None


def post_norm(x: Tensor, update: Tensor, eps: float, dim: Dim = -1) -> Tensor:
    """The same numbers as `post_norm_reference`, keeping only the result for the backward.

    Args:
        x: any shape, float32 or bfloat16.
        update: as x.
        eps: added to the mean square.
        dim: of the norm.
    """
    return cast(Tensor, _PostNorm.apply(x, update, eps, dim))  # type: ignore[no-untyped-call]


def swiglu_post_norm(x: Tensor, gate_up: Tensor, down: Tensor, eps: float, dim: Dim = -1) -> Tensor:
    """The same numbers as `swiglu_post_norm_reference`, in one step.

    Args:
        x: [..., D] for dim -1, [D, ...] for dim 0; contiguous, float32 or bfloat16.
        gate_up: [2I, D], gate rows first, in x's dtype.
        down: [D, I].
        eps: of the norm.
        dim: along which matrices and norm work.
    """
    rows = x.reshape(x.shape[0], -1) if dim == 0 else x.reshape(-1, x.shape[-1])
    out = _SwigluPostNorm.apply(rows, gate_up, down, eps, dim)  # type: ignore[no-untyped-call]
    return cast(Tensor, out).view(x.shape)
