"""Rotary position embedding (arXiv 2104.09864) in the NeoX (rotate-half) layout, on the first dims of each head.

Shapes: N tokens, H heads, K head_dim, R rotated dims.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["apply_rope", "apply_rope_reference", "rope_table"]


def rope_table(positions_N: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, in float32, computed once a forward and shared by all layers.

    Returns:
        cos, sin: each [N, R/2]; angle j of position p is p * theta^(-2j/R).
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_N.device) / rotary_dim
    angles = positions_N.float().unsqueeze(1) * (1.0 / theta**exponent)
    return angles.cos(), angles.sin()


def apply_rope_reference(x_NHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dims j and j + R/2 of each head by angle j; dims from R on pass through."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1).to(x_NHK.dtype), sin.unsqueeze(1).to(x_NHK.dtype)
    first, second, rest = x_NHK[..., :half], x_NHK[..., half : 2 * half], x_NHK[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _rotate(x_NHK: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty_like(x_NHK, memory_format=torch.contiguous_format)
    first, second = x_NHK[..., :half], x_NHK[..., half : 2 * half]
    sign = -1.0 if inverse else 1.0
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin, value=sign)
    if 2 * half < x_NHK.shape[-1]:
        out[..., 2 * half :] = x_NHK[..., 2 * half :]
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.unsqueeze(1).to(x_NHK.dtype), sin.unsqueeze(1).to(x_NHK.dtype)
        ctx.save_for_backward(cos, sin)
        return _rotate(x_NHK, cos, sin, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, inverse=True), None, None


def apply_rope(x_NHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same as `apply_rope_reference` with one output buffer and a rotation back as its backward.

    Args:
        x_NHK: queries or keys of any floating dtype.
        cos: [N, R/2] from `rope_table`; R at most K.
        sin: as cos.
    """
    return cast(Tensor, _Rope.apply(x_NHK, cos, sin))  # type: ignore[no-untyped-call]
