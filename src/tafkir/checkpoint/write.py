"""Writes weights as safetensors, one tensor at a time: one file, or shards with an index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from tafkir.checkpoint.files import INDEX_FILE, SINGLE_FILE
from tafkir.checkpoint.finite import all_finite
from tafkir.checkpoint.header import StoredTensor, layout
from tafkir.checkpoint.manifest import TensorEntry
from tafkir.checkpoint.tensors import STORED_DTYPES, tensor_entry
from tafkir.errors import CheckpointError

__all__ = ["describe_tensors", "write_weights"]

_CODES: Mapping[str, str] = {str(dtype).removeprefix("torch."): code for code, dtype in STORED_DTYPES.items()}


def describe_tensors(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, TensorEntry]:
    """Dtype, shape and hash of each tensor, in their order; holds one at a time.

    Raises:
        CheckpointError: a tensor is not finite; the message names the first few.
    """
    entries: dict[str, TensorEntry] = {}
    bad = []
    for name, tensor in tensors:
        entries[name] = tensor_entry(tensor)
        if not all_finite(tensor):
            bad.append(name)
    if bad:
        rest = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        raise CheckpointError(
            f"weights are not finite: {', '.join(bad[:4])}{rest}",
            fix="go back to an earlier checkpoint and lower the learning rate, or save in a wider dtype",
        )
    return entries


def write_weights(
    folder: Path,
    entries: Mapping[str, TensorEntry],
    tensors: Callable[[], Iterable[tuple[str, Tensor]]],
    max_shard_bytes: int,
) -> None:
    """Write model.safetensors, or model-00001-of-NNNNN.safetensors ... and their index, as Hugging Face names them.

    Shards are filled in the tensors' order; one that alone exceeds the limit has a shard of its own.

    Args:
        folder: is there and empty of weights.
        entries: what `describe_tensors` says of the tensors.
        tensors: gives them, in the same order; one is held at a time.
        max_shard_bytes: of a shard's tensors.

    Raises:
        OSError: the place is not writable, or the disk is full.
    """
    shards = _plan_shards(entries, max_shard_bytes)
    if len(shards) == 1:
        files = [folder / SINGLE_FILE]
    else:
        files = [folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    placed: dict[str, StoredTensor] = {}
    with ExitStack() as stack:
        descriptors = {}
        for file, names in zip(files, shards, strict=True):
            header, stored = layout(file, ((name, _CODES[entries[name].dtype], entries[name].shape) for name in names))
            descriptors[file] = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            stack.callback(os.close, descriptors[file])
            _write_all(descriptors[file], header, 0)
            placed |= stored
        for name, tensor in tensors():
            content = tensor.flatten().view(torch.uint8).numpy().data
            _write_all(descriptors[placed[name].file], content, placed[name].offset)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(stored.num_bytes for stored in placed.values())},
            "weight_map": {name: placed[name].file.name for name in sorted(placed)},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _plan_shards(entries: Mapping[str, TensorEntry], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in entries.items():
        num_bytes = STORED_DTYPES[_CODES[entry.dtype]].itemsize * torch.Size(entry.shape).numel()
        if shards[-1] and filled + num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes
    return shards


def _write_all(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    view, done = memoryview(content), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
