"""NVFP4: 4-bit E2M1 codes, an E4M3 scale for each block of 16 and one float32 scale over all of them.

Shapes: K values along the last dim, K / 2 bytes of codes, K / 16 block scales; any leading dims before them. The
first `lead` dims (experts, tokens) may have a global scale each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.ops import native
from tafkir.ops.blocks import NVFP4_BLOCK_SIZE as BLOCK_SIZE
from tafkir.ops.fp8 import FP8_MAX

__all__ = [
    "BLOCK_SIZE",
    "E2M1_MAX",
    "E2M1_VALUES",
    "SMALLEST_SCALE",
    "Nvfp4",
    "block_amax",
    "check_blocks",
    "checked_amax",
    "decode_e2m1",
    "dequantize_nvfp4",
    "dequantize_nvfp4_reference",
    "encode_e2m1",
    "encode_nvfp4",
    "encode_nvfp4_reference",
    "fake_quantize_nvfp4",
    "fake_quantize_nvfp4_reference",
    "nearest_e2m1",
    "nvfp4_amax",
    "nvfp4_block_scale",
    "nvfp4_global_scale",
    "nvfp4_step",
    "quantize_nvfp4",
    "quantize_nvfp4_reference",
]

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by the lower three bits of a code; bit 3 is the sign, so that code 8 is -0."""

E2M1_MAX = 6.0

# What a block of zeros would need is 0; the smallest E4M3 number keeps every other block's scale above it.
SMALLEST_SCALE = 2.0**-9
_TINY = torch.finfo(torch.float32).tiny
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
# Values quantized at once: their temporaries stay in the processor's cache.
_CHUNK = 1 << 18


class Nvfp4(NamedTuple):
    """A tensor [..., K] in NVFP4: value = E2M1 code x block scale x global scale.

    compressed-tensors stores the inverse of the global scale (`weight_global_scale`), and divides by it.

    Attributes:
        packed: uint8 [..., K / 2], two codes a byte, the even one in the low nibble.
        scale: float8_e4m3fn [..., K / 16], row-major.
        global_scale: float32, the first `lead` dims; [] where the whole tensor has one.
    """

    packed: Tensor
    scale: Tensor
    global_scale: Tensor


def nvfp4_amax(values: Tensor, *, lead: int = 0) -> Tensor:
    """Largest magnitude over all but the first `lead` dims, float32."""
    if values.numel() == 0:
        return torch.zeros(values.shape[:lead], device=values.device)
    return values.flatten(lead).abs().amax(-1).float()


def nvfp4_global_scale(amax: Tensor, *, scale_max: float = FP8_MAX) -> Tensor:
    """amax / (6 x scale_max), float32: with it, the block scale of the largest value is `scale_max`.

    All-zero values get 1, so that nothing divides by zero later on. An amax below 3e-35 counts as 3e-35, where the
    products of the scales would leave float32.

    Args:
        amax: largest magnitude, any shape; shared over tensors that a kernel reads as one (q/k/v, gate/up).
        scale_max: 448; 256 leaves room for "four over six" (arXiv 2512.02010).
    """
    amax = amax.float()
    scale = (amax / (E2M1_MAX * scale_max)).clamp_min(_TINY)
    return torch.where(amax > 0, scale, torch.ones_like(scale))


def nvfp4_block_scale(amax: Tensor, global_scale: Tensor) -> Tensor:
    """The E4M3 scale of each block: amax / 6 in units of the global scale, rounded to the nearest, ties to even.

    A block of zeros gets 1; other scales stay between 2^-9, the smallest subnormal, and 448.

    Args:
        amax: of each block, [..., K / 16].
        global_scale: broadcast over the trailing dims of `amax`.
    """
    scale = amax.float() / (E2M1_MAX * _spread(global_scale, amax))
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale.clamp(SMALLEST_SCALE, FP8_MAX).to(torch.float8_e4m3fn)


