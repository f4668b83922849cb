"""Causal attention over concatenated documents: a loop over documents, and padded buckets for speed.

Shapes: N tokens, H query heads, G key-value heads, K head_dim, B documents of a bucket, T padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tafkir.ops import native

__all__ = ["MAX_SHORT_LENGTH", "VarlenLayout", "varlen_attention", "varlen_attention_reference"]


MAX_SHORT_LENGTH = 512
"""Documents up to this length are attended to one by one on the CPU; their score matrices are kept for the backward."""


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Documents of similar length as one right-padded block of `num_docs` x `max_len` slots."""

    num_docs: int
    max_len: int
    rows_BT: Tensor
    """Flat: the token in each slot; padding repeats the document's last token."""
    tokens: Tensor
    """The bucket's tokens, in document order."""
    slots: Tensor
    """Where each of `tokens` sits in the flattened block."""


@dataclass(frozen=True, slots=True)
class VarlenLayout:
    """Where documents lie in a flat batch, and how they are padded into buckets.

    `cu_seqlens` are the boundaries: first 0, last N, one more entry than documents. Padding exists only inside
    the attention op; a bucket wastes at most `max_waste` of its slots unless it holds a single document.
    """

    cu_seqlens: tuple[int, ...]
    max_len: int
    buckets: tuple[_Bucket, ...]

    @staticmethod
    def build(
        cu_seqlens: Sequence[int] | Tensor, *, max_waste: float = 0.2, device: torch.device | None = None
    ) -> VarlenLayout:
        """Sort the documents by length and cut them into buckets (the same input gives the same buckets)."""
        bounds = tuple(int(i) for i in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens))
        if len(bounds) < 2 or bounds[0] != 0 or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"cu_seqlens must rise from 0 to the token count, got {bounds[:8]}")
        docs = sorted(pairwise(bounds), key=lambda doc: (doc[0] - doc[1], doc[0]))
        groups: list[list[tuple[int, int]]] = []
        used = 0
        for doc in docs:
            length = doc[1] - doc[0]
            if groups:
                slots = (len(groups[-1]) + 1) * (groups[-1][0][1] - groups[-1][0][0])
                if used + length >= (1 - max_waste) * slots:
                    groups[-1].append(doc)
                    used += length
                    continue
            groups.append([doc])
            used = length
        return VarlenLayout(bounds, docs[0][1] - docs[0][0], tuple(_build_bucket(group, device) for group in groups))


def _build_bucket(docs: list[tuple[int, int]], device: torch.device | None) -> _Bucket:
    starts = torch.tensor([start for start, _ in docs], device=device)
    lengths = torch.tensor([stop - start for start, stop in docs], device=device)
    max_len = docs[0][1] - docs[0][0]
    steps = torch.arange(max_len, device=device)
    rows_BT = starts.unsqueeze(1) + torch.minimum(steps, lengths.unsqueeze(1) - 1)
    slots = (steps < lengths.unsqueeze(1)).view(-1).nonzero().view(-1)
    rows = rows_BT.view(-1)
    return _Bucket(len(docs), max_len, rows, rows[slots], slots)


def varlen_attention_reference(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, layout: VarlenLayout) -> Tensor:
    """Causal softmax(q k / sqrt(K)) v within each document, one document at a time, softmax in float32."""
    num_heads, head_dim = q_NHK.shape[1:]
    repeats = num_heads // k_NGK.shape[1]
    outputs = []
    for start, stop in pairwise(layout.cu_seqlens):
        q_HTK = q_NHK[start:stop].transpose(0, 1)
        k_HTK = k_NGK[start:stop].transpose(0, 1).repeat_interleave(repeats, dim=0)
        v_HTK = v_NGK[start:stop].transpose(0, 1).repeat_interleave(repeats, dim=0)
        scores_HTT = (q_HTK @ k_HTK.transpose(1, 2)).float() * head_dim**-0.5
        future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q_NHK.device).triu(1)
        weights_HTT = scores_HTT.masked_fill(future, -torch.inf).softmax(-1).to(q_NHK.dtype)
        outputs.append((weights_HTT @ v_HTK).transpose(0, 1))
    return torch.cat(outputs)


