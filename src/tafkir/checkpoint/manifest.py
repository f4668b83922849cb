"""The manifest of a checkpoint: every tensor with its dtype, shape and hash, and where the weights come from."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["MANIFEST_NAME", "Manifest", "TensorEntry"]

MANIFEST_NAME = "tafkir.json"


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
