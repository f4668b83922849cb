"""FP8 weights: E4M3 codes, and one scale for each 128x128 block (DeepSeek-V3), each row, or the whole tensor.

Shapes: M rows, N columns, R = ceil(M / block rows), C = ceil(N / block columns); any leading dims before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.ops.blocks import FP8_BLOCK_SIZE as BLOCK_SIZE
from tafkir.ops.blocks import fp8_scale_shape

__all__ = [
    "BLOCK_SIZE",
    "FP8_MAX",
    "Fp8Convention",
    "dequantize_fp8",
    "dequantize_fp8_blocks",
    "dequantize_fp8_blocks_reference",
    "fp8_scale_shape",
    "quantize_fp8",
    "quantize_fp8_blocks",
    "quantize_fp8_blocks_reference",
    "quantize_fp8_reference",
]

FP8_MAX = 448.0
"""Largest finite E4M3 value."""

Fp8Convention = Literal["modelopt", "compressed-tensors"]
"""In which dtype a peer computes.

modelopt (0.47): scales in float32; codes from float32 ratios, under one scale for the whole tensor from ratios in the
weight's dtype. compressed-tensors (0.19): scales and ratios in the weight's dtype, and the dtype's epsilon as the scale
of zeros. For float32 weights both are the same, zeros apart.
"""

_TINY = torch.finfo(torch.float32).tiny
# Codes are widened through float16, whose exponents are 8 larger; the missing 2^8 goes into the scale.
_FLOAT16_SHIFT = 256.0
_SHIFTABLE = 2.0**119


def _scale_of(amax: Tensor, ue8m0: bool) -> Tensor:
    """What E4M3 codes are multiplied by: amax / 448, or the next power of two; one for a block of zeros."""
    scale = torch.where(amax > 0, amax / FP8_MAX, torch.ones_like(amax)).clamp_min(_TINY)
    if not ue8m0:
        return scale
    mantissa, exponent = torch.frexp(scale)
    # frexp gives a mantissa in [0.5, 1); an exact power of two stays what it is.
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())


def _encode(scaled: Tensor) -> Tensor:
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _refuse_non_finite(amax: Tensor) -> None:
    if not torch.isfinite(amax).all():
        raise CheckpointError("the weights to quantize are not finite", fix="use an earlier checkpoint")


def quantize_fp8(
    weight: Tensor,
    per: Literal["tensor", "row"],
    convention: Fp8Convention = "modelopt",
    *,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize a weight [M, N] to E4M3 with one scale for all of it, or for each row.

    Args:
        weight: any floating dtype.
        per: what shares a scale.
        convention: whose arithmetic.
        amax: largest magnitude that the scale covers; None takes the weight's own.

    Returns:
        Codes, float8_e4m3fn [M, N], and scales [] or [M, 1]: float32 by modelopt, else of the weight's dtype.

    Raises:
        CheckpointError: the weight is not finite.
    """
    if amax is None:
        amax = weight.abs().amax() if per == "tensor" else weight.abs().amax(-1, keepdim=True)
    _refuse_non_finite(amax)
    if convention == "modelopt":
        # Divided in float64, as Python does: the peer takes the number out of the tensor.
        scale = (amax.double() / FP8_MAX).float() if per == "tensor" else amax.float() / FP8_MAX
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        ratio = weight / scale
    else:
        scale = amax / FP8_MAX
        scale = torch.where(scale == 0, torch.finfo(weight.dtype).eps, scale)
        ratio = weight / scale + 0.0  # the peer adds a zero point, which makes 0 of -0
    return _encode(ratio), scale


