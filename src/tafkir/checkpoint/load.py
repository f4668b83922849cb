"""Read a checkpoint folder, strictly: every tensor present, of the right shape, finite, and as its manifest says."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from tafkir.checkpoint.files import fp8_block_size, read_json, read_manifest
from tafkir.checkpoint.manifest import Manifest
from tafkir.checkpoint.quantized import packed_method
from tafkir.checkpoint.read import WeightFiles, open_weights
from tafkir.errors import CheckpointError
from tafkir.models.decoder import Decoder
from tafkir.models.hf import (
    Part,
    architecture_of,
    causal_keys,
    config_from_hf,
    drop_absent_mtp,
    read_hf_parts,
    read_hf_tensors,
)
from tafkir.models.reward import RewardModel
from tafkir.models.router import Router
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.model import ModelConfig

__all__ = [
    "Checkpoint",
    "RewardCheckpoint",
    "advise_huge_pages",
    "empty_decoder",
    "load_checkpoint",
    "load_config",
    "load_reward_model",
    "outline_checkpoint",
    "read_manifest",
    "read_parts",
]


AnyDecoder = TypeVar("AnyDecoder", bound=Decoder)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        path: the folder.
        config: the decoder's shape; without multi-token-prediction layers where the files hold none of them.
        decoder: on the CPU, in the dtype asked for.
        tokenizer_path: the folder, where it holds a tokenizer.json; else None.
        manifest: None for a folder that Tafkir did not write.
    """

    path: Path
    config: ModelConfig
    decoder: Decoder
    tokenizer_path: Path | None
    manifest: Manifest | None


@dataclass(frozen=True, slots=True)
class RewardCheckpoint:
    """A loaded reward model.

    Attributes:
        path: the folder.
        model: on the CPU, in the dtype asked for.
        tokenizer_path: the folder, where it holds a tokenizer.json; else None.
        reward_mean: mean reward on the answers it was trained on (0 where the manifest does not say).
        reward_std: their standard deviation (1 where the manifest does not say).
    """

    path: Path
    model: RewardModel
    tokenizer_path: Path | None
    reward_mean: float
    reward_std: float


def load_config(name: Path | str) -> ModelConfig:
    """The config alone, without reading a weight."""
    path = find_checkpoint(name)
    where = str(path / "config.json")
    return _read_config(read_json(path / "config.json"), where)


def load_checkpoint(name: Path | str, *, dtype: torch.dtype = torch.float32, verify_hashes: bool = True) -> Checkpoint:
    """Build the decoder and fill it, one tensor at a time, straight from the files into place.

    FP8 blocks (`quantization_config` of DeepSeek-V3 and its kin) and what ModelOpt, compressed-tensors or `tafkir
    quantize` wrote are dequantized on the way. Besides the decoder,
    loading takes the memory of one chunk, or of one tensor where the layouts differ.

    Args:
        name: a checkpoint folder, or the name of a bundled one.
        dtype: of the parameters in memory; expert biases are float32 always.
        verify_hashes: where the folder has a manifest, compare every tensor's SHA-256 with it: then the weights are,
            bit for bit, those that were saved. False compares names, dtypes and shapes alone, which notices no
            flipped bit, and saves about a second for each gigabyte.

    Raises:
        CheckpointError: the folder is missing or damaged, belongs to another architecture, or does not fit its
            own config; the message names the file and the tensor.
    """
    path = find_checkpoint(name)
    hf_config = read_json(path / "config.json")
    decoder, manifest = _load(path, hf_config, Decoder, dtype, verify_hashes)
    return Checkpoint(path, decoder.config, decoder, tokenizer_path(path), manifest)


def load_reward_model(
    name: Path | str, *, dtype: torch.dtype = torch.float32, verify_hashes: bool = True
) -> RewardCheckpoint:
    """What `load_checkpoint` does, for a `...ForSequenceClassification` with one label.

    Raises:
        CheckpointError: as `load_checkpoint`; also where the checkpoint is no reward model.
    """
    path = find_checkpoint(name)
    hf_config = causal_keys(read_json(path / "config.json"), str(path / "config.json"))
    model, manifest = _load(path, hf_config, RewardModel, dtype, verify_hashes)
    lineage = manifest.lineage if manifest else {}
    mean, std = float(lineage.get("reward_mean", 0.0)), float(lineage.get("reward_std", 1.0))
    return RewardCheckpoint(path, model, tokenizer_path(path), mean, std)


