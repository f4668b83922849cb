"""From a fused projection to the heads of attention over whole grids: RoPE on queries and keys, heads before positions.

Shapes: B batch, S positions, H heads, K head dim.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tafkir.ops import native
from tafkir.ops.rope import apply_rope_reference

__all__ = ["Angles", "attend", "split_heads", "split_heads_reference"]

Angles = tuple[Tensor, Tensor]
"""Cosines and sines [S, K / 2] of every position, from `rope_table`."""


def split_heads_reference(joined: Tensor, num_heads: int, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same one step after the other."""
    parts = joined.unflatten(-1, (3, num_heads, -1)).unbind(2)
    if angles is not None:
        parts = (*(apply_rope_reference(part, *angles) for part in parts[:2]), parts[2])
    q, k, v = (part.transpose(1, 2) for part in parts)
    return q, k, v


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, joined: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        joined = joined.contiguous()
        batch, length, width = joined.shape
        ctx.sizes = batch, length, num_heads, width // (3 * num_heads)
        ctx.angles = cos, sin
        parts = joined.new_empty(3, batch, num_heads, length, ctx.sizes[-1])
        native.call("tafkir_split_heads", int(joined.dtype == torch.bfloat16), joined, cos, sin, *ctx.sizes, parts)
        return parts[0], parts[1], parts[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        batch, length, heads, dim = ctx.sizes
        parts = [grad.contiguous() for grad in grads]
        joined = parts[0].new_empty(batch, length, 3 * heads * dim)
        half = int(joined.dtype == torch.bfloat16)
        native.call("tafkir_split_heads_backward", half, *parts, *ctx.angles, *ctx.sizes, joined)
        return joined, None, None, None


def split_heads(joined: Tensor, num_heads: int, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a fused projection, queries and keys turned by their positions' angles.

    Args:
        joined: [B, S, 3 H K], all queries first, then keys, then values; float32 or bfloat16.
        num_heads: H.
        angles: of RoPE over the whole head dim (NeoX layout); None leaves queries and keys as they are.

    Returns:
        q, k, v: [B, H, S, K].
    """
    if not native.takes(joined, dtypes=(torch.float32, torch.bfloat16)):
        return split_heads_reference(joined, num_heads, angles)
    cos, sin = (None, None) if angles is None else (angle.float().contiguous() for angle in angles)
    return cast(tuple[Tensor, Tensor, Tensor], _SplitHeads.apply(joined, num_heads, cos, sin))  # type: ignore[no-untyped-call]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every position to every other one, softmax(q k^T / sqrt K) v.

    Torch's own goes back in bfloat16 on the CPU four times as slowly as two products with a softmax between do.

    Args:
        q: [B, H, S, K], as k and v.

    Returns:
        [B, H, S, K].
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v)
