"""Checkpoints of recursive models: a folder of safetensors with a manifest, and weights of the official code.

`config.json` holds the model's shape and the format of its puzzles, so that a grid in text is all that solving needs.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tafkir.checkpoint.load import read_manifest
from tafkir.checkpoint.manifest import MANIFEST_NAME, Manifest
from tafkir.checkpoint.read import open_weights, read_json
from tafkir.checkpoint.save import MAX_SHARD_BYTES, write_folder
from tafkir.checkpoint.tensors import DTYPE_NAMES
from tafkir.checkpoint.write import describe_tensors, write_weights
from tafkir.data.puzzles.format import PuzzleFormat
from tafkir.errors import CheckpointError
from tafkir.models.trm import Trm
from tafkir.models.trm_names import official_names, shape_from_official, without_prefix
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.trm import TrmShape

__all__ = ["ARCHITECTURE", "TrmCheckpoint", "load_official_trm", "load_trm", "save_trm"]

ARCHITECTURE = "TrmForPuzzles"
IDENTIFIERS_NAME = "identifiers.json"


@dataclass(frozen=True, slots=True)
class TrmCheckpoint:
    """A loaded recursive model, and the puzzles that it was trained on.

    `identifiers` names the rows of the table of puzzle vectors, where puzzles have vectors of their own: forms of ARC
    tasks, as in the `identifiers.json` of the official datasets.
    """

    path: Path
    model: Trm
    puzzles: PuzzleFormat
    manifest: Manifest | None
    identifiers: tuple[str, ...] | None = None


def save_trm(
    path: Path | str,
    model: Trm,
    puzzles: PuzzleFormat,
    *,
    extra: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    identifiers: Sequence[str] | None = None,
) -> Manifest:
    """Write a model as a folder that appears under its name only when it is complete; equal weights, equal bytes.

    Args:
        path: the checkpoint folder; an older one there is replaced.
        model: on any device.
        puzzles: format of the grids that it solves.
        extra: lineage, JSON values.
        dtype: of the weights on disk.
        identifiers: names of the rows of the table of puzzle vectors.

    Raises:
        CheckpointError: a weight is not finite, the place is not writable, or the disk is full.
    """
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}
    entries = describe_tensors(tensors.items())
    count = model.shape.num_parameters()
    manifest = Manifest(
        architecture=ARCHITECTURE,
        num_parameters=count,
        num_active_parameters=count,
        lineage=dict(extra or {}),
        tensors=dict(sorted(entries.items())),
    )
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "trm",
        "torch_dtype": DTYPE_NAMES[dtype],
        "shape": model.shape.model_dump(mode="json"),
        "puzzles": puzzles.model_dump(mode="json"),
    }
    with write_folder(Path(path)) as staging:
        for name, value in (("config.json", config), (MANIFEST_NAME, manifest.model_dump())):
            (staging / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if identifiers is not None:
            (staging / IDENTIFIERS_NAME).write_text(json.dumps(list(identifiers)) + "\n", encoding="utf-8")
        write_weights(staging, entries, tensors.items, MAX_SHARD_BYTES)
    return manifest


def load_trm(name: Path | str, *, verify_hashes: bool = True) -> TrmCheckpoint:
    """Read a model back, strictly: every tensor present, of the right shape, finite, as the manifest says.

    Args:
        name: a checkpoint folder, or the name of a bundled one.
        verify_hashes: compare every tensor's hash with the manifest's.

    Raises:
        CheckpointError: the folder is missing or damaged, or holds another kind of model.
    """
    path = find_checkpoint(name)
    where = str(path / "config.json")
    config = read_json(path / "config.json")
    if config.get("architectures") != [ARCHITECTURE]:
        raise CheckpointError(
            f"architectures is {config.get('architectures')}", where=where, expected=f"[{ARCHITECTURE!r}]"
        )
    try:
        shape, puzzles = (
            TrmShape.model_validate(config.get("shape")),
            PuzzleFormat.model_validate(config.get("puzzles")),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{key}: {first['msg']}", where=where, fix="take the whole checkpoint anew") from error
    if (puzzles.num_cells, puzzles.vocab_size) != (shape.sequence_length, shape.vocab_size):
        raise CheckpointError("the sizes of shape and puzzles differ", where=where, fix="take the checkpoint anew")
    manifest = read_manifest(path)
    model = Trm(shape)
    with open_weights(path, manifest=manifest, verify_hashes=verify_hashes) as files:
        _check_names(set(model.state_dict()), set(files.names), str(files.listing))
        for tensor_name, place in model.state_dict().items():
            files.read_into(tensor_name, place)
    return TrmCheckpoint(path, model.eval(), puzzles, manifest, _read_identifiers(path, shape))


def _read_identifiers(path: Path, shape: TrmShape) -> tuple[str, ...] | None:
    """The names of the rows of the table of puzzle vectors, where the folder has them."""
    where = path / IDENTIFIERS_NAME
    if not where.is_file():
        return None
    try:
        names = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read as JSON ({error})", where=str(where)) from error
    if not isinstance(names, list) or len(names) != shape.num_puzzle_ids:
        raise CheckpointError(
            "does not name the rows of the table of puzzle vectors",
            where=str(where),
            expected=f"a list of {shape.num_puzzle_ids} names",
            fix="take the whole checkpoint anew",
        )
    return tuple(map(str, names))


def load_official_trm(path: Path | str, **known: Any) -> Trm:
    """Weights of the official TRM or HRM code, as its training saves them or converted to safetensors.

    Pickles are read with torch's restricted reader, which runs no code.

    Args:
        path: a file of the official code (`step_<n>`), or a .safetensors file with its names.
        known: values of `TrmShape` that weights do not show, such as num_recursions; see `shape_from_official`. With
            `sequence_length` a model of another length is refused.

    Raises:
        CheckpointError: the file is unreadable or no such model, its tensors are not those of the shape, or the
            network is tied to another length.
    """
    path = Path(path)
    tensors = {without_prefix(name): tensor for name, tensor in _read_tensors(path).items()}
    try:
        shape = shape_from_official({name: tuple(tensor.shape) for name, tensor in tensors.items()}, **known)
    except CheckpointError as error:
        place = f"{path}: {error.where}"
        if error.where == "sequence_length":
            raise CheckpointError(
                error.what,
                where=place,
                expected=f"{error.expected}: the network is tied to one length",
                fix="take a model for puzzles of that size",
            ) from error
        raise CheckpointError(error.what, where=place, expected=error.expected, fix=error.fix) from error
    model = Trm(shape)
    state = model.state_dict()
    names = official_names(list(state), shape)
    _check_names(set(names.values()), set(tensors), str(path))
    with torch.no_grad():
        for name, theirs in names.items():
            if tensors[theirs].shape != state[name].shape:
                raise CheckpointError(
                    f"shape is {list(tensors[theirs].shape)}",
                    where=f"{path}: {theirs}",
                    expected=f"{list(state[name].shape)}",
                    fix="say more of the network, such as prefix_length or num_attention_heads",
                )
            state[name].copy_(tensors[theirs])
        if "y_init" not in names:
            model.y_init.copy_(model.z_init)
    return model.eval()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError("no such file", where=str(path)) from None
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        first = str(error).strip().split("\n")[0]
        raise CheckpointError(f"cannot be read as weights ({first})", where=str(path)) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError("holds something else than named tensors", where=str(path))
    return loaded


def _check_names(wanted: set[str], available: set[str], where: str) -> None:
    problems = []
    for label, names in (("missing", wanted - available), ("not in the model", available - wanted)):
        if names:
            rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{len(names)} tensors {label}: {', '.join(sorted(names)[:4])}{rest}")
    if problems:
        raise CheckpointError("; ".join(problems), where=where, fix="take weights and config of the same model")
