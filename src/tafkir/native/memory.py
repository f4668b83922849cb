"""Has glibc keep the memory that a process frees, where the next training step asks for the same sizes again."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory"]

# <malloc.h>: the parameters' numbers, and the largest values that they take.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_INT = 2**31 - 1
_LARGEST_ON_HEAP = 2**28
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """From now on, blocks up to 256 MiB come from the heap, and what is freed of the heap stays with the process.

    Left alone, glibc maps large tensors anew and gives them back when they are freed, so that every step of a training
    has the kernel clear the same pages again. Which bytes a tensor lies in changes; what is computed does not.

    Returns:
        Whether glibc was told; not where the user has told it something, or another C library is in use.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _VARIABLES):
        return False
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    return tell is not None and bool(
        tell(_M_MMAP_THRESHOLD, _LARGEST_ON_HEAP) and tell(_M_TRIM_THRESHOLD, _LARGEST_INT)
    )
