"""Read a checkpoint folder, strictly: every tensor present, of the right shape, finite, and as its manifest says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tafkir.checkpoint.manifest import DTYPE_NAMES, MANIFEST_NAME, Manifest, hash_tensor
from tafkir.errors import CheckpointError
from tafkir.models.decoder import Decoder
from tafkir.models.hf_names import architecture_of, config_from_hf, read_hf_tensors
from tafkir.recipe.bundled import find_checkpoint as resolve_checkpoint
from tafkir.recipe.model import ModelConfig

__all__ = ["Checkpoint", "load_checkpoint", "load_config", "resolve_checkpoint"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        path: the folder.
        config: the decoder's shape.
        decoder: on the CPU, in the dtype asked for.
        tokenizer_path: the folder, where it holds a tokenizer.json; else None.
        manifest: None for a folder that Tafkir did not write.
    """

    path: Path
    config: ModelConfig
    decoder: Decoder
    tokenizer_path: Path | None
    manifest: Manifest | None


def load_config(name: Path | str) -> ModelConfig:
    """The config alone, without reading a weight."""
    path = resolve_checkpoint(name)
    return config_from_hf(_read_json(path / "config.json"), str(path / "config.json"))


def load_checkpoint(name: Path | str, *, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Build the decoder and fill it, one tensor at a time.

    Args:
        name: a checkpoint folder, or the name of a bundled one.
        dtype: of the parameters in memory; expert biases are float32 always.

    Raises:
        CheckpointError: the folder is missing or damaged, belongs to another architecture, or does not fit its
            own config; the message names the file or the tensor.
    """
    path = resolve_checkpoint(name)
    where = str(path / "config.json")
    hf_config = _read_json(path / "config.json")
    config = config_from_hf(hf_config, where)
    manifest = _read_manifest(path)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.to(dtype).to_empty(device="cpu")
    for router in decoder.routers:
        router.expert_bias = router.expert_bias.float()
    with _open_weights(path) as files:
        reader = _Reader(files, manifest, path)
        try:
            read_hf_tensors(decoder, files.keys(), reader.read, architecture_of(hf_config, where))
        except CheckpointError as error:
            # What reads tensors knows their names only; say which checkpoint they are from.
            place = f"{path}: {error.where}" if error.where else str(path)
            raise CheckpointError(error.what, where=place, expected=error.expected, fix=error.fix) from error
    has_tokenizer = (path / "tokenizer.json").is_file()
    return Checkpoint(path, config, decoder, path if has_tokenizer else None, manifest)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("the file is missing", where=str(path), fix="take the whole checkpoint folder") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the file ({error.strerror})", where=str(path)) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise CheckpointError("not valid JSON", where=f"{path}:{line}", fix="take the file anew") from error
    if not isinstance(value, dict):
        raise CheckpointError("not a JSON object", where=str(path))
    return value


def _read_manifest(path: Path) -> Manifest | None:
    file = path / MANIFEST_NAME
    if not file.exists():
        return None
    try:
        return Manifest.model_validate(_read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=str(file),
            fix="take the checkpoint anew, or one written by this version",
        ) from error


def _weight_files(path: Path) -> list[Path]:
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    if (path / INDEX_FILE).is_file():
        weight_map = _read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError("weight_map is missing", where=str(path / INDEX_FILE))
        return [path / name for name in sorted(set(weight_map.values()))]
    other = next((p.name for p in sorted(path.iterdir()) if p.suffix in {".bin", ".pt", ".pth"}), None)
    raise CheckpointError(
        f"no weights{f' ({other} is not read: a pickle can run code)' if other else ''}",
        where=str(path),
        expected=f"{SINGLE_FILE} or {INDEX_FILE}",
    )


@contextmanager
def _open_weights(path: Path) -> Iterator[dict[str, tuple[Path, Any]]]:
    """Every tensor's name with its file and the open handle."""
    with ExitStack() as stack:
        tensors: dict[str, tuple[Path, Any]] = {}
        for file in _weight_files(path):
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except FileNotFoundError:
                raise CheckpointError("the file is missing", where=str(file), fix="take the whole folder") from None
            except SafetensorError as error:
                raise CheckpointError(
                    f"the file is truncated or damaged ({error})", where=str(file), fix="download or save it again"
                ) from error
            except OSError as error:
                raise CheckpointError(f"cannot read the file ({error})", where=str(file)) from error
            tensors |= {name: (file, handle) for name in handle.keys()}  # noqa: SIM118  # not a mapping
        yield tensors


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one tensor at a time and checks what can be checked of it alone."""

    files: Mapping[str, tuple[Path, Any]]
    manifest: Manifest | None
    path: Path

    def read(self, name: str) -> Tensor:
        file, handle = self.files[name]
        try:
            tensor: Tensor = handle.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{file.name} is damaged ({error})", where=name, fix="download or save it again"
            ) from error
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"dtype is {tensor.dtype}", where=name, expected=f"one of {', '.join(DTYPE_NAMES.values())}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"the weights are not finite ({file.name})", where=name, fix="use an earlier checkpoint"
            )
        if self.manifest is not None:
            entry = self.manifest.tensors.get(name)
            if entry is None or entry.sha256 != hash_tensor(tensor):
                raise CheckpointError(
                    f"{file.name} does not hold the tensor that {MANIFEST_NAME} describes",
                    where=name,
                    fix=f"take the checkpoint anew, or remove {MANIFEST_NAME} if the change was meant",
                )
        return tensor
