"""Finds NaN and infinities on the raw bits of weights, in two passes of integer maxima."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["all_finite", "bits_finite"]

Bits: TypeAlias = npt.NDArray[np.generic]

_SIGNED: Mapping[int, torch.dtype] = {2: torch.int16, 4: torch.int32}
_INFINITY_BITS: Mapping[torch.dtype, int] = {
    torch.float32: 0x7F80_0000,
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
}


def bits_finite(bits: Bits, dtype: torch.dtype) -> bool:
    """Whether the bits of numbers of a dtype hold neither NaN nor infinity.

    Infinity and NaN have the largest exponent, so they are the largest of the positive numbers when the bits are
    read as signed integers, and the largest of the negative ones, and of all, when they are read as unsigned ones.

    Args:
        bits: int16 or int32, as wide as the dtype.
    """
    if bits.size == 0:
        return True
    infinity = _INFINITY_BITS[dtype]
    sign = 1 << (8 * dtype.itemsize - 1)
    unsigned = bits.view(np.uint16 if dtype.itemsize == 2 else np.uint32)
    return bool(
        np.maximum.reduce(bits, axis=None) < infinity and np.maximum.reduce(unsigned, axis=None) < sign | infinity
    )


def all_finite(values: Tensor) -> bool:
    """Whether a CPU tensor holds neither NaN nor infinity.

    Args:
        values: any shape and strides; float32, bfloat16 or float16.
    """
    bits = values.detach().contiguous().view(_SIGNED[values.dtype.itemsize]).numpy()
    return bits_finite(bits, values.dtype)
