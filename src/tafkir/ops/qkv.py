"""From the fused projection to attention's heads: split, per-head RMSNorm of queries and keys, then RoPE.

Shapes: N tokens, H query heads, G key-value heads, X = H + 2G, K head_dim, J = half the rotated dims.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tafkir.ops.norm import inverse_rms, rms_norm_backward, rms_norm_reference
from tafkir.ops.rope import apply_rope_reference, rotate

__all__ = ["split_norm_rope", "split_norm_rope_reference"]

Heads = tuple[Tensor, Tensor, Tensor]


def split_norm_rope_reference(
    qkv_NXK: Tensor,
    num_heads: int,
    q_weight_K: Tensor | None,
    k_weight_K: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> Heads:
    """Split into [all Q | all K | all V], normalise Q and K where weights are given, rotate them."""
    num_kv_heads = (qkv_NXK.shape[1] - num_heads) // 2
    q_NHK, k_NGK, v_NGK = torch.split(qkv_NXK, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_weight_K is not None and k_weight_K is not None:
        q_NHK, k_NGK = rms_norm_reference(q_NHK, q_weight_K, eps), rms_norm_reference(k_NGK, k_weight_K, eps)
    return apply_rope_reference(q_NHK, cos, sin), apply_rope_reference(k_NGK, cos, sin), v_NGK


class _SplitNormRope(torch.autograd.Function):
    """Few passes, and one gradient buffer for all three parts."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_NXK: Tensor,
        num_heads: int,
        q_weight_K: Tensor,
        k_weight_K: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
    ) -> Heads:
        num_kv_heads = (qkv_NXK.shape[1] - num_heads) // 2
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q_NHK, k_NGK, v_NGK = torch.split(qkv_NXK, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        outs, saved = [], []
        for x, weight_K in ((q_NHK, q_weight_K), (k_NGK, k_weight_K)):
            x = x.contiguous()
            rstd = inverse_rms(x, eps)
            out = torch.empty_like(x)
            rotate((x * rstd).mul_(weight_K), cos, sin, out)
            outs.append(out)
            saved += [x, rstd]
        ctx.save_for_backward(q_weight_K, k_weight_K, cos, sin, *saved)
        return outs[0], outs[1], v_NGK.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_weight_K, k_weight_K, cos, sin, q, q_rstd, k, k_rstd = ctx.saved_tensors
        sizes = [grad.shape[1] for grad in grads]
        grad_qkv = q.new_empty(len(q), sum(sizes), q.shape[2])
        places = torch.split(grad_qkv, sizes, dim=1)
        places[2].copy_(grads[2])
        weight_grads = []
        parts = ((q_weight_K, q, q_rstd), (k_weight_K, k, k_rstd))
        for grad, place, (weight_K, x, rstd) in zip(grads[:2], places[:2], parts, strict=True):
            turned_back = torch.empty_like(x)
            rotate(grad, cos, -sin, turned_back)
            weight_grads.append(rms_norm_backward(turned_back, x, weight_K, rstd, place))
        return grad_qkv, None, *weight_grads, None, None, None


def split_norm_rope(
    qkv_NXK: Tensor,
    num_heads: int,
    q_weight_K: Tensor | None,
    k_weight_K: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> Heads:
    """The same numbers as `split_norm_rope_reference`, in fewer passes in float32.

    Args:
        qkv_NXK: the projection's output, rows of heads [all Q | all K | all V].
        num_heads: H; the rest is shared by K and V.
        q_weight_K: weight of the queries' RMSNorm, or None for no QK-norm.
        k_weight_K: the same for the keys.
        eps: of both norms.
        cos: [N, J] from `rope_table`.
        sin: as cos.

    Returns:
        q [N, H, K], k [N, G, K], v [N, G, K].
    """
    if q_weight_K is None or k_weight_K is None or qkv_NXK.dtype != torch.float32:
        return split_norm_rope_reference(qkv_NXK, num_heads, q_weight_K, k_weight_K, eps, cos, sin)
    heads = _SplitNormRope.apply(  # type: ignore[no-untyped-call]
        qkv_NXK, num_heads, q_weight_K, k_weight_K, eps, cos, sin
    )
    return cast(Heads, heads)
