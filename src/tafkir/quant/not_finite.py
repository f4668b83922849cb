"""Finds the weights of a source that hold NaN or infinities, before any is quantized. Without torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tafkir.checkpoint.files import SCALE_SUFFIX, StoredFiles

__all__ = ["find_not_finite"]

_CHUNK_BYTES = 4 << 20
_BITS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F80_0000)}


def find_not_finite(files: StoredFiles) -> frozenset[str]:
    """Names of the weights with NaN or infinities; reads every byte once. A weight in FP8 has them in its codes or in
    its scales; weights in other codes are left to those who decode them."""
    return frozenset(name for name in files.names if name not in files.encoded and _has_any(files, name))


def _has_any(files: StoredFiles, name: str) -> bool:
    dtype = files.tensors[name].dtype
    if dtype == "F8_E4M3":
        scale = f"{name}{SCALE_SUFFIX}"
        e8m0 = files.tensors[scale].dtype == "F8_E8M0"
        bad = 0xFF in files.read_bytes(scale) if e8m0 else _has_any(files, scale)
        return bad or any(0x7F in chunk or 0xFF in chunk for chunk in _chunks(files, name))
    letters, infinity = _BITS.get(dtype, ("", 0))
    if not letters:
        return False
    without_sign = infinity | (infinity & -infinity) - 1
    return any(
        bool(((np.frombuffer(chunk, letters) & without_sign) >= infinity).any()) for chunk in _chunks(files, name)
    )


def _chunks(files: StoredFiles, name: str) -> Iterator[bytes]:
    stored = files.tensors[name]
    for start in range(0, stored.num_bytes, _CHUNK_BYTES):
        content = bytearray(min(_CHUNK_BYTES, stored.num_bytes - start))
        files.read_at(stored, stored.offset + start, memoryview(content))
        yield bytes(content)