def quantize_nvfp4(values: Tensor, *, amax: Tensor | float | None = None, lead: int = 0) -> Nvfp4:
    """Quantize to NVFP4 by block maxima, bit for bit as ModelOpt 0.47 does, except that zeros stay finite.

    global = amax / 2688; scale = E4M3(block amax / 6 / global); code = E2M1(value / (scale x global)), the nearest,
    ties to the even code, beyond 6 saturated. Negative values that round to zero become -0; 0.0 and -0.0 become 0.

    Args:
        values: [..., K], any floating dtype, K a multiple of 16.
        amax: calibrated largest magnitude (activations, tensors that share a scale), a number or [*lead dims];
            larger values saturate. None takes the values' own.
        lead: leading dims with a global scale each.

    Raises:
        CheckpointError: K is not a multiple of 16, values are not finite, or `amax` is negative, not finite, of
            another shape, or zero for values that are not.
    """
    check_blocks(values, lead)
    largest = block_amax(values)
    total = checked_amax(largest, amax, lead)
    scale_G = nvfp4_global_scale(total)
    if lead == 0 and _native(values):
        bits = torch.empty(largest.shape, dtype=torch.uint8)
        packed = torch.empty(*values.shape[:-1], values.shape[-1] // 2, dtype=torch.uint8)
        kind, factor = _KINDS[values.dtype], float(scale_G)
        native.call("tafkir_quantize_nvfp4", values.contiguous(), kind, bits.numel(), factor, bits, packed)
        return Nvfp4(packed, bits.view(torch.float8_e4m3fn), scale_G)
    scale = nvfp4_block_scale(largest, scale_G)
    return Nvfp4(encode_nvfp4(values, scale, scale_G), scale, scale_G)


def encode_nvfp4(values: Tensor, scale: Tensor, global_scale: Tensor, *, inverse: bool = False) -> Tensor:
    """Codes of the values under given scales, packed: uint8 [..., K / 2].

    Args:
        values: [..., K], any floating dtype.
        scale: float8_e4m3fn [..., K / 16], whatever chose it.
        global_scale: float32, its dims the first of `values`.
        inverse: the global scale is one to divide by, as compressed-tensors has it.
    """
    return encode_e2m1(values, nvfp4_step(scale, global_scale, inverse=inverse))


def nvfp4_step(scale: Tensor, global_scale: Tensor, *, inverse: bool = False) -> Tensor:
    """What the codes of each block are multiplied by, float32, of the scales' shape."""
    spread = _spread(global_scale, scale)
    return scale.float() / spread if inverse else scale.float() * spread


def encode_e2m1(values: Tensor, step: Tensor) -> Tensor:
    """The nearest E2M1 codes of value / step, ties to the even code, beyond 6 saturated; packed, uint8 [..., K / 2].

    Negative ratios that round to zero become -0 (code 8); 0.0 and -0.0 become code 0.

    Args:
        values: [..., K], any floating dtype.
        step: float32 [..., K / 16]; blocks of 32 repeat theirs.
    """
    shape = (*values.shape[:-1], values.shape[-1] // 2)
    blocks = values.reshape(-1, BLOCK_SIZE)
    packed = torch.empty(len(blocks), BLOCK_SIZE // 2, dtype=torch.uint8, device=values.device)
    if _native(values):
        step = step.contiguous()
        native.call("tafkir_encode_e2m1", blocks.contiguous(), _KINDS[values.dtype], len(blocks), step, packed)
        return packed.view(shape)
    steps = step.reshape(-1, 1)
    for rows in _chunks(len(blocks)):
        codes = _codes(blocks[rows].float() / steps[rows])
        torch.bitwise_or(codes[:, ::2], codes[:, 1::2] << 4, out=packed[rows])
    return packed.view(shape)


def _native(values: Tensor) -> bool:
    """Whether the compiled kernels read these values; they give the same bits."""
    plain = values.device.type == "cpu" and values.numel() > 0 and type(values) is Tensor
    return plain and values.dtype in _KINDS and native.kernels_in_use() == "native"


def _codes(ratio: Tensor) -> Tensor:
    """The nearest E2M1 code, uint8; the comparisons say to which side each tie goes."""
    size = ratio.abs()
    codes = (size > 0.25).to(torch.uint8)
    codes += size >= 0.75
    codes += size > 1.25
    codes += size >= 1.75
    codes += size > 2.5
    codes += size >= 3.5
    codes += size > 5.0
    return codes.bitwise_or_((ratio < 0).to(torch.uint8) << 3)


def dequantize_nvfp4(
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    inverse: bool = False,
) -> Tensor:
    """value = code x (block scale x global scale), in float32, rounded once to the wanted dtype.

    Args:
        packed: uint8 [..., K / 2].
        scale: float8_e4m3fn [..., K / 16].
        global_scale: float32, its dims the first of `packed`.
        dtype: of the result where `out` is not given.
        out: [..., K], contiguous, any floating dtype: filled and returned.
        inverse: the global scale is one to divide by, as compressed-tensors has it.

    Raises:
        CheckpointError: the shapes or dtypes do not belong together.
    """
    shape = _check_packed(packed, scale, global_scale)
    values = torch.empty(shape, dtype=dtype, device=packed.device) if out is None else out
    return decode_e2m1(packed, nvfp4_step(scale, global_scale, inverse=inverse), values)


def decode_e2m1(packed: Tensor, step: Tensor, out: Tensor) -> Tensor:
    """value = code x step, in float32, rounded once to the dtype of `out`, which is filled and returned.

    Args:
        packed: uint8 [..., K / 2].
        step: float32 [..., K / 16].
        out: [..., K], contiguous, any floating dtype.
    """
    pairs, steps = _pairs(packed.device), step.reshape(-1, 1)
    bytes_flat, blocks = packed.reshape(-1, BLOCK_SIZE // 2), out.view(-1, BLOCK_SIZE)
    for rows in _chunks(len(blocks)):
        wide = pairs.index_select(0, bytes_flat[rows].flatten().int())
        blocks[rows] = wide.view(-1, BLOCK_SIZE).mul_(steps[rows]).to(out.dtype)
    return out


def fake_quantize_nvfp4(values: Tensor, *, amax: Tensor | float | None = None, lead: int = 0) -> Tensor:
    """What the values become in NVFP4, in their own dtype: `dequantize_nvfp4(*quantize_nvfp4(values))` in one pass.

    Arguments and errors are those of `quantize_nvfp4`.
    """
    check_blocks(values, lead)
    largest = block_amax(values)
    scale_G = nvfp4_global_scale(checked_amax(largest, amax, lead))
    step = nvfp4_step(nvfp4_block_scale(largest, scale_G), scale_G)
    blocks, steps = values.reshape(-1, BLOCK_SIZE), step.reshape(-1, 1)
    result = torch.empty_like(blocks)
    for rows in _chunks(len(blocks)):
        result[rows] = nearest_e2m1(blocks[rows].float() / steps[rows]).mul_(steps[rows]).to(values.dtype)
    return result.view(values.shape)


def nearest_e2m1(ratio: Tensor) -> Tensor:
    """The nearest E2M1 value of each ratio (float32): multiples of 0.5 below 2, of 1 below 4, of 2 up to 6.

    `round` takes ties to even, as codes do; negative ratios that round to zero become -0.
    """
    size = ratio.abs().clamp_(max=E2M1_MAX)
    spacing = 0.5 + 0.5 * (size >= 2.0) + (size >= 4.0)
    rounded = torch.div(size, spacing).round_().mul_(spacing)
    return torch.where(ratio < 0, -rounded, rounded)


# ---- references ----------------------------------------------------------------------------------------------------


def quantize_nvfp4_reference(values: Tensor, *, amax: Tensor | float | None = None, lead: int = 0) -> Nvfp4:
    """Like `quantize_nvfp4`, one block after the other."""
    check_blocks(values, lead)
    scale_G = nvfp4_global_scale(checked_amax(block_amax(values), amax, lead))
    scale = torch.empty(*values.shape[:-1], values.shape[-1] // BLOCK_SIZE, dtype=torch.float8_e4m3fn)
    for where in _indices(scale):
        block: tuple[int | slice, ...] = (*where[:-1], slice(where[-1] * BLOCK_SIZE, (where[-1] + 1) * BLOCK_SIZE))
        scale[where] = nvfp4_block_scale(values[block].float().abs().amax(), scale_G[where[:lead]])
    return Nvfp4(encode_nvfp4_reference(values, scale, scale_G), scale, scale_G)


def encode_nvfp4_reference(values: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """Like `encode_nvfp4`, value by value: the nearest of the eight magnitudes, of two equally near the even code."""
    lead = global_scale.dim()
    packed = torch.zeros(*values.shape[:-1], values.shape[-1] // 2, dtype=torch.uint8)
    for where in _indices(values):
        *rest, k = where
        step = scale[*rest, k // BLOCK_SIZE].float() * global_scale[where[:lead]]
        ratio = float(values[where].float() / step)
        size = min(abs(ratio), E2M1_MAX)
        code = min((abs(size - value), code & 1, code) for code, value in enumerate(E2M1_VALUES))[2]
        code |= 8 if ratio < 0 else 0
        packed[*rest, k // 2] |= code << 4 * (k % 2)
    return packed


def dequantize_nvfp4_reference(
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Like `dequantize_nvfp4`, value by value."""
    shape = _check_packed(packed, scale, global_scale)
    values = torch.empty(shape, dtype=dtype) if out is None else out
    for where in _indices(values):
        *rest, k = where
        code = int(packed[*rest, k // 2]) >> 4 * (k % 2) & 0xF
        value = E2M1_VALUES[code & 7] * (-1.0 if code & 8 else 1.0)
        values[where] = value * (scale[*rest, k // BLOCK_SIZE].float() * global_scale[where[: global_scale.dim()]])
    return values


def fake_quantize_nvfp4_reference(values: Tensor, *, amax: Tensor | float | None = None, lead: int = 0) -> Tensor:
    """Like `fake_quantize_nvfp4`: there and back by the other references."""
    return dequantize_nvfp4_reference(*quantize_nvfp4_reference(values, amax=amax, lead=lead), dtype=values.dtype)


# ---- parts ---------------------------------------------------------------------------------------------------------


def check_blocks(values: Tensor, lead: int) -> None:
    """Raises CheckpointError where the last dim does not split into blocks, or there are fewer than `lead` others."""
    if values.dim() < 1 or values.shape[-1] % BLOCK_SIZE:
        raise CheckpointError(
            f"a tensor of shape {list(values.shape)} has no blocks of {BLOCK_SIZE}",
            expected=f"a last dim that is a multiple of {BLOCK_SIZE}",
            fix="keep this tensor in another format",
        )
    if not 0 <= lead < values.dim():
        raise CheckpointError(f"lead={lead} for a tensor of {values.dim()} dims", expected="fewer than it has")


def _check_packed(packed: Tensor, scale: Tensor, global_scale: Tensor) -> tuple[int, ...]:
    """The shape of the values."""
    for name, tensor, dtype in (("codes", packed, torch.uint8), ("scales", scale, torch.float8_e4m3fn)):
        if tensor.dtype != dtype:
            raise CheckpointError(f"the {name} are {tensor.dtype}", expected=str(dtype))
    rest, width = tuple(packed.shape[:-1]), packed.shape[-1] * 2
    expected = (*rest, width // BLOCK_SIZE)
    if width % BLOCK_SIZE or tuple(scale.shape) != expected:
        raise CheckpointError(
            f"the scales have shape {list(scale.shape)}",
            expected=f"{list(expected)}, one for each block of {BLOCK_SIZE} of {[*rest, width]}",
        )
    lead = global_scale.dim()
    if lead > len(rest) or tuple(global_scale.shape) != rest[:lead]:
        raise CheckpointError(
            f"the global scale has shape {list(global_scale.shape)}", expected=f"[] or the first dims of {list(rest)}"
        )
    return (*rest, width)


def block_amax(values: Tensor) -> Tensor:
    """Largest magnitude of each block of 16, [..., K / 16], float32; NaN where the block has one."""
    shape = (*values.shape[:-1], values.shape[-1] // BLOCK_SIZE)
    if _native(values):
        out = torch.empty(shape)
        native.call("tafkir_block_amax", values.contiguous(), _KINDS[values.dtype], out.numel(), out)
        return out
    return values.reshape(*shape, BLOCK_SIZE).abs().amax(-1).float()


def checked_amax(largest: Tensor, amax: Tensor | float | None, lead: int) -> Tensor:
    """The amax that the global scale is made of, [*lead dims]; that of the blocks where none is given."""
    own = nvfp4_amax(largest, lead=lead)
    if not torch.isfinite(own).all():
        raise CheckpointError("the values to quantize are not finite", fix="use an earlier checkpoint")
    if amax is None:
        return own
    given = torch.as_tensor(amax, dtype=torch.float32, device=own.device)
    if given.dim() and given.shape != own.shape:
        raise CheckpointError(f"amax has shape {list(given.shape)}", expected=f"[] or {list(own.shape)}")
    if not (torch.isfinite(given) & (given >= 0)).all() or bool(((given == 0) & (own > 0)).any()):
        raise CheckpointError(
            f"amax={given.tolist()} for values up to {float(own.max()):g}",
            expected="a positive, finite number",
            fix="calibrate on data that reaches this tensor",
        )
    return given.expand_as(own)


def _spread(scale: Tensor, like: Tensor) -> Tensor:
    """A tensor over the first dims of another, with as many dims as it."""
    return scale.reshape((*scale.shape, *(1,) * (like.dim() - scale.dim())))


def _pairs(device: torch.device) -> Tensor:
    """[256, 2]: the two values of every byte."""
    signed = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([signed[byte & 0xF], signed[byte >> 4]], dim=1)


def _chunks(num_blocks: int) -> Iterator[slice]:
    size = _CHUNK // BLOCK_SIZE
    for first in range(0, num_blocks, size):
        yield slice(first, first + size)


def _indices(tensor: Tensor) -> Iterator[tuple[int, ...]]:
    for flat in range(tensor.numel()):
        yield tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), tensor.shape))
