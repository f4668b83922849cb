"""Checkpoints on disk: Hugging Face layout, safetensors only, a typed manifest, whole or absent.

Its names are imported when they are asked for, so that what only looks at files does without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {"load": ("Checkpoint", "load_checkpoint", "load_config"), "manifest": ("Manifest", "TensorEntry")}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names} | {"save_checkpoint": "save"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
