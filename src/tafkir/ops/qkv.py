"""From the fused projection to attention's heads: split, per-head RMSNorm of queries and keys, then RoPE.

Shapes: N tokens, H query heads, G key-value heads, X = H + 2G, K head_dim, J = half the rotated dims.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tafkir.ops import native
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


class _NativeSplitNormRope(torch.autograd.Function):
    """The same in one pass each way; the projection's output itself is kept, not its parts."""

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
        num_tokens, all_heads, head_dim = qkv_NXK.shape
        num_kv_heads = (all_heads - num_heads) // 2
        q, k, v = (qkv_NXK.new_empty(num_tokens, h, head_dim) for h in (num_heads, num_kv_heads, num_kv_heads))
        rstd = qkv_NXK.new_empty(num_tokens, num_heads + num_kv_heads)
        ctx.sizes = (num_tokens, num_heads, num_kv_heads, head_dim, cos.shape[-1])
        weights = (q_weight_K, k_weight_K)
        native.call("tafkir_split_norm_rope", qkv_NXK, *weights, eps, cos, sin, *ctx.sizes, q, k, v, rstd)
        ctx.save_for_backward(qkv_NXK, *weights, rstd, cos, sin)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv_NXK, q_weight_K, k_weight_K, *rest = ctx.saved_tensors
        grad_qkv, grad_q_weight, grad_k_weight = (torch.empty_like(x) for x in (qkv_NXK, q_weight_K, k_weight_K))
        native.call(
            "tafkir_split_norm_rope_backward",
            *(grad.contiguous() for grad in grads),
            *(qkv_NXK, q_weight_K, k_weight_K, *rest),
            *ctx.sizes,
            *(grad_qkv, grad_q_weight, grad_k_weight),
        )
        return grad_qkv, None, grad_q_weight, grad_k_weight, None, None, None


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
    tensors = (qkv_NXK, q_weight_K, k_weight_K, cos, sin)
    if native.takes(*tensors):
        qkv_NXK, q_weight_K, k_weight_K, cos, sin = (x.contiguous() for x in tensors)
        function: type[torch.autograd.Function] = _NativeSplitNormRope
    else:
        function = _SplitNormRope
    heads = function.apply(qkv_NXK, num_heads, q_weight_K, k_weight_K, eps, cos, sin)
    return cast(Heads, heads)
