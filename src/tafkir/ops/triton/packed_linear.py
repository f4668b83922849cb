"""Products of tokens with a matrix that stays in NVFP4 (weight-only: Hopper and older have no four-bit products).

Shapes: N tokens, K columns, M rows of the matrix, S splits of the columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tafkir.ops.nvfp4_rows import Nvfp4Rows
from tafkir.ops.triton.tiles import operands_in_float32, product_tile, tile_depth, token_tile

__all__ = ["nvfp4_linear"]

_WIDTH = 64
# Programs that fill a large device; fewer tiles than that share the columns among several programs.
_PROGRAMS, _LEAST_COLUMNS = 256, 512


@triton.jit
def _linear(
    x, codes, scales, totals, out, num_tokens, rows, columns, per_split,
    exact: tl.constexpr, tokens: tl.constexpr, width: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * width + tl.arange(0, width)
    token = tl.program_id(1) * tokens + tl.arange(0, tokens)
    split = tl.program_id(2)
    first = split * per_split
    last = tl.minimum(first + per_split, columns)
    there, token_there = row < rows, token < num_tokens
    product = product_tile(
        x, token, token_there, codes, scales, row, there, columns, first, last, True, exact, tokens, width, depth
    )
    product *= tl.load(totals + row, mask=there, other=0.0)[None, :]
    at = out + (split * num_tokens + token)[:, None] * rows + row[None, :]
    tl.store(at, product.to(out.dtype.element_ty), mask=token_there[:, None] & there[None, :])


def nvfp4_linear(x_NK: Tensor, weight: Nvfp4Rows) -> Tensor:
    """x W^T, summed in float32 and rounded once; the weights are not rounded.

    Into how many parts a sum is split depends on the matrix alone, not on the number of tokens.

    Args:
        x_NK: bfloat16, float16 or float32, on the weight's device.
        weight: [M, K].

    Returns:
        [N, M] in x's dtype.
    """
    (num_tokens, columns), rows = x_NK.shape, len(weight.codes)
    if not num_tokens:
        return x_NK.new_empty(0, rows)
    tokens, wide = token_tile(num_tokens), triton.cdiv(rows, _WIDTH)
    per_split = triton.cdiv(columns, max(1, min(_PROGRAMS // wide, columns // _LEAST_COLUMNS)))
    exact = operands_in_float32(x_NK)
    depth = tile_depth(exact)
    per_split = triton.cdiv(per_split, depth) * depth
    splits = triton.cdiv(columns, per_split)
    dtype = x_NK.dtype if splits == 1 else weight.totals.dtype
    out_SNM = x_NK.new_empty(splits, num_tokens, rows, dtype=dtype)
    _linear[(wide, triton.cdiv(num_tokens, tokens), splits)](
        x_NK.contiguous(), *weight, out_SNM, num_tokens, rows, columns, per_split,
        exact, tokens, _WIDTH, depth,
    )  # fmt: skip
    return out_SNM[0] if splits == 1 else out_SNM.sum(0).to(x_NK.dtype)
