"""The mixture of experts in two kernels: pairs sorted by expert, gate and up with their product, then down.

What is launched depends on the numbers of tokens and experts alone, and nothing is read back, so a step with it can be
captured. Shapes: N tokens, D hidden, E experts, A active experts per token, I expert width, P = N * A token-expert
pairs, T tiles of at most so many pairs of one expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tafkir.ops.nvfp4_rows import Nvfp4Rows
from tafkir.ops.triton.tiles import operands_in_float32, product_tile, tile_depth, token_tile

__all__ = ["Tiles", "moe_experts", "tile_pairs"]

_WIDTH = 64


class Tiles(NamedTuple):
    """Which pairs each program takes: all int64.

    Attributes:
        order_P: pairs (token * A + slot) sorted by expert.
        expert_T: the expert of each tile.
        first_T: its first place in `order_P`.
        last_T: the place behind its last one; no more than `first_T` where a tile is not needed.
    """

    order_P: Tensor
    expert_T: Tensor
    first_T: Tensor
    last_T: Tensor


def tile_pairs(expert_ids_NA: Tensor, num_experts: int, size: int) -> Tiles:
    """Cut the pairs of every expert into tiles of `size`; as many tiles as could be needed, whatever the routing."""
    flat_P = expert_ids_NA.reshape(-1)
    num_pairs = len(flat_P)
    place_P = torch.arange(num_pairs, device=flat_P.device)
    if len(expert_ids_NA) == 1:  # all of them different
        return Tiles(place_P, flat_P, place_P, place_P + 1)
    order_P = torch.sort(flat_P, stable=True).indices
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat_P.device)
    counts_E.scatter_add_(0, flat_P, torch.ones_like(flat_P))
    ends_E, tiles_E = counts_E.cumsum(0), (counts_E + size - 1) // size
    tile_ends_E = tiles_E.cumsum(0)
    tile_T = place_P[: min(num_pairs, (num_pairs + num_experts * (size - 1)) // size)]
    needed_T = tile_T < tile_ends_E[-1]
    expert_T = torch.searchsorted(tile_ends_E, tile_T, right=True).clamp_(max=num_experts - 1)
    first_T = (ends_E - counts_E)[expert_T] + (tile_T - (tile_ends_E - tiles_E)[expert_T]) * size
    last_T = torch.minimum(first_T + size, ends_E[expert_T])
    return Tiles(order_P, expert_T, first_T, torch.where(needed_T, last_T, 0))


@triton.jit
def _of_expert(weight, scales, totals, base, columns, coded: tl.constexpr):
    """The pointers from one of an expert's rows on."""
    if coded:
        weight += base * (columns // 2)
        scales += base * (columns // 16)
        totals += base
    else:
        weight += base * columns
    return weight, scales, totals


@triton.jit
def _gate_up(
    x, weight, scales, totals, routing, order, experts, firsts, lasts, out, active, columns, inner,
    coded: tl.constexpr, exact: tl.constexpr, tokens: tl.constexpr, width: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up * routing weight of each pair, where a row is narrowest."""
    tile = tl.program_id(0)
    first, last = tl.load(firsts + tile), tl.load(lasts + tile)
    if first < last:
        place = first + tl.arange(0, tokens)
        there = place < last
        pair = tl.load(order + place, mask=there, other=0)
        token = pair // active
        unit = tl.program_id(1) * width + tl.arange(0, width)
        inside = unit < inner
        base = tl.load(experts + tile) * 2 * inner
        w, s, t = _of_expert(weight, scales, totals, base, columns, coded)
        gate = product_tile(
            x, token, there, w, s, unit, inside, columns, 0, columns, coded, exact, tokens, width, depth
        )
        up = product_tile(
            x, token, there, w, s, unit + inner, inside, columns, 0, columns, coded, exact, tokens, width, depth
        )
        if coded:
            gate *= tl.load(t + unit, mask=inside, other=0.0)[None, :]
            up *= tl.load(t + unit + inner, mask=inside, other=0.0)[None, :]
        share = tl.load(routing + pair, mask=there, other=0.0).to(tl.float32)
        hidden = gate * tl.sigmoid(gate) * up * share[:, None]
        at = out + pair[:, None] * inner + unit[None, :]
        tl.store(at, hidden.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit
def _down(
    x, weight, scales, totals, order, experts, firsts, lasts, out, columns, rows,
    coded: tl.constexpr, exact: tl.constexpr, tokens: tl.constexpr, width: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Each pair's output, in the place of the pair: unsorted again."""
    tile = tl.program_id(0)
    first, last = tl.load(firsts + tile), tl.load(lasts + tile)
    if first < last:
        place = first + tl.arange(0, tokens)
        there = place < last
        pair = tl.load(order + place, mask=there, other=0)
        row = tl.program_id(1) * width + tl.arange(0, width)
        inside = row < rows
        w, s, t = _of_expert(weight, scales, totals, tl.load(experts + tile) * rows, columns, coded)
        y = product_tile(x, pair, there, w, s, row, inside, columns, 0, columns, coded, exact, tokens, width, depth)
        if coded:
            y *= tl.load(t + row, mask=inside, other=0.0)[None, :]
        at = out + pair[:, None] * rows + row[None, :]
        tl.store(at, y.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])


def moe_experts(
    x_ND: Tensor,
    gate_up_EID: Tensor | Nvfp4Rows,
    down_EDI: Tensor | Nvfp4Rows,
    expert_ids_NA: Tensor,
    weights_NA: Tensor,
) -> Tensor:
    """`ops.moe.moe_experts` without its backward; weights may be in NVFP4, both or none. A token's sum is in the order
    of its slots."""
    coded = isinstance(gate_up_EID, Nvfp4Rows)
    gate_up = gate_up_EID if isinstance(gate_up_EID, Nvfp4Rows) else (gate_up_EID.contiguous(),) * 3
    down = down_EDI if isinstance(down_EDI, Nvfp4Rows) else (down_EDI.contiguous(),) * 3
    (num_tokens, hidden), active = x_ND.shape, expert_ids_NA.shape[1]
    num_experts, inner = len(gate_up[0]), gate_up[0].shape[1] // 2
    if not num_tokens:
        return torch.empty_like(x_ND)
    num_pairs = num_tokens * active
    size = token_tile(triton.cdiv(num_pairs, num_experts))
    order_P, *tiles = tile_pairs(expert_ids_NA, num_experts, size)
    exact = operands_in_float32(x_ND)
    options = (coded, exact, size, _WIDTH, tile_depth(exact))
    scaled_PI = x_ND.new_empty(num_pairs, inner)
    _gate_up[(len(tiles[0]), triton.cdiv(inner, _WIDTH))](
        x_ND.contiguous(), *gate_up, weights_NA.contiguous(), order_P, *tiles, scaled_PI,
        active, hidden, inner, *options,
    )  # fmt: skip
    y_PD = x_ND.new_empty(num_pairs, hidden)
    _down[(len(tiles[0]), triton.cdiv(hidden, _WIDTH))](
        scaled_PI, *down, order_P, *tiles, y_PD, inner, hidden, *options
    )
    return y_PD.view(num_tokens, active, hidden).sum(1)
