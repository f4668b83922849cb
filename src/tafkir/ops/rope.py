"""Rotary position embedding (arXiv 2104.09864) in the NeoX (rotate-half) layout, on the first dims of each head.

Shapes: N tokens, H heads, K head_dim, R rotated dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_rope_reference", "rope_table", "rotate"]


def rope_table(positions_N: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, in float32, computed once a forward and shared by all layers.

    Returns:
        cos, sin: each [N, R/2]; angle j of position p is p * theta^(-2j/R).
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_N.device) / rotary_dim
    angles = positions_N.float().unsqueeze(1) * (1.0 / theta**exponent)
    return angles.cos(), angles.sin()


def apply_rope_reference(x_NHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dims j and j + R/2 of each head by angle j; dims from R on pass through.

    Args:
        x_NHK: queries or keys.
        cos: [N, R/2] from `rope_table`.
        sin: as cos.
    """
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1).to(x_NHK.dtype), sin.unsqueeze(1).to(x_NHK.dtype)
    first, second, rest = x_NHK[..., :half], x_NHK[..., half : 2 * half], x_NHK[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def rotate(x_NHK: Tensor, cos_N1J: Tensor, sin_N1J: Tensor, out_NHK: Tensor) -> None:
    """The same as `apply_rope_reference` into a buffer; with -sin it turns back, which is its own backward."""
    half = cos_N1J.shape[-1]
    first, second = x_NHK[..., :half], x_NHK[..., half : 2 * half]
    torch.mul(first, cos_N1J, out=out_NHK[..., :half]).addcmul_(second, sin_N1J, value=-1.0)
    torch.mul(second, cos_N1J, out=out_NHK[..., half : 2 * half]).addcmul_(first, sin_N1J)
    if 2 * half < x_NHK.shape[-1]:
        out_NHK[..., 2 * half :] = x_NHK[..., 2 * half :]
