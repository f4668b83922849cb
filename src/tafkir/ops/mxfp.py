"""MXFP4 and MXFP8: E2M1 or E4M3 elements under one power of two for each block of 32 (OCP Microscaling, 2310.10537).

Shapes: K values along the last dim, a multiple of 32; K / 32 scales, uint8, of value 2^(byte - 127) (E8M0).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.ops.blocks import MX_BLOCK_SIZE
from tafkir.ops.fp8 import FP8_MAX
from tafkir.ops.nvfp4 import E2M1_MAX, block_amax, decode_e2m1, encode_e2m1

__all__ = [
    "MX_BLOCK_SIZE",
    "MxConvention",
    "dequantize_mxfp4",
    "dequantize_mxfp8",
    "mx_scale",
    "mx_step",
    "quantize_mxfp4",
    "quantize_mxfp4_reference",
    "quantize_mxfp8",
    "quantize_mxfp8_reference",
]

MxConvention = Literal["ocp", "modelopt"]
"""ocp: the power of two below the block's maximum, the next one from a mantissa of 1.75 on, as compressed-tensors 0.19
has it; ties go to the even code. modelopt: the first power of two under which nothing saturates, as ModelOpt 0.47 has
it; MXFP4's ties go to zero, and its zeros become -0. On Gaussian weights ocp's squared error is 11 % smaller."""

_BIAS = 127
_LARGEST = 254  # 255 is NaN
_MAX = {"e2m1": E2M1_MAX, "e4m3": FP8_MAX}
_MAX_EXPONENT = {"e2m1": 2, "e4m3": 8}
_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def mx_scale(largest: Tensor, element: Literal["e2m1", "e4m3"], convention: MxConvention = "ocp") -> Tensor:
    """The scale of blocks with these maxima, uint8; 0 (2^-127) for a block of zeros."""
    if convention == "ocp":
        # A quarter more carries mantissas from 1.75 on into the exponent; the rest is cut off.
        exponent = ((largest.float().contiguous().view(torch.int32) + (1 << 21)) >> 23) - _MAX_EXPONENT[element]
    else:
        exponent = (largest.float() / _MAX[element]).log2().clamp_min(-_BIAS).ceil().int() + _BIAS
    return exponent.clamp(0, _LARGEST).to(torch.uint8)


def mx_step(scale: Tensor) -> Tensor:
    """2^(byte - 127), float32: what the elements of a block are multiplied by."""
    return torch.ldexp(torch.ones(scale.shape, device=scale.device), scale.int() - _BIAS)


def quantize_mxfp4(values: Tensor, convention: MxConvention = "ocp") -> tuple[Tensor, Tensor]:
    """Quantize to MXFP4.

    Args:
        values: [..., K], any floating dtype.
        convention: how scales and ties are rounded.

    Returns:
        Codes, uint8 [..., K / 2], the even one in the low nibble; scales, uint8 [..., K / 32].

    Raises:
        CheckpointError: K is not a multiple of 32, or values are not finite.
    """
    scale = mx_scale(_largest(values), "e2m1", convention)
    step = mx_step(scale)
    if convention == "ocp":
        return encode_e2m1(values, step.repeat_interleave(2, dim=-1)), scale
    ratio = values.float() / step.repeat_interleave(MX_BLOCK_SIZE, dim=-1)
    codes = torch.bucketize(ratio.abs(), torch.tensor(_BOUNDS, device=values.device)).to(torch.uint8)
    codes |= (ratio <= 0).to(torch.uint8) << 3
    return codes[..., ::2] | codes[..., 1::2] << 4, scale


def dequantize_mxfp4(
    packed: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """value = code x 2^(scale - 127), rounded once to the wanted dtype.

    Raises:
        CheckpointError: the shapes do not belong together.
    """
    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    _check_scale(shape, scale)
    values = torch.empty(shape, dtype=dtype, device=packed.device) if out is None else out
    return decode_e2m1(packed, mx_step(scale).repeat_interleave(2, dim=-1), values)


def quantize_mxfp8(values: Tensor, convention: MxConvention = "ocp") -> tuple[Tensor, Tensor]:
    """Quantize to MXFP8: codes, float8_e4m3fn [..., K], and scales, uint8 [..., K / 32]. Errors as `quantize_mxfp4`."""
    scale = mx_scale(_largest(values), "e4m3", convention)
    ratio = values.float() / mx_step(scale).repeat_interleave(MX_BLOCK_SIZE, dim=-1)
    if convention == "ocp":
        ratio += 0.0  # the peer adds a zero point, which makes 0 of -0
    return ratio.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def dequantize_mxfp8(
    codes: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """value = code x 2^(scale - 127), rounded once to the wanted dtype. Errors as `dequantize_mxfp4`."""
    _check_scale(tuple(codes.shape), scale)
    values = codes.float() * mx_step(scale).repeat_interleave(MX_BLOCK_SIZE, dim=-1)
    return values.to(dtype) if out is None else out.copy_(values)


def quantize_mxfp4_reference(values: Tensor, convention: MxConvention = "ocp") -> tuple[Tensor, Tensor]:
    """Like `quantize_mxfp4`, value by value."""
    scale = _scale_reference(values, "e2m1", convention)
    packed = torch.zeros(*values.shape[:-1], values.shape[-1] // 2, dtype=torch.uint8)
    for where in torch.cartesian_prod(*map(torch.arange, (*values.shape, 1)))[:, :-1].tolist():
        *rest, k = where
        ratio = float(values[tuple(where)]) / 2.0 ** (int(scale[(*rest, k // MX_BLOCK_SIZE)]) - _BIAS)
        even, zero = convention == "ocp", convention == "modelopt"
        code = sum(
            abs(ratio) > bound or (even and i % 2 == 1 and abs(ratio) == bound) for i, bound in enumerate(_BOUNDS)
        )
        code |= 8 if ratio < 0 or (zero and ratio == 0) else 0
        packed[(*rest, k // 2)] |= code << 4 * (k % 2)
    return packed, scale


def quantize_mxfp8_reference(values: Tensor, convention: MxConvention = "ocp") -> tuple[Tensor, Tensor]:
    """Like `quantize_mxfp8`, block by block."""
    scale = _scale_reference(values, "e4m3", convention)
    blocks = values.float().reshape(-1, MX_BLOCK_SIZE)
    codes = [
        (block / 2.0 ** (byte - _BIAS) + (0.0 if convention == "ocp" else -0.0))
        .clamp(-FP8_MAX, FP8_MAX)
        .to(torch.float8_e4m3fn)
        for block, byte in zip(blocks, scale.flatten().tolist(), strict=True)
    ]
    return torch.stack(codes).view(values.shape), scale


def _scale_reference(values: Tensor, element: Literal["e2m1", "e4m3"], convention: MxConvention) -> Tensor:
    _largest(values)
    out = []
    for block in values.float().reshape(-1, MX_BLOCK_SIZE).tolist():
        amax, byte = max(map(abs, block)), 0
        if amax and convention == "ocp":
            while byte < _LARGEST and amax >= 1.75 * 2.0 ** (byte - _BIAS + _MAX_EXPONENT[element]):
                byte += 1
        elif amax:
            while byte < _LARGEST and amax > _MAX[element] * 2.0 ** (byte - _BIAS):
                byte += 1
        out.append(byte)
    return torch.tensor(out, dtype=torch.uint8).view(*values.shape[:-1], -1)


def _largest(values: Tensor) -> Tensor:
    if values.dim() < 1 or values.shape[-1] % MX_BLOCK_SIZE:
        raise CheckpointError(
            f"a tensor of shape {list(values.shape)} has no blocks of {MX_BLOCK_SIZE}",
            expected=f"a last dim that is a multiple of {MX_BLOCK_SIZE}",
            fix="keep this tensor in another format",
        )
    halves = block_amax(values)
    largest = torch.maximum(halves[..., ::2], halves[..., 1::2])
    if not torch.isfinite(largest).all():
        raise CheckpointError("the values to quantize are not finite", fix="use an earlier checkpoint")
    return largest


def _check_scale(shape: tuple[int, ...], scale: Tensor) -> None:
    expected = (*shape[:-1], shape[-1] // MX_BLOCK_SIZE)
    if shape[-1] % MX_BLOCK_SIZE or tuple(scale.shape) != expected or scale.dtype != torch.uint8:
        raise CheckpointError(
            f"the scales are {scale.dtype} {list(scale.shape)}", expected=f"torch.uint8 {list(expected)}"
        )