def dequantize_fp8(codes: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """code x scale, in float32, rounded once to the wanted dtype.

    Args:
        codes: float8_e4m3fn [M, N].
        scale: [], [1], [M] or [M, 1].
    """
    if scale.dim() == 1:
        scale = scale.unsqueeze(-1)
    return (codes.float() * scale.float()).to(dtype)


def quantize_fp8_reference(
    weight: Tensor, per: Literal["tensor", "row"], convention: Fp8Convention = "modelopt"
) -> tuple[Tensor, Tensor]:
    """Like `quantize_fp8`, row by row."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty((), dtype=torch.float32 if convention == "modelopt" else weight.dtype)
    scales = []
    for row in range(len(weight)):
        part = weight if per == "tensor" else weight[row]
        amax = max(map(abs, part.flatten().tolist()))
        scale = torch.tensor(amax / FP8_MAX, dtype=scale.dtype)
        if scale == 0:
            scale = torch.tensor(1.0 if convention == "modelopt" else torch.finfo(scale.dtype).eps, dtype=scale.dtype)
        ratio = weight[row].float() / scale.float()
        if convention == "compressed-tensors" or per == "tensor":
            ratio = ratio.to(weight.dtype).float()
        if convention == "compressed-tensors":
            ratio = torch.where(ratio == 0, 0.0, ratio)
        codes[row] = _encode(ratio)
        scales.append(scale)
    return codes, scales[0] if per == "tensor" else torch.stack(scales).unsqueeze(-1)


def quantize_fp8_blocks_reference(
    weight: Tensor, block_size: tuple[int, int] = BLOCK_SIZE, *, ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """Like `quantize_fp8_blocks`, one block after the other."""
    scale_inv = torch.empty(fp8_scale_shape(tuple(weight.shape), block_size), dtype=torch.float32)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for where, block in _blocks(scale_inv, block_size):
        values = weight[block].float()
        amax = values.abs().amax()
        _refuse_non_finite(amax)
        scale_inv[where] = _scale_of(amax, ue8m0)
        codes[block] = _encode(values / scale_inv[where])
    return codes, scale_inv


def quantize_fp8_blocks(
    weight: Tensor, block_size: tuple[int, int] = BLOCK_SIZE, *, ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize a weight to E4M3 with one scale a block (DeepSeek-V3, arXiv 2412.19437, section 3.3).

    A partial block counts as padded with zeros. A block of zeros gets the scale one.

    Args:
        weight: [..., M, N], any floating dtype.
        block_size: rows and columns of a block.
        ue8m0: round the scales up to powers of two, as DeepSeek-V3.1 does.

    Returns:
        Codes, float8_e4m3fn [..., M, N], and `weight_scale_inv`, float32 [..., R, C]: what the codes are
        multiplied by, despite its name.

    Raises:
        CheckpointError: the weight has fewer than two dims or is not finite.
    """
    *lead, rows, columns = fp8_scale_shape(tuple(weight.shape), block_size)
    pad = (0, columns * block_size[1] - weight.shape[-1], 0, rows * block_size[0] - weight.shape[-2])
    blocks = F.pad(weight.float(), pad).view(*lead, rows, block_size[0], columns, block_size[1])
    amax = blocks.abs().amax(dim=(-3, -1))
    _refuse_non_finite(amax)
    scale_inv = _scale_of(amax, ue8m0)
    codes = _encode(blocks / scale_inv[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
    return codes[..., : weight.shape[-2], : weight.shape[-1]].contiguous(), scale_inv


def dequantize_fp8_blocks_reference(
    codes: Tensor,
    scale_inv: Tensor,
    block_size: tuple[int, int] = BLOCK_SIZE,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Like `dequantize_fp8_blocks`, one block after the other."""
    _check_scales(codes, scale_inv, block_size)
    weight = torch.empty(codes.shape, dtype=dtype)
    for where, block in _blocks(scale_inv, block_size):
        weight[block] = (codes[block].float() * scale_inv[where].float()).to(dtype)
    return weight


def dequantize_fp8_blocks(
    codes: Tensor,
    scale_inv: Tensor,
    block_size: tuple[int, int] = BLOCK_SIZE,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """weight = code x scale of its block, computed in float32 and rounded once to the wanted dtype.

    The scratch memory is a row of blocks, whatever the size of the weight. NaN codes give NaN.

    Args:
        codes: float8_e4m3fn [..., M, N].
        scale_inv: [..., R, C], float32, bfloat16 or float8_e8m0fnu.
        block_size: rows and columns of a block.
        dtype: of the result where `out` is not given.
        out: [..., M, N], any floating dtype and strides: filled and returned.

    Raises:
        CheckpointError: the scales do not have one entry a block, or the codes are not E4M3.
    """
    _check_scales(codes, scale_inv, block_size)
    weight = torch.empty(codes.shape, dtype=dtype) if out is None else out
    if codes.numel() == 0:
        return weight
    scales = scale_inv.float()
    bits = codes.view(torch.int8)
    # 0x7f and 0xff (-1 when signed) are NaN; the trick below would read them as 480.
    exact = bits.max() == 0x7F or bits.view(torch.uint8).max() == 0xFF or not (scales < _SHIFTABLE).all()
    factors = scales.repeat_interleave(block_size[1], dim=-1)[..., : codes.shape[-1]]
    if not exact:
        factors.mul_(_FLOAT16_SHIFT)
    for row in range(scales.shape[-2]):
        part = slice(row * block_size[0], (row + 1) * block_size[0])
        wide = codes[..., part, :].float() if exact else _widen(bits[..., part, :])
        weight[..., part, :].copy_(wide.mul_(factors[..., row : row + 1, :]))
    return weight


def _widen(bits: Tensor) -> Tensor:
    """E4M3 values x 2^-8 in float32, for codes that are not NaN: sign, exponent and mantissa moved to float16's place.

    Sign extension fills bits 8 to 15; shifted by 7, bit 14 is a copy of the sign that must go. Subnormals stay exact.
    """
    half = bits.to(torch.int16)
    half.bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return half.view(torch.float16).float()


def _check_scales(codes: Tensor, scale_inv: Tensor, block_size: tuple[int, int]) -> None:
    if codes.dtype != torch.float8_e4m3fn:
        raise CheckpointError(f"the codes are {codes.dtype}", expected="torch.float8_e4m3fn")
    expected = fp8_scale_shape(tuple(codes.shape), block_size)
    if tuple(scale_inv.shape) != expected:
        raise CheckpointError(
            f"the scales have shape {list(scale_inv.shape)}",
            expected=f"{list(expected)}, one for each {block_size[0]}x{block_size[1]} block of {list(codes.shape)}",
        )


def _blocks(
    scale_inv: Tensor, block_size: tuple[int, int]
) -> Iterator[tuple[tuple[int, ...], tuple[int | slice, ...]]]:
    """Index of each scale, and the slice of the weight that it belongs to."""
    for flat in range(scale_inv.numel()):
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), scale_inv.shape))
        row, column = where[-2] * block_size[0], where[-1] * block_size[1]
        yield where, (*where[:-2], slice(row, row + block_size[0]), slice(column, column + block_size[1]))
