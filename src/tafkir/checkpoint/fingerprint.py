"""What a checkpoint is, as one hash: that of its weights, its config and its tokenizer. Without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tafkir.checkpoint.manifest import MANIFEST_NAME

__all__ = ["checkpoint_fingerprint"]


def checkpoint_fingerprint(checkpoint: Path) -> str:
    """Hash of what the answers depend on in a checkpoint; the manifest holds the weights' own hashes."""
    manifest = checkpoint / MANIFEST_NAME
    weights = [manifest] if manifest.exists() else sorted(checkpoint.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in (*weights, checkpoint / "config.json", checkpoint / "tokenizer.json"):
        if path.exists():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
