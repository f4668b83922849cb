"""Write a checkpoint folder: complete under a temporary name, then renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from tafkir.checkpoint.files import read_json
from tafkir.checkpoint.folder import MAX_SHARD_BYTES, publish_folder, write_error, write_folder
from tafkir.checkpoint.manifest import MANIFEST_NAME, Manifest
from tafkir.checkpoint.tensors import DTYPE_NAMES
from tafkir.checkpoint.write import describe_tensors, write_weights
from tafkir.errors import CheckpointError
from tafkir.models.decoder import Decoder
from tafkir.models.hf import classification_keys, config_to_hf, write_hf_tensors
from tafkir.models.reward import RewardModel

__all__ = [
    "MAX_SHARD_BYTES",
    "TOKENIZER_FILES",
    "SavesTokenizer",
    "publish_folder",
    "save_checkpoint",
    "write_error",
    "write_folder",
]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)
"""What is copied from a tokenizer's folder, where it is there; tokenizer.json must be."""

# transformers has no class for these configs, and vLLM reads a config through it: it asks the folder for one
# (`--trust-remote-code`), as it does with the published checkpoints. vLLM's model reads `embedding_dropout` besides.
_OWN_CONFIG_CLASSES = {
    "bailing_moe_v2": (
        "configuration_bailing_moe_v2",
        "BailingMoeV2Config",
        '''"""Ling 2.0's configuration, for programs that read this folder with trust_remote_code."""

from transformers import PretrainedConfig


class BailingMoeV2Config(PretrainedConfig):
    model_type = "bailing_moe_v2"
    embedding_dropout = 0.0
''',
    )
}


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
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Manifest:
    """Write the decoder as a Hugging Face folder with its architecture's names, and a manifest.

    A reward model is written as its family's `...ForSequenceClassification` with one label.

    Tensors are converted and written one at a time, so saving needs memory for one of them besides the decoder.
    The folder appears under its name only when it is complete. An older checkpoint there is replaced; it stays when
    writing fails (a kill between the two renames leaves it whole as `.NAME.old`). Equal weights give equal bytes.

    Args:
        path: the checkpoint folder; its parents are made.
        decoder: the model.
        tokenizer: saved beside the weights; or
        tokenizer_dir: a folder whose tokenizer, chat template and generation config are copied.
        extra: lineage, JSON values (recipe, stage, step, base checkpoint ...).
        dtype: of the weights on disk: float32, bfloat16 or float16. Expert biases stay float32.
        max_shard_bytes: more than this is written in several files with an index.

    Raises:
        CheckpointError: a weight is not finite, the place is not writable, or the disk is full.
    """
    path = Path(path)
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"cannot write {dtype}", where=str(path), expected=f"one of {', '.join(DTYPE_NAMES.values())}"
        )
    entries = describe_tensors(write_hf_tensors(decoder, dtype))
    config = decoder.config
    hf_config = config_to_hf(config) | {"torch_dtype": DTYPE_NAMES[dtype]}
    if isinstance(decoder, RewardModel):
        hf_config |= classification_keys(hf_config)
    manifest = Manifest(
        architecture=hf_config["architectures"][0],
        num_parameters=config.num_parameters(),
        num_active_parameters=config.num_parameters(active=True),
        lineage=dict(extra or {}),
        tensors=dict(sorted(entries.items())),
    )
    with write_folder(path) as staging:
        ids = _write_tokenizer(staging, tokenizer, tokenizer_dir)
        _write_json(staging / "config.json", hf_config | ids | _write_config_class(staging, hf_config["model_type"]))
        if not (staging / "generation_config.json").exists():
            _write_json(staging / "generation_config.json", ids)
        write_weights(staging, entries, lambda: write_hf_tensors(decoder, dtype), max_shard_bytes)
        _write_json(staging / MANIFEST_NAME, manifest.model_dump())
    return manifest


def _write_tokenizer(
    staging: Path, tokenizer: SavesTokenizer | None, tokenizer_dir: Path | str | None
) -> dict[str, Any]:
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
    ids = read_json(generation) if generation.is_file() else {}
    return {key: ids[key] for key in ("eos_token_id", "pad_token_id") if key in ids}


def _write_config_class(staging: Path, model_type: str) -> dict[str, Any]:
    """Put a class for the config into the folder where transformers has none; returns the key that names it."""
    if model_type not in _OWN_CONFIG_CLASSES:
        return {}
    module, name, text = _OWN_CONFIG_CLASSES[model_type]
    (staging / f"{module}.py").write_text(text, encoding="utf-8")
    return {"auto_map": {"AutoConfig": f"{module}.{name}"}}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
