"""Checkpoints on disk: Hugging Face layout, safetensors only, a typed manifest, whole or absent."""

from __future__ import annotations

from tafkir.checkpoint.load import Checkpoint, load_checkpoint, load_config
from tafkir.checkpoint.manifest import Manifest, TensorEntry
from tafkir.checkpoint.save import save_checkpoint

__all__ = [
    "Checkpoint",
    "Manifest",
    "TensorEntry",
    "load_checkpoint",
    "load_config",
    "save_checkpoint",
]
