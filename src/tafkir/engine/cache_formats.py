"""In which numbers a cache keeps what attention reads: the weights' dtype, FP8, or NVFP4.

FP8 is E4M3 under one scale a layer; 1, the cast that engines take by default, saturates at 448. NVFP4 is E2M1 with an
E4M3 scale for every 16 numbers of a token and a head, under one scale a layer; not given, 1 / 6, which reaches 448,
too (ModelOpt's `kv_nvfp4_cast`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tafkir.errors import CapacityError
from tafkir.ops.fp8 import FP8_MAX
from tafkir.ops.nvfp4 import BLOCK_SIZE, E2M1_MAX, block_amax, dequantize_nvfp4, encode_nvfp4, nvfp4_block_scale

__all__ = ["CacheCodec", "CacheFormat", "factor_of_stored"]

CacheFormat = Literal["auto", "fp8", "nvfp4"]
"""auto: in the dtype of the weights."""


def factor_of_stored(format: CacheFormat, scale: float) -> float:
    """What codes are multiplied by where a checkpoint stores `scale`: that is largest magnitude / 448 for either
    format, and NVFP4's codes reach six times as far under one scale (ModelOpt)."""
    return scale / E2M1_MAX if format == "nvfp4" else scale


@dataclass(frozen=True, slots=True)
class CacheCodec:
    """What numbers become in the cache: bytes, in one part (FP8) or two (NVFP4: codes, block scales).

    Attributes:
        format: fp8 or nvfp4.
        dim: numbers of one entry.
        scale: what every code is multiplied by; None takes the format's own.

    Raises:
        CapacityError: the entry does not split into NVFP4's blocks.
    """

    format: Literal["fp8", "nvfp4"]
    dim: int
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.format == "nvfp4" and self.dim % BLOCK_SIZE:
            raise CapacityError(
                f"entries of {self.dim} numbers do not split into blocks of {BLOCK_SIZE}",
                where="kv_cache = nvfp4",
                fix="take fp8",
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Bytes of each part of an entry."""
        return (self.dim,) if self.format == "fp8" else (self.dim // 2, self.dim // BLOCK_SIZE)

    @property
    def factor(self) -> float:
        """The scale in use."""
        if self.scale is not None:
            return self.scale
        return 1.0 if self.format == "fp8" else FP8_MAX / (E2M1_MAX * FP8_MAX)

    def encode(self, values: Tensor) -> tuple[Tensor, ...]:
        """The parts of entries [..., dim], each uint8 [..., width]; larger values saturate, NaN stays NaN in FP8."""
        if self.format == "fp8":
            scaled = values.float() / self.factor
            return (scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8),)
        total = torch.tensor(self.factor, device=values.device)
        scale = nvfp4_block_scale(block_amax(values), total)
        return encode_nvfp4(values, scale, total), scale.view(torch.uint8)

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Entries [..., dim] of this dtype; `parts` as `encode` gives them."""
        if self.format == "fp8":
            values = parts[0].view(torch.float8_e4m3fn).to(torch.float32 if self.factor != 1 else dtype)
            return values if self.factor == 1 else (values * self.factor).to(dtype)
        total = torch.tensor(self.factor, device=parts[0].device)
        return dequantize_nvfp4(parts[0], parts[1].view(torch.float8_e4m3fn), total, dtype=dtype)
