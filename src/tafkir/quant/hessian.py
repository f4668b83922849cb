"""Block scales of NVFP4 weights by what their errors do to the outputs, not by the errors themselves (local Hessian).

For a matrix with inputs x, the output error of a row is dw^T H dw with H = E[x x^T]. Within a block of 16 the
16x16 part of H is exact; what blocks do to each other is GPTQ's business (`gptq.py`).

Shapes: N rows, K columns, B = K / 16 blocks of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.ops.nvfp4 import (
    BLOCK_SIZE,
    E2M1_MAX,
    Nvfp4,
    block_amax,
    check_blocks,
    checked_amax,
    encode_nvfp4,
    nearest_e2m1,
    nvfp4_global_scale,
)

__all__ = ["ABOVE", "BELOW", "block_moments", "search_local_hessian"]

BELOW, ABOVE = 16, 8
"""Candidates: E4M3 numbers from about a quarter to twice the scale that maps a block's maximum to 6."""

_NUM_SCALES = 127  # E4M3 numbers from 0 to 448
_DAMPING = 0.01
_CHUNK = 1 << 16  # blocks looked at in one piece


def block_moments(x: Tensor) -> Tensor:
    """Sums of x x^T over inputs [N, K] within each block of 16: float32 [B, 16, 16]."""
    blocks_BNK = x.float().reshape(len(x), -1, BLOCK_SIZE).transpose(0, 1)
    return blocks_BNK.transpose(1, 2) @ blocks_BNK


def search_local_hessian(weight: Tensor, moments_BKK: Tensor, *, amax: Tensor | float | None = None) -> Nvfp4:
    """Quantize with the block scales whose output error on the seen inputs is smallest.

    A hundredth of each block's mean second moment is added to H's diagonal, so that directions that no input had
    count a little; where inputs were all zero, H is the identity, and so the choice that of "mse".

    Args:
        weight: [N, K], any floating dtype.
        moments_BKK: H of every block, [B, 16, 16], any positive multiple of it.
        amax: shared over tensors that a kernel reads as one; None takes the weight's own.

    Raises:
        CheckpointError: the weight is not finite, or the moments have another shape or are not finite.
    """
    check_blocks(weight, 0)
    num_blocks = weight.shape[-1] // BLOCK_SIZE
    if tuple(moments_BKK.shape) != (num_blocks, BLOCK_SIZE, BLOCK_SIZE) or not moments_BKK.isfinite().all():
        raise CheckpointError(
            f"second moments of shape {list(moments_BKK.shape)}",
            expected=f"finite numbers of shape {[num_blocks, BLOCK_SIZE, BLOCK_SIZE]}",
        )
    largest = block_amax(weight)
    total = nvfp4_global_scale(checked_amax(largest, amax, 0))
    steps = torch.arange(_NUM_SCALES, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * total
    low = torch.searchsorted(E2M1_MAX * steps, largest).clamp_(1, _NUM_SCALES - 1)
    hessian = _damped(moments_BKK)
    bits = torch.empty(low.shape, dtype=torch.uint8)
    rows = max(1, _CHUNK // num_blocks)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        bits[part] = _search(weight[part].float(), low[part], steps, hessian)
    scale = bits.view(torch.float8_e4m3fn)
    return Nvfp4(encode_nvfp4(weight, scale, total), scale, total)


def _damped(moments_BKK: Tensor) -> Tensor:
    """H with unit mean diagonal, and a little more on it; the identity where nothing was seen."""
    moments = moments_BKK.float()
    mean = moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(BLOCK_SIZE)
    return torch.where(mean > 0, moments / mean.clamp_min(torch.finfo(torch.float32).tiny), eye) + _DAMPING * eye


def _search(weight_NK: Tensor, low_NB: Tensor, steps: Tensor, hessian_BKK: Tensor) -> Tensor:
    """Bits [N, B] of the best scale: of equal ones, that nearest to the maximum's, the smaller first."""
    rows, num_blocks = low_NB.shape
    blocks_BNK = weight_NK.view(rows, num_blocks, BLOCK_SIZE).transpose(0, 1).contiguous()
    low_BN = low_NB.T
    best, chosen = torch.full(low_BN.shape, torch.inf), low_BN.clone()
    for offset in sorted(range(-BELOW, ABOVE + 1), key=lambda k: (abs(k), k)):
        k = (low_BN + offset).clamp(1, _NUM_SCALES - 1)
        step = steps[k][..., None]
        error = blocks_BNK - nearest_e2m1(blocks_BNK / step).mul_(step)
        cost = ((error @ hessian_BKK) * error).sum(-1)
        better = cost < best
        best = torch.where(better, cost, best)
        chosen = torch.where(better, k, chosen)
    return chosen.T.to(torch.uint8)
