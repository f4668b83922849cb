"""Write a checkpoint folder: complete under a temporary name, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tafkir.checkpoint.manifest import DTYPE_NAMES, MANIFEST_NAME, Manifest, tensor_entry
from tafkir.errors import CheckpointError
from tafkir.models.decoder import Decoder
from tafkir.models.hf_names import config_to_hf, write_hf_tensors

__all__ = ["TOKENIZER_FILES", "SavesTokenizer", "save_checkpoint"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
"""What is copied from a tokenizer's folder, where it is there; tokenizer.json must be."""


class SavesTokenizer(Protocol):
    """What a tokenizer needs for a checkpoint."""

    @property
    def eos_id(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    def save(self, path: Path) -> None: ...


def save_checkpoint(
    path: Path | str,
    decoder: Decoder,
    *,
    tokenizer: SavesTokenizer | None = None,
    tokenizer_dir: Path | str | None = None,
    extra: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Manifest:
    """Write the decoder as a Hugging Face folder with Ling 2.0's names, and a manifest.

    The folder appears under its name only when it is complete. An older checkpoint there is replaced; it stays when
    writing fails (a kill between the two renames leaves it whole as `.NAME.old`). Equal weights give equal bytes.

    Args:
        path: the checkpoint folder; its parents are made.
        decoder: the model.
        tokenizer: saved beside the weights; or
        tokenizer_dir: a folder whose tokenizer files are copied.
        extra: lineage, JSON values (recipe, stage, step, base checkpoint ...).
        dtype: of the weights on disk: float32, bfloat16 or float16. Expert biases stay float32.

    Raises:
        CheckpointError: a weight is not finite, the place is not writable, or the disk is full.
    """
    path = Path(path)
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"cannot write {dtype}", where=str(path), expected=f"one of {', '.join(DTYPE_NAMES.values())}"
        )
    tensors = dict(write_hf_tensors(decoder, dtype))
    _refuse_non_finite(tensors)
    config = decoder.config
    hf_config = config_to_hf(config) | {"torch_dtype": DTYPE_NAMES[dtype]}
    manifest = Manifest(
        architecture=hf_config["architectures"][0],
        num_parameters=config.num_parameters(),
        num_active_parameters=config.num_parameters(active=True),
        lineage=dict(extra or {}),
        tensors={name: tensor_entry(tensor) for name, tensor in sorted(tensors.items())},
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.parent / f".{path.name}.tmp"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            ids = _write_tokenizer(staging, tokenizer, tokenizer_dir)
            _write_json(staging / "config.json", hf_config | ids)
            _write_json(staging / "generation_config.json", ids)
            save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
            # safetensors makes its file private; give it the mode that the user's umask gives to the others.
            (staging / "model.safetensors").chmod((staging / "config.json").stat().st_mode)
            _write_json(staging / MANIFEST_NAME, manifest.model_dump())
            _sync(staging)
            _replace(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise _write_error(path, error) from error
    return manifest


def _refuse_non_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        rest = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        raise CheckpointError(
            f"weights are not finite: {', '.join(bad[:4])}{rest}",
            fix="go back to an earlier checkpoint and lower the learning rate, or save in a wider dtype",
        )


def _write_tokenizer(
    staging: Path, tokenizer: SavesTokenizer | None, tokenizer_dir: Path | str | None
) -> dict[str, int]:
    """Put the tokenizer's files into the folder; returns the token ids that config.json repeats."""
    if tokenizer is not None:
        tokenizer.save(staging)
        return {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if tokenizer_dir is None:
        return {}
    source = Path(tokenizer_dir)
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError("tokenizer.json is not there", where=str(source), fix="give the tokenizer's folder")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, staging / name)
    generation = source / "generation_config.json"
    ids = json.loads(generation.read_text()) if generation.is_file() else {}
    return {key: ids[key] for key in ("eos_token_id", "pad_token_id") if key in ids}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(staging: Path, path: Path) -> None:
    """Rename the new folder into place. A folder cannot replace a full one, so an old one steps aside first."""
    old = path.parent / f".{path.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(staging, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_error(path: Path, error: Exception) -> CheckpointError:
    code = getattr(error, "errno", None)
    full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full:
        return CheckpointError("the disk is full", where=str(path), fix="free space, then run the command again")
    reason = os.strerror(code) if code else str(error)
    return CheckpointError(
        f"cannot write the checkpoint ({reason})", where=str(path), fix="choose a folder that you may write to"
    )
