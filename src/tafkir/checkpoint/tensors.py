"""What torch's tensors are on disk: the names of their dtypes, and their hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from tafkir.checkpoint.manifest import TensorEntry

__all__ = ["DTYPE_NAMES", "STORED_DTYPES", "hash_tensor", "tensor_entry"]

STORED_DTYPES: Mapping[str, torch.dtype] = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
}
"""The dtypes that are read, by their names in a safetensors header."""

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
"""The dtypes that weights may have on disk."""


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def tensor_entry(tensor: Tensor) -> TensorEntry:
    """The manifest's entry for a tensor about to be written."""
    return TensorEntry(dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape), sha256=hash_tensor(tensor))
