"""INT8 with a scale for each row, and INT4 in groups along the rows: symmetric, as compressed-tensors stores them.

Shapes: N rows, K values along the last dim, G = K / group size. Scales are computed and kept in the weight's dtype, as
the peer does: amax / 127.5 and amax / 7.5, so that the most negative code is used, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.ops.blocks import INT4_GROUP_SIZE

__all__ = [
    "INT4_GROUP_SIZE",
    "dequantize_int4",
    "dequantize_int8",
    "pack_int4",
    "quantize_int4",
    "quantize_int4_reference",
    "quantize_int8",
    "quantize_int8_reference",
    "unpack_int4",
]

_PER_WORD = 8


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight [N, K] to int8 codes [N, K] and scales [N, 1] in the weight's dtype.

    Raises:
        CheckpointError: the weight is no matrix or is not finite.
    """
    return _quantize(_matrix(weight), 8)


def dequantize_int8(codes: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """code x scale, in float32, rounded once to the wanted dtype."""
    return (codes.float() * scale.float()).to(dtype)


def quantize_int4(weight: Tensor, group_size: int = INT4_GROUP_SIZE) -> tuple[Tensor, Tensor]:
    """Quantize a weight [N, K] to packed codes, int32 [N, K / 8], and scales [N, G] in the weight's dtype.

    Raises:
        CheckpointError: the weight is no matrix, is not finite, or K is no multiple of the group size or of 8.
    """
    weight = _matrix(weight)
    if group_size < 1 or weight.shape[1] % group_size or weight.shape[1] % _PER_WORD:
        raise CheckpointError(
            f"rows of {weight.shape[1]} weights have no groups of {group_size}",
            expected=f"a multiple of {group_size} and of {_PER_WORD}",
            fix="keep this tensor in another format",
        )
    codes, scale = _quantize(weight.unflatten(-1, (-1, group_size)), 4)
    return pack_int4(codes.flatten(-2)), scale.squeeze(-1)


def dequantize_int4(packed: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """code x scale of its group, in float32, rounded once to the wanted dtype; the group size is that of the shapes."""
    codes = unpack_int4(packed)
    if scale.shape[:-1] != codes.shape[:-1] or not scale.shape[-1] or codes.shape[-1] % scale.shape[-1]:
        raise CheckpointError(
            f"the scales have shape {list(scale.shape)}", expected=f"equal groups along the rows of {list(codes.shape)}"
        )
    groups: Tensor = codes.unflatten(-1, (scale.shape[-1], -1))
    return (groups.float() * scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes from -8 to 7, int8 [..., K], as code + 8 in four bits, the first in the lowest: int32 [..., K / 8]."""
    words = (codes.int() + 8).unflatten(-1, (-1, _PER_WORD))
    return torch.bitwise_left_shift(words, _shifts(codes)).sum(-1, dtype=torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """The codes of `pack_int4`, int8 [..., K]."""
    nibbles = torch.bitwise_right_shift(packed.unsqueeze(-1), _shifts(packed)).bitwise_and_(0xF)
    return (nibbles - 8).flatten(-2).to(torch.int8)


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(0, 4 * _PER_WORD, 4, dtype=torch.int32, device=like.device)


def _quantize(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales over the last dim, the arithmetic in the values' dtype; zeros get the dtype's epsilon."""
    limit = 2 ** (bits - 1)
    amax = values.abs().amax(-1, keepdim=True)
    if not torch.isfinite(amax).all():
        raise CheckpointError("the weights to quantize are not finite", fix="use an earlier checkpoint")
    scale = amax / (limit - 0.5)
    scale = torch.where(scale == 0, torch.finfo(values.dtype).eps, scale)
    return (values / scale).clamp(-limit, limit - 1).round().to(torch.int8), scale


def _matrix(weight: Tensor) -> Tensor:
    if weight.dim() != 2:
        raise CheckpointError(f"a tensor of shape {list(weight.shape)} is no matrix", expected="two dims")
    return weight


def quantize_int8_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Like `quantize_int8`, row by row."""
    return _rows_reference(weight, weight.shape[1], 8)


def quantize_int4_reference(weight: Tensor, group_size: int = INT4_GROUP_SIZE) -> tuple[Tensor, Tensor]:
    """Like `quantize_int4`, group by group and nibble by nibble."""
    codes, scale = _rows_reference(weight, group_size, 4)
    words = torch.zeros(len(codes), codes.shape[1] // _PER_WORD, dtype=torch.int64)
    for k in range(codes.shape[1]):
        words[:, k // _PER_WORD] |= (codes[:, k].long() + 8) << 4 * (k % _PER_WORD)
    return torch.where(words >= 2**31, words - 2**32, words).int(), scale


def _rows_reference(weight: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    scale = torch.empty(len(weight), weight.shape[1] // group_size, dtype=weight.dtype)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for row in range(len(weight)):
        for group in range(scale.shape[1]):
            part = slice(group * group_size, (group + 1) * group_size)
            scale[row, group] = weight[row, part].abs().max() / (2 ** (bits - 1) - 0.5)
            if scale[row, group] == 0:
                scale[row, group] = torch.finfo(weight.dtype).eps
            ratio = (weight[row, part] / scale[row, group]).tolist()
            wide = 2 ** (bits - 1)
            codes[row, part] = torch.tensor([max(-wide, min(wide - 1, round(x))) for x in ratio], dtype=torch.int8)
    return codes, scale