def outline_checkpoint(name: Path | str) -> Decoder:
    """The decoder of a folder on the meta device: its tensors' names, shapes and dtypes, before a weight is read.

    Raises:
        CheckpointError: as `load_checkpoint`, as far as config and files' headers go.
    """
    path = find_checkpoint(name)
    hf_config = read_json(path / "config.json")
    with opened(path, hf_config, verify_hashes=False) as (config, files):
        return on_meta(Decoder, drop_absent_mtp(config, files.names), torch.float32)


def read_parts(name: Path | str, decoder: Decoder, parts: Mapping[str, Part]) -> None:
    """Fill what this process holds of a decoder; nothing else is read, so the manifest's hashes are not compared.

    Args:
        name: the folder that `outline_checkpoint` gave the decoder of.
        decoder: in whatever way it is sharded; its state dict has the names and whole shapes.
        parts: what is held of each of its tensors.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    path = find_checkpoint(name)
    hf_config = read_json(path / "config.json")
    with opened(path, hf_config, verify_hashes=False) as (_, files), placed(files):
        table = architecture_of(hf_config, str(path / "config.json"))
        read_hf_parts(decoder, parts, files.names, files.read_window, table)


def tokenizer_path(path: Path) -> Path | None:
    return path if (path / "tokenizer.json").is_file() else None


def _load(
    path: Path, hf_config: Mapping[str, Any], kind: type[AnyDecoder], dtype: torch.dtype, verify_hashes: bool
) -> tuple[AnyDecoder, Manifest | None]:
    """Build a model of a kind from a folder's config and fill it from its files."""
    with opened(path, hf_config, verify_hashes) as (config, files), placed(files):
        model = _empty(kind, drop_absent_mtp(config, files.names), dtype)
        table = architecture_of(hf_config, str(path / "config.json"))
        read_hf_tensors(model, files.names, files.read, table, read_into=files.read_into)
    return model, files.manifest


@contextmanager
def opened(path: Path, hf_config: Mapping[str, Any], verify_hashes: bool) -> Iterator[tuple[ModelConfig, WeightFiles]]:
    where = str(path / "config.json")
    config, block_size, manifest = _read_config(hf_config, where), fp8_block_size(hf_config, where), read_manifest(path)
    packed = packed_method(hf_config, path)
    with open_weights(
        path, block_size=block_size, packed=packed, manifest=manifest, verify_hashes=verify_hashes
    ) as files:
        yield config, files


@contextmanager
def placed(files: WeightFiles) -> Iterator[None]:
    """Errors within say which file they are about."""
    try:
        yield
    except CheckpointError as error:
        where = _place(files, error.where)
        raise CheckpointError(error.what, where=where, expected=error.expected, fix=error.fix) from error


def _read_config(hf_config: Mapping[str, Any], where: str) -> ModelConfig:
    """How the weights are stored is not the model's shape, so the tables of names need not know it."""
    fp8_block_size(hf_config, where)
    return config_from_hf({key: value for key, value in hf_config.items() if key != "quantization_config"}, where)


def empty_decoder(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """A decoder on the CPU whose weights are still to be filled; expert biases are float32."""
    return _empty(Decoder, config, dtype)


def _empty(kind: type[AnyDecoder], config: ModelConfig, dtype: torch.dtype) -> AnyDecoder:
    decoder = on_meta(kind, config, dtype).to_empty(device="cpu")
    for parameter in decoder.parameters():
        advise_huge_pages(parameter)
    return decoder


def on_meta(kind: type[AnyDecoder], config: ModelConfig, dtype: torch.dtype) -> AnyDecoder:
    with torch.device("meta"):
        decoder = kind(config)
    decoder = decoder.to(dtype)
    for module in decoder.modules():
        if isinstance(module, Router) and module.expert_bias is not None:
            module.expert_bias = module.expert_bias.float()
    return decoder


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask Linux for large pages: filling fresh memory costs more in page faults than in copying otherwise.

    Only advice: where the system gives none, nothing changes but the speed.
    """
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (storage.data_ptr() + storage.nbytes() - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length >= 1 << 22 and sys.platform.startswith("linux"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)


def _place(files: WeightFiles, where: str | None) -> str:
    """What reads by name does not know files: say which one it is about, where the message does not say it yet."""
    if where is None:
        return str(files.listing)
    if where.startswith(str(files.listing.parent)):
        return where
    return f"{files.tensors[where].file if where in files.tensors else files.listing}: {where}"
