"""The manifest of a checkpoint: every tensor with its dtype, shape and hash, and where the weights come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

__all__ = ["DTYPE_NAMES", "MANIFEST_NAME", "Manifest", "TensorEntry", "hash_tensor", "tensor_entry"]

MANIFEST_NAME = "tafkir.json"

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
"""The dtypes that weights may have on disk."""


class TensorEntry(BaseModel):
    """One tensor on disk. `sha256` is over its bytes in row-major order, little-endian."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[int, ...]
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What stands in `tafkir.json`. `lineage` says how the weights came to be; its keys are the writer's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = Field(1, ge=1, le=1)
    architecture: str
    num_parameters: int
    num_active_parameters: int
    lineage: dict[str, Any] = Field(default_factory=dict)
    tensors: dict[str, TensorEntry]


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def tensor_entry(tensor: Tensor) -> TensorEntry:
    """The manifest's entry for a tensor about to be written."""
    return TensorEntry(dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape), sha256=hash_tensor(tensor))
