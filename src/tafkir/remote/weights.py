"""New weights for servers, through a folder that both sides see: one checkpoint a version, the last two kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tafkir.checkpoint.load import load_config
from tafkir.checkpoint.save import save_checkpoint
from tafkir.errors import CheckpointError
from tafkir.models.decoder import Decoder

__all__ = ["WeightFolders"]

# A server may still read the one before while the next one is written.
_NUM_KEPT = 2


class WeightFolders:
    """Writes `version-<n>` folders as Hugging Face checkpoints.

    Args:
        root: a folder that every server sees under the same path.
        checkpoint: where the config and the tokenizer come from.
        dtype: of the weights on disk.
    """

    def __init__(self, root: Path, checkpoint: Path, dtype: Literal["bfloat16", "float32"] = "bfloat16") -> None:
        self._root, self._checkpoint, self._dtype = root.absolute(), checkpoint, getattr(torch, dtype)
        self._config = load_config(checkpoint)

    def write(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Path:
        """Write the weights of one version; they appear under their name when they are complete.

        Raises:
            CheckpointError: a name is unknown or missing, a shape differs, a weight is not finite, or the place is
                not writable.
        """
        with torch.device("meta"):
            decoder = Decoder(self._config)
        own, new = decoder.state_dict(), {name: tensor.detach().cpu() for name, tensor in weights}
        for kind, names in (("unknown", new.keys() - own.keys()), ("missing", own.keys() - new.keys())):
            if names:
                raise CheckpointError(
                    f"{len(names)} {kind} weights", where=min(names), expected="the names of the decoder's state dict"
                )
        for name, tensor in new.items():
            if tensor.shape != own[name].shape:
                raise CheckpointError(f"shape {tuple(tensor.shape)}", where=name, expected=f"{tuple(own[name].shape)}")
        decoder.load_state_dict(new, strict=True, assign=True)
        path = self._root / f"version-{version:08d}"
        lineage = {"policy_version": version}
        save_checkpoint(path, decoder, tokenizer_dir=self._checkpoint, extra=lineage, dtype=self._dtype)
        for old in sorted(self._root.glob("version-*"))[:-_NUM_KEPT]:
            if old != path:
                shutil.rmtree(old, ignore_errors=True)
        return path