class _ShortDocuments(torch.autograd.Function):
    """One document at a time with its whole score matrix, which fits the cache: no padding, nothing computed twice.

    The queries that share a key-value head are the rows of one matmul, in (query head, token) order.
    """

    @staticmethod
    def forward(ctx: Any, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, bounds: tuple[int, ...]) -> Tensor:
        num_tokens, num_heads, head_dim = q_NHK.shape
        num_kv_heads = k_NGK.shape[1]
        lengths = [stop - start for start, stop in pairwise(bounds)]
        longest = max(lengths)
        future_TT = q_NHK.new_full((longest, longest), -torch.inf).triu_(1)
        out_NHK = q_NHK.new_empty(num_tokens, num_heads, head_dim)
        grouped = (num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
        parts = ((q_NHK * head_dim**-0.5).view(grouped), k_NGK, v_NGK, out_NHK.view(grouped))
        saved = []
        for length, q_TGRK, k_TGK, v_TGK, out_TGRK in zip(
            lengths, *(torch.split(p, lengths) for p in parts), strict=True
        ):
            q_GMK = _rows(q_TGRK)
            weights_GMT = torch.bmm(q_GMK, k_TGK.permute(1, 2, 0))
            weights_GMT.view(num_kv_heads, -1, length, length).add_(future_TT[:length, :length])
            weights_GMT = torch.softmax(weights_GMT, -1)
            _put_rows(torch.bmm(weights_GMT, v_TGK.transpose(0, 1)), out_TGRK)
            saved += [q_GMK, weights_GMT]
        ctx.lengths = lengths
        ctx.save_for_backward(k_NGK, v_NGK, *saved)
        return out_NHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHK: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        k_NGK, v_NGK, *saved = ctx.saved_tensors
        num_tokens, num_heads, head_dim = grad_NHK.shape
        grouped = (num_tokens, k_NGK.shape[1], num_heads // k_NGK.shape[1], head_dim)
        grad_q, grad_k, grad_v = grad_NHK.new_empty(grouped), torch.empty_like(k_NGK), torch.empty_like(v_NGK)
        parts = (grad_NHK.reshape(grouped), k_NGK, v_NGK, grad_q, grad_k, grad_v)
        documents = zip(*(torch.split(p, ctx.lengths) for p in parts), saved[0::2], saved[1::2], strict=True)
        for grad_TGRK, k_TGK, v_TGK, grad_q_T, grad_k_T, grad_v_T, q_GMK, weights_GMT in documents:
            grad_GMK = _rows(grad_TGRK)
            grad_v_T.copy_(torch.bmm(weights_GMT.transpose(1, 2), grad_GMK).transpose(0, 1))
            grad_GMT = torch.bmm(grad_GMK, v_TGK.permute(1, 2, 0))
            grad_GMT = torch._softmax_backward_data(grad_GMT, weights_GMT, -1, weights_GMT.dtype)
            _put_rows(torch.bmm(grad_GMT, k_TGK.transpose(0, 1)), grad_q_T)
            grad_k_T.copy_(torch.bmm(grad_GMT.transpose(1, 2), q_GMK).transpose(0, 1))
        return grad_q.mul_(head_dim**-0.5).view_as(grad_NHK), grad_k, grad_v, None


QUERY_BLOCK = 64
"""Queries that the native kernel takes at once: above the diagonal it computes half a block, not half a document."""


class _NativeDocuments(torch.autograd.Function):
    """The same in one call: each head of each document by blocks of queries, without what lies above the diagonal."""

    @staticmethod
    def forward(ctx: Any, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, bounds: tuple[int, ...]) -> Tensor:
        num_heads, head_dim = q_NHK.shape[1:]
        bounds_B = torch.tensor(bounds)
        starts_B = F.pad((bounds_B.diff().square_() * num_heads).cumsum(0), (1, 0))
        weights = q_NHK.new_empty(int(starts_B[-1]))
        out_NHK = torch.empty_like(q_NHK)
        ctx.sizes = (len(bounds) - 1, num_heads, k_NGK.shape[1], head_dim, QUERY_BLOCK)
        native.call("tafkir_attention", q_NHK, k_NGK, v_NGK, bounds_B, starts_B, *ctx.sizes, out_NHK, weights)
        ctx.save_for_backward(q_NHK, k_NGK, v_NGK, weights, bounds_B, starts_B)
        return out_NHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHK: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        grads = tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])
        native.call("tafkir_attention_backward", grad_NHK.contiguous(), *ctx.saved_tensors, *ctx.sizes, *grads)
        return grads[0], grads[1], grads[2], None


