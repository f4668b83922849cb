"""NVFP4 as training sees it: values become what the format can hold, and gradients go straight through.

Shapes: G matrices with a global scale each, K values along the last dim, a multiple of 16; any dims in between.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tafkir.errors import CheckpointError
from tafkir.ops import native
from tafkir.ops.fp8 import FP8_MAX
from tafkir.ops.nvfp4 import (
    BLOCK_SIZE,
    block_amax,
    check_blocks,
    checked_amax,
    dequantize_nvfp4,
    fake_quantize_nvfp4,
    nvfp4_block_scale,
    nvfp4_global_scale,
    nvfp4_step,
)
from tafkir.ops.nvfp4_scales import FOUR_OVER_SIX_MAX, ScaleSearch, search_nvfp4

__all__ = ["LAST_CELL", "ROUNDED_SEARCHES", "round_inputs", "round_matrices", "round_matrices_reference"]

LAST_CELL = 7.0
"""Where the cell of the last code ends, in steps: 6 is 2 from its neighbour, and so its cell is 5 to 7. Values in it
are rounded as any others; what lies beyond is cut off, and gets no gradient."""

_RULES = {"max": 0, "four_over_six": 1}
ROUNDED_SEARCHES = frozenset(_RULES)
"""Choices of block scales under which no weight is cut off, and that `round_matrices` does in one pass."""

_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_CLIPPED, _BROKEN = 1, 2


def round_matrices_reference(values: Tensor, search: ScaleSearch) -> Tensor:
    """Like `round_matrices`: every matrix is quantized, and its codes are brought back."""
    return torch.stack([dequantize_nvfp4(*search_nvfp4(matrix, search)) for matrix in values])


def round_matrices(values: Tensor, search: ScaleSearch) -> Tensor:
    """What matrices become in NVFP4: `dequantize_nvfp4(*search_nvfp4(matrix, search))` of each, in one pass.

    Args:
        values: [G, ..., K], float32 or bfloat16; each of the G has a global scale of its own.
        search: how block scales are chosen.

    Returns:
        float32 of the same shape, without a gradient.

    Raises:
        CheckpointError: K is not a multiple of 16, or values are not finite.
    """
    values = values.detach()
    plain = native.takes(values, dtypes=tuple(_KINDS))
    if search not in _RULES or not plain:
        return round_matrices_reference(values, search)
    check_blocks(values, 1)
    values = values.contiguous()
    totals_G = checked_amax(block_amax(values), None, 1)
    scale_max = FOUR_OVER_SIX_MAX if search == "four_over_six" else FP8_MAX
    globals_G = nvfp4_global_scale(totals_G, scale_max=scale_max)
    out = torch.empty(values.shape)
    blocks = values[0].numel() // BLOCK_SIZE
    sizes = (_KINDS[values.dtype], len(values), blocks)
    native.call("tafkir_round_nvfp4", values, *sizes, totals_G, globals_G, _RULES[search], out)
    return out


def round_inputs(x: Tensor, amax: float) -> Tensor:
    """Activations [..., K] in NVFP4 under the global scale amax / 2688; gradients go straight through.

    Every block has a scale of its own, made of its maximum at every call. The gradient of a value is that of what it
    was rounded to, and 0 where the global scale is too small for its block and cuts it off (beyond `LAST_CELL` steps).

    Raises:
        CheckpointError: K is not a multiple of 16, or values are not finite.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _StraightThrough.apply(x, amax))  # type: ignore[no-untyped-call]
    return _round(x, amax)[0]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: float) -> Tensor:
        out, clipped = _round(x, amax)
        ctx.inside = _inside(x, amax) if clipped else None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad if ctx.inside is None else grad * ctx.inside, None


def _round(x: Tensor, amax: float) -> tuple[Tensor, bool]:
    """The rounded values, and whether any of them may have been cut off."""
    if not (native.takes(x) and x.shape[-1] % BLOCK_SIZE == 0):
        return fake_quantize_nvfp4(x, amax=amax), True
    x, total = x.contiguous(), torch.tensor([amax])
    out, sizes = torch.empty_like(x), (_KINDS[x.dtype], 1, x.numel() // BLOCK_SIZE)
    status = native.call("tafkir_round_nvfp4", x, *sizes, total, nvfp4_global_scale(total), 0, out)
    if status & _BROKEN:
        raise CheckpointError("the values to quantize are not finite", fix="use an earlier checkpoint")
    return out, bool(status & _CLIPPED)


def _inside(x: Tensor, amax: float) -> Tensor:
    """Whether each value is at most `LAST_CELL` steps of its block."""
    global_scale = nvfp4_global_scale(torch.tensor(amax, device=x.device))
    step = nvfp4_step(nvfp4_block_scale(block_amax(x.detach()), global_scale), global_scale)
    return x.detach().float().abs() <= LAST_CELL * step.repeat_interleave(BLOCK_SIZE, dim=-1)
