"""Checkpoint merging instead of a learning-rate decay (WSM, arXiv 2507.17634): which weights, and tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from tafkir.checkpoint.load import load_config, read_manifest
from tafkir.checkpoint.manifest import MANIFEST_NAME, Manifest
from tafkir.checkpoint.read import WeightFiles, fp8_block_size, open_weights, read_json
from tafkir.checkpoint.save import MAX_SHARD_BYTES, TOKENIZER_FILES, write_folder
from tafkir.checkpoint.write import describe_tensors, write_weights
from tafkir.errors import CheckpointError, RecipeError
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.schema import DecayShape
from tafkir.train.schedule import decayed_share

__all__ = ["decay_weights", "merge_checkpoints", "merge_coefficients", "merge_tensors"]


def decay_weights(shape: DecayShape, num_updates: int) -> list[float]:
    """w_1 ... w_k of a decay to zero over k updates that would end with one more: w_i = decay(i / (k + 1))."""
    return [decayed_share(shape, i / (num_updates + 1)) for i in range(1, num_updates + 1)]


def merge_coefficients(weights: Sequence[float]) -> list[float]:
    """c_0 ... c_k, which sum to one, for the decay weights w_1 ... w_k (arXiv 2507.17634).

    With theta_j = theta_{j-1} - g_j, the merge sum_j c_j theta_j is theta_0 - sum_i w_i g_i: the weights that the
    same updates would give with the learning rate decayed by w. c_k = w_k, c_j = w_j - w_{j+1}, c_0 = 1 - w_1. A
    linear decay (w_i = 1 - i / (k + 1)) is the plain mean.

    Raises:
        RecipeError: the weights are not falling from at most 1 to at least 0, so some coefficient is negative.
    """
    steps = [1.0, *weights, 0.0]
    coefficients = [before - after for before, after in pairwise(steps)]
    if min(coefficients) < 0:
        raise RecipeError(f"decay weights {list(weights)} are not a decay", expected="1 >= w_1 >= ... >= w_k >= 0")
    return coefficients


def merge_tensors(tensors: Iterable[Tensor], coefficients: Sequence[float]) -> Tensor:
    """sum_j c_j x_j, summed in float64 and rounded once to the tensors' own dtype; holds one of them at a time."""
    total: Tensor | None = None
    dtype = torch.float64
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        dtype = tensor.dtype
        scaled = tensor.to(torch.float64, copy=True).mul_(coefficient)
        total = scaled if total is None else total.add_(scaled)
    assert total is not None
    return total.to(dtype)


def merge_checkpoints(names: Sequence[Path | str], out: Path, decay: DecayShape = "linear") -> Manifest:
    """Merge checkpoints of one run, the oldest first, into a new folder; the last one gives config and tokenizer.

    Memory: one tensor, twice in float64. The new folder appears when it is complete.

    Args:
        names: checkpoint folders, evenly spaced in training at one learning rate.
        out: the new folder; must not be there.
        decay: the learning-rate decay that the merge stands for.

    Raises:
        RecipeError: fewer than two checkpoints, or `out` is there.
        CheckpointError: they are not one model's, are FP8, or a file is damaged.
    """
    if len(names) < 2:
        raise RecipeError(f"cannot merge {len(names)} checkpoint", expected="two or more, the oldest first")
    if out.exists():
        raise RecipeError("the folder is there already", where=str(out), fix="choose another --out")
    paths = [find_checkpoint(name) for name in names]
    coefficients = merge_coefficients(decay_weights(decay, len(paths) - 1))
    _check_alike(paths)
    last = paths[-1]
    hf_config, config = read_json(last / "config.json"), load_config(last)
    with ExitStack() as stack:
        files = [stack.enter_context(open_weights(path, manifest=read_manifest(path))) for path in paths]
        _check_tensors(files)
        entries = describe_tensors(_merged(files, coefficients))
        before = read_manifest(last)
        manifest = Manifest(
            architecture=hf_config["architectures"][0],
            num_parameters=config.num_parameters(),
            num_active_parameters=config.num_parameters(active=True),
            lineage={
                "merged": [str(name) for name in names],
                "decay": decay,
                "coefficients": coefficients,
                "last": before.lineage if before else {},
            },
            tensors=dict(sorted(entries.items())),
        )
        with write_folder(out) as staging:
            for name in ("config.json", *TOKENIZER_FILES):
                if (last / name).is_file():
                    shutil.copyfile(last / name, staging / name)
            write_weights(staging, entries, lambda: _merged(files, coefficients), MAX_SHARD_BYTES)
            (staging / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def _merged(files: Sequence[WeightFiles], coefficients: Sequence[float]) -> Iterator[tuple[str, Tensor]]:
    for name in files[-1].names:
        yield name, merge_tensors((file.read(name) for file in files), coefficients)


def _check_alike(paths: Sequence[Path]) -> None:
    """All must be one model with one vocabulary."""
    last = paths[-1]
    for path in paths:
        where = str(path / "config.json")
        if fp8_block_size(read_json(path / "config.json"), where) is not None:
            raise CheckpointError("FP8 weights cannot be merged", where=where, fix="merge before quantizing")
        if load_config(path) != load_config(last):
            raise CheckpointError("another model than the last checkpoint", where=where, expected=f"that of {last}")
        tokenizers = [folder / "tokenizer.json" for folder in (path, last)]
        if all(file.is_file() for file in tokenizers) and tokenizers[0].read_bytes() != tokenizers[1].read_bytes():
            raise CheckpointError("another tokenizer than the last checkpoint's", where=str(tokenizers[0]))


def _check_tensors(files: Sequence[WeightFiles]) -> None:
    """All must hold the same tensors, in the same dtypes and shapes."""
    last = files[-1]
    wanted = {name: (stored.dtype, stored.shape) for name, stored in last.tensors.items()}
    for file in files:
        found = {name: (stored.dtype, stored.shape) for name, stored in file.tensors.items()}
        for name in sorted(wanted.keys() | found.keys()):
            if found.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"the tensor is {_shown(found.get(name))}",
                    where=f"{file.listing}: {name}",
                    expected=f"{_shown(wanted.get(name))}, as in {last.listing}",
                )


def _shown(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{tensor[0]} {list(tensor[1])}" if tensor else "missing"