def _rows(x_TGRK: Tensor) -> Tensor:
    """[T, G, R, K] to [G, R * T, K]."""
    num_tokens, num_kv_heads, repeats, head_dim = x_TGRK.shape
    return x_TGRK.permute(1, 2, 0, 3).reshape(num_kv_heads, repeats * num_tokens, head_dim)


def _put_rows(x_GMK: Tensor, out_TGRK: Tensor) -> None:
    """The reverse of `_rows`, into a buffer."""
    num_tokens, num_kv_heads, repeats, head_dim = out_TGRK.shape
    out_TGRK.copy_(x_GMK.view(num_kv_heads, repeats, num_tokens, head_dim).permute(2, 0, 1, 3))


class _Pad(torch.autograd.Function):
    """Tokens to padded slots by a gather; its backward is a gather as well, because padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x_NHK: Tensor, layout: VarlenLayout) -> tuple[Tensor, ...]:
        ctx.layout, ctx.num_tokens = layout, x_NHK.shape[0]
        return tuple(
            x_NHK.index_select(0, b.rows_BT).view(b.num_docs, b.max_len, *x_NHK.shape[1:]) for b in layout.buckets
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather_buckets(grads, ctx.layout, ctx.num_tokens), None


class _Unpad(torch.autograd.Function):
    """Padded slots back to tokens; the gradient of a padding slot is zero."""

    @staticmethod
    def forward(ctx: Any, layout: VarlenLayout, num_tokens: int, *outs: Tensor) -> Tensor:
        ctx.layout = layout
        return _gather_buckets(outs, layout, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHK: Tensor) -> tuple[Tensor | None, ...]:
        grads = []
        for b in ctx.layout.buckets:
            if b.slots.numel() == b.rows_BT.numel():
                block = grad_NHK.index_select(0, b.tokens)
            else:
                block = grad_NHK.new_zeros(b.num_docs * b.max_len, *grad_NHK.shape[1:])
                block.index_copy_(0, b.slots, grad_NHK.index_select(0, b.tokens))
            grads.append(block.view(b.num_docs, b.max_len, *grad_NHK.shape[1:]))
        return None, None, *grads


def _gather_buckets(blocks: Sequence[Tensor], layout: VarlenLayout, num_tokens: int) -> Tensor:
    out = blocks[0].new_empty(num_tokens, *blocks[0].shape[2:])
    for block, b in zip(blocks, layout.buckets, strict=True):
        out.index_copy_(0, b.tokens, block.reshape(-1, *block.shape[2:]).index_select(0, b.slots))
    return out


def varlen_attention(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, layout: VarlenLayout) -> Tensor:
    """The same as `varlen_attention_reference`: short documents one by one, long ones in padded buckets.

    Args:
        q_NHK: queries after RoPE; H is a multiple of G.
        k_NGK: keys after RoPE.
        v_NGK: values.
        layout: the documents' places; `VarlenLayout.build(cu_seqlens)`.

    Returns:
        [N, H, K], in q's dtype.
    """
    if q_NHK.device.type == "cpu" and q_NHK.dtype == torch.float32 and layout.max_len <= MAX_SHORT_LENGTH:
        parts = (q_NHK, k_NGK, v_NGK)
        if native.takes(*parts) and k_NGK.shape == v_NGK.shape and k_NGK.shape[2] == q_NHK.shape[2]:
            parts = (q_NHK.contiguous(), k_NGK.contiguous(), v_NGK.contiguous())
            return cast(Tensor, _NativeDocuments.apply(*parts, layout.cu_seqlens))  # type: ignore[no-untyped-call]
        out = _ShortDocuments.apply(*parts, layout.cu_seqlens)  # type: ignore[no-untyped-call]
        return cast(Tensor, out)
    return _padded_attention(q_NHK, k_NGK, v_NGK, layout)


def _padded_attention(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, layout: VarlenLayout) -> Tensor:
    """One fused call for each bucket. Right padding needs no mask: the causal mask hides what stands to the right."""
    qs = cast(tuple[Tensor, ...], _Pad.apply(q_NHK, layout))  # type: ignore[no-untyped-call]
    ks = cast(tuple[Tensor, ...], _Pad.apply(k_NGK, layout))  # type: ignore[no-untyped-call]
    vs = cast(tuple[Tensor, ...], _Pad.apply(v_NGK, layout))  # type: ignore[no-untyped-call]
    outs = [
        F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        for q, k, v in zip(qs, ks, vs, strict=True)
    ]
    return cast(Tensor, _Unpad.apply(layout, q_NHK.shape[0], *outs))  # type: ignore[no-untyped-call]
