"""Finds NaN and infinities on the raw bits of weights, in two passes of integer maxima."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["all_finite"]

_SIGNED: Mapping[int, tuple[torch.dtype, type[np.unsignedinteger]]] = {
    2: (torch.int16, np.uint16),
    4: (torch.int32, np.uint32),
}
_INFINITY_BITS: Mapping[torch.dtype, int] = {
    torch.float32: 0x7F80_0000,
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
}


def all_finite(values: Tensor) -> bool:
    """Whether a CPU tensor holds neither NaN nor infinity.

    Infinity and NaN have the largest exponent, so they are the largest of the positive numbers when the bits are
    read as signed integers, and the largest of the negative ones, and of all, when they are read as unsigned ones.

    Args:
        values: any shape; float32, bfloat16 or float16.
    """
    if values.numel() == 0:
        return True
    infinity = _INFINITY_BITS[values.dtype]
    signed, unsigned = _SIGNED[values.dtype.itemsize]
    bits = values.detach().contiguous().view(signed).numpy()
    sign = 1 << (8 * values.dtype.itemsize - 1)
    return bool(bits.max() < infinity and bits.view(unsigned).max() < sign | infinity)
