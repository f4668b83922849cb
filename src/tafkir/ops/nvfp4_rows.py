"""NVFP4 matrices as serving kernels on a device read them: codes, block scales as bytes, and a second scale a row.

A second scale for each row, and not for each matrix, lets matrices that were quantized apart (queries beside keys,
gates beside ups, experts) stand in one tensor. Shapes: M rows, K columns, any leading dims (experts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.ops.nvfp4 import decode_e2m1
from tafkir.ops.packed import PackedMatrix

__all__ = ["Nvfp4Rows", "nvfp4_rows", "rows_values", "stacked_rows"]


class Nvfp4Rows(NamedTuple):
    """A matrix [..., M, K]: value = E2M1 code x block scale x row scale.

    Attributes:
        codes: uint8 [..., M, K / 2], the even column in the low half of a byte.
        scales: uint8 [..., M, K / 16], the bits of non-negative E4M3 numbers.
        totals: float32 [..., M].
    """

    codes: Tensor
    scales: Tensor
    totals: Tensor


def nvfp4_rows(parts: Sequence[PackedMatrix]) -> Nvfp4Rows:
    """Matrices of K columns, one below the other.

    Raises:
        CheckpointError: one of them is not in NVFP4.
    """
    codes, scales, totals = [], [], []
    for part in parts:
        if part.scales is None or not part.format.startswith("nvfp4"):
            raise CheckpointError(f"a {part.format} matrix", expected="nvfp4 in every part")
        total = 1.0 / part.total if part.format == "nvfp4_inverse" else part.total
        codes.append(part.codes)
        scales.append(part.scales.view(torch.uint8))
        totals.append(torch.full((part.rows,), total, device=part.codes.device))
    return Nvfp4Rows(torch.cat(codes), torch.cat(scales), torch.cat(totals))


def stacked_rows(matrices: Sequence[Nvfp4Rows]) -> Nvfp4Rows:
    """Matrices of one shape (experts) as one tensor, [E, M, K]."""
    return Nvfp4Rows(*(torch.stack(tensors) for tensors in zip(*matrices, strict=True)))


def rows_values(weight: Nvfp4Rows, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the codes are worth, [..., M, K], computed in float32 and rounded once."""
    shape = (*weight.codes.shape[:-1], weight.codes.shape[-1] * 2)
    step = weight.scales.view(torch.float8_e4m3fn).float() * weight.totals.unsqueeze(-1)
    return decode_e2m1(weight.codes, step, torch.empty(shape, dtype=dtype, device=weight.codes.device))
