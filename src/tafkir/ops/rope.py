"""Rotary position embedding (arXiv 2104.09864) in the NeoX (rotate-half) layout, on the first dims of each head.

YaRN (arXiv 2309.00071) as transformers computes it, in the same order of operations.

Shapes: N tokens, H heads, K head_dim, R rotated dims, J = R/2 angles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tafkir.recipe.model import YarnConfig

__all__ = [
    "apply_rope_reference",
    "deinterleave",
    "inverse_frequencies",
    "rope_table",
    "rotate",
    "softmax_factor",
    "yarn_attention_factor",
]


def rope_table(
    positions_N: Tensor, rotary_dim: int, theta: float, scaling: YarnConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, in float32, computed once a forward and shared by all layers.

    Args:
        positions_N: int64 position of each token within its document.
        rotary_dim: R.
        theta: RoPE's base.
        scaling: YaRN, or None for angle j of position p being p * theta^(-2j/R).

    Returns:
        cos, sin: each [N, R/2]; with YaRN they carry its attention factor.
    """
    angles = positions_N.float().unsqueeze(1) * inverse_frequencies(rotary_dim, theta, scaling, positions_N.device)
    if scaling is None:
        return angles.cos(), angles.sin()
    factor = yarn_attention_factor(scaling)
    return angles.cos() * factor, angles.sin() * factor


def inverse_frequencies(
    rotary_dim: int, theta: float, scaling: YarnConfig | None = None, device: torch.device | None = None
) -> Tensor:
    """How far each angle turns per position, float32 [J].

    With YaRN, angles below the lower bound keep their pace, those above the upper one are slowed by the factor, and a
    linear ramp lies between (equation 23 of the paper; the ramp is over dims, as in every implementation).
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    periods_J: Tensor = theta**exponent
    if scaling is None:
        return 1.0 / periods_J
    low, high = scaling.bounds(rotary_dim, theta)
    if low == high:
        high += 0.001  # a step instead of a ramp
    ramp_J = (torch.arange(rotary_dim // 2, dtype=torch.float32, device=device) - low) / (high - low)
    kept_J = 1 - torch.clamp(ramp_J, 0, 1)
    return 1.0 / (scaling.factor * periods_J) * (1 - kept_J) + 1.0 / periods_J * kept_J


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_attention_factor(scaling: YarnConfig) -> float:
    """The factor on cosines and sines: as given, DeepSeek's quotient of two, or 0.1 ln s + 1."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor)


def softmax_factor(scaling: YarnConfig | None) -> float:
    """DeepSeek's factor on MLA's softmax scale, (0.1 mscale_all_dim ln s + 1)^2; 1 without `mscale_all_dim`."""
    if scaling is None or not scaling.mscale_all_dim:
        return 1.0
    return _mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def deinterleave(x: Tensor) -> Tensor:
    """From adjacent pairs (x0, x1), (x2, x3) ... to halves x0, x2 ... x1, x3 ..., along the last dim.

    Rotating the halves equals rotating the pairs, up to an order of dims that queries and keys share.
    """
    pairs: Tensor = x.unflatten(-1, (-1, 2))
    return pairs.transpose(-1, -2).flatten(-2)


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
