"""Choosing NVFP4's scales: block maxima, "four over six", the scale of least squared error, two conventions of peers.

All of them write the same format; only the choice differs. Shapes as in `ops/nvfp4.py`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.ops import native
from tafkir.ops.fp8 import FP8_MAX
from tafkir.ops.nvfp4 import (
    BLOCK_SIZE,
    E2M1_MAX,
    SMALLEST_SCALE,
    Nvfp4,
    block_amax,
    check_blocks,
    checked_amax,
    encode_nvfp4,
    nvfp4_global_scale,
    nvfp4_step,
    quantize_nvfp4,
)

__all__ = [
    "FOUR_OVER_SIX_MAX",
    "SCALE_SEARCHES",
    "ScaleSearch",
    "quantize_nvfp4_inverse",
    "quantize_nvfp4_static",
    "search_nvfp4",
    "search_nvfp4_reference",
]

ScaleSearch = Literal["max", "four_over_six", "mse"]
SCALE_SEARCHES: tuple[ScaleSearch, ...] = get_args(ScaleSearch)

FOUR_OVER_SIX_MAX = 256.0
"""The largest block scale under "four over six": a block that maps its maximum to 4 needs 1.5 x 256 = 384 <= 448."""

_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_NUM_SCALES = 127  # E4M3 numbers from 0 to 448
_SUBNORMAL = 16  # below this code, half of a scale may be no scale
_CHUNK = 1 << 14


def quantize_nvfp4_static(
    values: Tensor, largest: Tensor, amax: Tensor | float, *, scale_max: float = FP8_MAX
) -> Nvfp4:
    """Quantize with given block maxima, as ModelOpt 0.47 exports what a search or a calibration has chosen.

    scale = E4M3((block amax / 6) x scale_max / (amax / 6)), a block of zeros as if its amax were 6; then global scale
    and codes as in `quantize_nvfp4`.

    Args:
        values: [..., K].
        largest: what each block's maximum shall count as, [..., K / 16].
        amax: of the whole tensor.
        scale_max: 448, or 256 for "four over six".
    """
    check_blocks(values, 0)
    total = checked_amax(block_amax(values), amax, 0)
    scale = _static_scale(largest, total, scale_max)
    global_scale = nvfp4_global_scale(total, scale_max=scale_max)
    return Nvfp4(encode_nvfp4(values, scale, global_scale), scale, global_scale)


def _static_scale(largest: Tensor, total: Tensor, scale_max: float) -> Tensor:
    if not total:
        return torch.ones(largest.shape, device=largest.device).to(torch.float8_e4m3fn)
    wanted = largest.float() / E2M1_MAX
    wanted = torch.where(wanted == 0, torch.ones_like(wanted), wanted)
    wanted = wanted * scale_max / (total / E2M1_MAX)
    return wanted.clamp(SMALLEST_SCALE, FP8_MAX).to(torch.float8_e4m3fn)


def quantize_nvfp4_inverse(values: Tensor, *, amax: Tensor | float | None = None) -> Nvfp4:
    """Quantize as compressed-tensors 0.19 does: the returned global scale is one to divide by.

    global = 2688 / amax and block amax / 6 are rounded to the dtype of the values, so that for BF16 weights nearly one
    nibble in a hundred differs from `quantize_nvfp4`; for float32 none does. A block whose scale rounds to 0 gets
    0.125. Where float16 overflows in 2688 / amax, which leaves the peer with a global scale of 1 and wrong weights,
    the division is done in float32.

    Args:
        values: [..., K], float32, bfloat16 or float16.
        amax: shared over tensors that a kernel reads as one; None takes the values' own.
    """
    check_blocks(values, 0)
    largest = block_amax(values)
    total = checked_amax(largest, amax, 0)
    rounded = (E2M1_MAX * FP8_MAX) / total.to(values.dtype).clamp_min(torch.finfo(values.dtype).tiny)
    global_scale = rounded.float()
    if not torch.isfinite(global_scale):
        global_scale = nvfp4_global_scale(total).reciprocal()
    if not total:
        global_scale = torch.ones_like(total)
    scale = global_scale * (largest.to(values.dtype) / E2M1_MAX).float()
    codes = scale.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    codes = torch.where(codes.float() == 0, 0.125, codes.float()).to(torch.float8_e4m3fn)
    return Nvfp4(encode_nvfp4(values, codes, global_scale, inverse=True), codes, global_scale)


def search_nvfp4(values: Tensor, search: ScaleSearch, *, amax: Tensor | float | None = None) -> Nvfp4:
    """Quantize a tensor with the block scales that a search finds; the search sees the weights alone.

    max: block maxima (`quantize_nvfp4`). four_over_six (arXiv 2512.02010): each block's maximum becomes 6 or, with a
    scale half as large again, 4, whichever has the smaller squared error. mse: of all 126 scales the one with the
    smallest squared error.

    Args:
        values: [..., K], any floating dtype.
        search: how.
        amax: shared over tensors that a kernel reads as one; None takes the values' own.

    Raises:
        CheckpointError: as `quantize_nvfp4`.
    """
    if search == "max":
        return quantize_nvfp4(values, amax=amax)
    largest, total, scale_max = _prepare(values, search, amax)
    global_scale = nvfp4_global_scale(total, scale_max=scale_max)
    blocks = values.reshape(-1, BLOCK_SIZE)
    compiled = blocks.device.type == "cpu" and blocks.numel() > 0 and native.kernels_in_use() == "native"
    if compiled and values.dtype not in _KINDS:
        blocks = blocks.float()
    blocks = blocks.contiguous()
    if search == "four_over_six":
        six, four = _static_scale(largest, total, scale_max), _static_scale(largest * 1.5, total, scale_max)
        steps = [nvfp4_step(scale, global_scale).flatten() for scale in (six, four)]
        picked = torch.empty(len(blocks), dtype=torch.uint8, device=blocks.device)
        if compiled:
            native.call("tafkir_pick_step", blocks, _KINDS[blocks.dtype], len(blocks), *steps, picked)
        else:
            for rows in _chunks(len(blocks)):
                first, second = (_error(blocks[rows], step[rows]) for step in steps)
                picked[rows] = second < first
        bits = torch.where(picked.view(six.shape) > 0, four.view(torch.uint8), six.view(torch.uint8))
    else:
        bits = torch.empty(len(blocks), dtype=torch.uint8, device=blocks.device)
        if compiled:
            factor = float(global_scale)
            native.call("tafkir_sweep_scales", blocks, _KINDS[blocks.dtype], len(blocks), factor, bits)
        else:
            for rows in _chunks(len(blocks)):
                bits[rows] = _sweep(blocks[rows], largest.flatten()[rows], global_scale)
    scale = bits.view(largest.shape).view(torch.float8_e4m3fn)
    return Nvfp4(encode_nvfp4(values, scale, global_scale), scale, global_scale)


def _prepare(values: Tensor, search: ScaleSearch, amax: Tensor | float | None) -> tuple[Tensor, Tensor, float]:
    if search not in SCALE_SEARCHES:
        raise CheckpointError(f"scales = {search!r}", expected=f"one of {', '.join(SCALE_SEARCHES)}")
    check_blocks(values, 0)
    largest = block_amax(values)
    return largest, checked_amax(largest, amax, 0), FOUR_OVER_SIX_MAX if search == "four_over_six" else FP8_MAX


def _steps(global_scale: Tensor) -> Tensor:
    """What the codes of a block are multiplied by under each of the E4M3 numbers from 0 to 448."""
    bits = torch.arange(_NUM_SCALES, dtype=torch.uint8, device=global_scale.device)
    return bits.view(torch.float8_e4m3fn).float() * global_scale


def _error(blocks: Tensor, step: Tensor) -> Tensor:
    """The squared error of each block under its step: halves added to halves, as the compiled kernel adds."""
    size, step = blocks.float().abs(), step.unsqueeze(-1)
    ratio = (size * step.reciprocal()).clamp_max_(E2M1_MAX)
    spacing = 0.5 + 0.5 * (ratio >= 2.0) + (ratio >= 4.0)
    error = (size - torch.div(ratio, spacing).round_().mul_(spacing).mul_(step)).square_()
    half = BLOCK_SIZE // 2
    while half:
        error = error[..., :half] + error[..., half : 2 * half]
        half //= 2
    return error.squeeze(-1)


def _sweep(blocks: Tensor, largest: Tensor, global_scale: Tensor) -> Tensor:
    """The best scale of each block, as bits, by looking at those alone that can be it."""
    steps = _steps(global_scale)
    low = torch.searchsorted(E2M1_MAX * steps, largest).clamp_(1, _NUM_SCALES - 1)
    best, chosen = _error(blocks, steps[low]), low.clone()
    # Below, what the largest value loses by saturation alone rules out all smaller scales sooner or later.
    open_, k = torch.arange(len(low), device=low.device), low - 1
    while len(open_):
        keep = k[open_] >= 1
        lost = largest[open_] - E2M1_MAX * steps[k[open_].clamp_min(0)]
        open_ = open_[keep & (lost * lost <= best[open_])]
        error = _error(blocks[open_], steps[k[open_]])
        better = error <= best[open_]
        best[open_] = torch.where(better, error, best[open_])
        chosen[open_] = torch.where(better, k[open_], chosen[open_])
        k = k - 1
    # Above, twice a scale that saturates nothing is never better than it: its grid is a part of the other's.
    last = (low + 7).clamp_min(_SUBNORMAL - 1).clamp_max(_NUM_SCALES - 1)
    k = low + 1
    while len(open_ := (k <= last).nonzero().flatten()):
        error = _error(blocks[open_], steps[k[open_]])
        better = error < best[open_]
        best[open_] = torch.where(better, error, best[open_])
        chosen[open_] = torch.where(better, k[open_], chosen[open_])
        k = k + 1
    return chosen.to(torch.uint8)


def _chunks(num_blocks: int) -> list[slice]:
    return [slice(first, first + _CHUNK) for first in range(0, num_blocks, _CHUNK)]


def search_nvfp4_reference(values: Tensor, search: ScaleSearch, *, amax: Tensor | float | None = None) -> Nvfp4:
    """Like `search_nvfp4`: every candidate is tried on every block, one after the other, the first of the best kept."""
    if search == "max":
        return quantize_nvfp4(values, amax=amax)
    largest, total, scale_max = _prepare(values, search, amax)
    global_scale = nvfp4_global_scale(total, scale_max=scale_max)
    if search == "four_over_six":
        scales = [_static_scale(largest * factor, total, scale_max) for factor in (1.0, 1.5)]
    else:
        bits = torch.arange(1, _NUM_SCALES, dtype=torch.uint8).view(torch.float8_e4m3fn)
        scales = [scale.expand(largest.shape) for scale in bits]
    blocks = values.reshape(-1, BLOCK_SIZE)
    errors = torch.stack([_error(blocks, nvfp4_step(scale, global_scale).flatten()) for scale in scales])
    # The first of the smallest: `argmin` promises no order.
    first = (errors == errors.amin(0)).int().argmax(0)
    stacked = torch.stack([scale.contiguous().view(torch.uint8).flatten() for scale in scales])
    scale = stacked.gather(0, first[None]).view(largest.shape).view(torch.float8_e4m3fn)
    return Nvfp4(encode_nvfp4(values, scale, global_scale), scale, global_scale)
