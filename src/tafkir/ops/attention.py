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

__all__ = ["VarlenLayout", "varlen_attention", "varlen_attention_reference"]


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
        return VarlenLayout(bounds, tuple(_build_bucket(group, device) for group in groups))


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
    """The same as `varlen_attention_reference`, in one fused call for each bucket of similar lengths.

    Right padding needs no mask: under the causal mask no token sees what stands to its right.

    Args:
        q_NHK: queries after RoPE; H is a multiple of G.
        k_NGK: keys after RoPE.
        v_NGK: values.
        layout: the documents' places; `VarlenLayout.build(cu_seqlens)`.

    Returns:
        [N, H, K], in q's dtype.
    """
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
