"""Attention of one new token a row over a paged cache, following each row's table of blocks: nothing is gathered first.

Shapes: B rows, T blocks of a row, H query heads, G key-value heads, K head_dim, S splits of what a row holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tafkir.ops.triton.tiles import operands_in_float32

__all__ = ["paged_attention"]

_SPAN, _LEAST_TOKENS, _MOST_SPLITS = 64, 256, 16


@triton.jit
def _attend(
    q, keys, values, tables, positions, mixed_out, sums_out, rows, blocks, heads, kv_heads, dim, scale,
    block: tl.constexpr, splits: tl.constexpr, exact: tl.constexpr,
    group: tl.constexpr, head_width: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """The queries that share a key-value head, over one split; softmax as it goes (arXiv 1805.02867)."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = (tl.load(positions + row) + 1).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), span) * span
    first = split * share
    last = tl.minimum(first + share, length)
    repeats = heads // kv_heads
    member, column = tl.arange(0, group), tl.arange(0, head_width)
    asked, real = member < repeats, column < dim
    query = row * heads + head * repeats + member
    q_tile = tl.load(q + query[:, None] * dim + column[None, :], mask=asked[:, None] & real[None, :], other=0.0)
    largest = tl.full((group,), float("-inf"), tl.float32)
    total = tl.zeros((group,), tl.float32)
    mixed = tl.zeros((group, head_width), tl.float32)
    for start in range(first, last, span):
        place = start + tl.arange(0, span)
        there = place < last
        slot = tl.load(tables + row * blocks + place // block, mask=there, other=0) * block + place % block
        at = (slot[:, None] * kv_heads + head) * dim + column[None, :]
        inside = there[:, None] & real[None, :]
        key = tl.load(keys + at, mask=inside, other=0.0)
        value = tl.load(values + at, mask=inside, other=0.0)
        if exact:
            score = tl.dot(q_tile.to(tl.float32), tl.trans(key.to(tl.float32)), input_precision="ieee")
        else:
            score = tl.dot(q_tile, tl.trans(key))
        score = tl.where(there[None, :], score * scale, float("-inf"))
        newest = tl.maximum(largest, tl.max(score, axis=1))
        weight = tl.exp(score - newest[:, None])
        shrink = tl.exp(largest - newest)
        total = total * shrink + tl.sum(weight, axis=1)
        mixed *= shrink[:, None]
        if exact:
            mixed = tl.dot(weight, value.to(tl.float32), mixed, input_precision="ieee")
        else:
            mixed = tl.dot(weight.to(value.dtype), value, mixed)
        largest = newest
    found = split * rows * heads + query
    tl.store(mixed_out + found[:, None] * dim + column[None, :], mixed, mask=asked[:, None] & real[None, :])
    tl.store(sums_out + found, largest, mask=asked)
    tl.store(sums_out + splits * rows * heads + found, total, mask=asked)


def paged_attention(
    q_BHK: Tensor, keys: Tensor, values: Tensor, tables_BT: Tensor, positions_B: Tensor, block_size: int
) -> Tensor:
    """softmax(q k / sqrt(K)) v over positions 0 to a row's own, in which its newest entries already stand.

    How a row's tokens are split depends on T, not on the other rows.

    Args:
        q_BHK: queries after RoPE, H a multiple of G.
        keys: [slots, G, K], slot = block * block_size + place in it; as `values`.
        tables_BT: int64, the blocks of each row; beyond its last token anything.
        positions_B: int64, of the new tokens.

    Returns:
        [B, H, K] in q's dtype.
    """
    (rows, heads, dim), kv_heads, blocks = q_BHK.shape, keys.shape[1], tables_BT.shape[1]
    splits = max(1, min(_MOST_SPLITS, blocks * block_size // _LEAST_TOKENS))
    mixed_SBHK = torch.empty(splits, rows, heads, dim, device=q_BHK.device)
    sums = torch.empty(2, splits, rows, heads, device=q_BHK.device)
    largest_SBH, total_SBH = sums.unbind()
    group = max(16, int(triton.next_power_of_2(heads // kv_heads)))
    _attend[(rows, kv_heads, splits)](
        q_BHK.contiguous(), keys, values, tables_BT.contiguous(), positions_B.contiguous(), mixed_SBHK, sums,
        rows, blocks, heads, kv_heads, dim, dim**-0.5,
        block_size, splits, operands_in_float32(q_BHK), group, max(16, int(triton.next_power_of_2(dim))), _SPAN,
    )  # fmt: skip
    share_SBH = (largest_SBH - largest_SBH.amax(0)).exp()
    mixed_BHK = (mixed_SBHK * share_SBH.unsqueeze(-1)).sum(0) / (total_SBH * share_SBH).sum(0).unsqueeze(-1)
    return mixed_BHK.to(q_BHK.dtype)
