"""What the serving kernels share: a tile of the product of some rows with a weight that is plain or NVFP4.

NVFP4 is decoded in registers. Bits of E2M1 and of E4M3 are those of a float16 at another exponent bias, so decoding is
a shift; code x block scale has six significant bits at most and is exact in bfloat16, so nothing is rounded before the
product's float32 sums. Importing this module needs the `triton` package.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["operands_in_float32", "product_tile", "tile_depth", "token_tile"]


@triton.jit
def _float16(bits):
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _dot(x, w, total, exact: tl.constexpr):
    if exact:
        total = tl.dot(x.to(tl.float32), w.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(x, w.to(x.dtype), total)
    return total


@triton.jit
def product_tile(
    x, x_rows, x_there, weight, scales, w_rows, w_there, columns, first, last,
    coded: tl.constexpr, exact: tl.constexpr, tokens: tl.constexpr, width: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Columns `first` to `last` of x[x_rows] W[w_rows]^T, float32 [tokens, width]; coded: without the row scales."""
    total = tl.zeros((tokens, width), tl.float32)
    for start in range(first, last, depth):
        if coded:
            byte = start // 2 + tl.arange(0, depth // 2)
            inside = byte < last // 2
            there = inside[:, None] & w_there[None, :]
            pair = tl.load(weight + w_rows[None, :] * (columns // 2) + byte[:, None], mask=there, other=0)
            scale = tl.load(scales + w_rows[None, :] * (columns // 16) + (byte // 8)[:, None], mask=there, other=0)
            pair = pair.to(tl.int32)
            # Biases of 15 in place of 1 (E2M1) and of 7 (E4M3): 2^14 and 2^8.
            step = _float16((scale.to(tl.int32) & 0x7F) << 7) * 4194304.0
            low = _float16(((pair & 0x8) << 12) | ((pair & 0x7) << 9)) * step
            high = _float16(((pair & 0x80) << 8) | ((pair & 0x70) << 5)) * step
            x_at = x + x_rows[:, None] * columns + 2 * byte[None, :]
            x_mask = x_there[:, None] & inside[None, :]
            total = _dot(tl.load(x_at, mask=x_mask, other=0.0), low, total, exact)
            total = _dot(tl.load(x_at + 1, mask=x_mask, other=0.0), high, total, exact)
        else:
            column = start + tl.arange(0, depth)
            inside = column < last
            there = inside[:, None] & w_there[None, :]
            w_tile = tl.load(weight + w_rows[None, :] * columns + column[:, None], mask=there, other=0.0)
            x_mask = x_there[:, None] & inside[None, :]
            x_tile = tl.load(x + x_rows[:, None] * columns + column[None, :], mask=x_mask, other=0.0)
            total = _dot(x_tile, w_tile, total, exact)
    return total


def operands_in_float32(x: Tensor) -> bool:
    """Whether products take float32: activations are, or Triton's interpreter runs, which has no bfloat16 products.

    Bfloat16 numbers are float32 numbers, so the interpreter's products are those of the tensor units.
    """
    return x.dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"


def token_tile(num_tokens: int) -> int:
    """Rows of a tile: 16, the least that the tensor units take, to 64."""
    return min(64, max(16, int(triton.next_power_of_2(num_tokens))))


def tile_depth(exact: bool) -> int:
    """Columns of a step: float32 tiles are twice as large, and would not fit a small device's shared memory."""
    return 64 if exact else 128
