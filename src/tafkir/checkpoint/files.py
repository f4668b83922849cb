"""The files of a checkpoint folder, open and checked: which tensors lie where, and their bytes. Without torch."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tafkir.checkpoint.header import MANIFEST_DTYPES, StoredTensor, read_header
from tafkir.checkpoint.manifest import MANIFEST_NAME, Manifest
from tafkir.checkpoint.quantized import AUXILIARY_SUFFIXES, PACKED_METHODS, EncodedWeight, find_encoded
from tafkir.errors import CheckpointError
from tafkir.ops.blocks import fp8_scale_shape

__all__ = [
    "INDEX_FILE",
    "SCALE_SUFFIX",
    "SINGLE_FILE",
    "StoredFiles",
    "fp8_block_size",
    "open_files",
    "read_json",
    "read_manifest",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"

_AGAIN = "download or save it again"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, unreadable or something else; the message names file and line.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("the file is missing", where=str(path), fix="take the whole checkpoint folder") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the file ({error.strerror})", where=str(path)) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise CheckpointError("not valid JSON", where=f"{path}:{line}", fix="take the file anew") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise CheckpointError(f"not valid JSON ({error})", where=str(path), fix="take the file anew") from error
    if not isinstance(value, dict):
        raise CheckpointError("not a JSON object", where=str(path))
    return value


def fp8_block_size(hf_config: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    """Rows and columns of the FP8 blocks that a config.json speaks of; None where it quantizes nothing, or packs codes
    as ModelOpt or compressed-tensors do.

    Raises:
        CheckpointError: `quantization_config` asks for another format than these.
    """
    quantization = hf_config.get("quantization_config")
    if quantization is None:
        return None
    where = f"{where}: quantization_config"
    if not isinstance(quantization, dict):
        raise CheckpointError("not a JSON object", where=where)
    if quantization.get("quant_method") in PACKED_METHODS:
        return None
    for key, allowed in (
        ("quant_method", ("fp8",)),
        ("fmt", ("e4m3", None)),
        ("scale_fmt", ("ue8m0", "float", None)),
    ):
        if quantization.get(key) not in allowed:
            expected = " or ".join(repr(value) for value in allowed if value is not None)
            raise CheckpointError(f"{key} = {quantization.get(key)!r} is not supported", where=where, expected=expected)
    size = quantization.get("weight_block_size")
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise CheckpointError(
            f"weight_block_size = {size!r} is not supported", where=where, expected="such as [128, 128]"
        )
    return size[0], size[1]


@contextmanager
def open_files(
    path: Path,
    *,
    block_size: tuple[int, int] | None = None,
    packed: str | None = None,
    manifest: Manifest | None = None,
    verify_hashes: bool = True,
) -> Iterator[StoredFiles]:
    """Open the weights of a folder and check all that can be checked without reading one.

    Args:
        path: holds model.safetensors, or model.safetensors.index.json and the shards that it names.
        block_size: of FP8 tensors (`fp8_block_size`); None where there must be none.
        packed: what `quantized.packed_method` says of the config: codes and scales are read as the weights they are
            worth; None where there must be none.
        manifest: what each tensor must be.
        verify_hashes: compare each tensor's bytes with the manifest's hash; else its dtype and shape alone.

    Raises:
        CheckpointError: a file is missing or damaged, shards and index disagree, a tensor is stored twice, or FP8
            tensors and scales do not belong together.
    """
    single = path / SINGLE_FILE
    with ExitStack() as stack:
        if single.is_file():
            descriptors = {single: _open(single, stack)}
            tensors, listing = read_header(single, descriptors[single]), single
        else:
            listing = path / INDEX_FILE
            weight_map = _read_weight_map(path)
            descriptors = {path / name: _open(path / name, stack) for name in sorted(set(weight_map.values()))}
            tensors = _merge_shards(descriptors, weight_map, listing)
        encoded = find_encoded(tensors) if packed else {}
        if packed and not encoded:
            raise CheckpointError(
                f"{packed} is said to have quantized the weights, but none is",
                where=str(listing),
                fix="take the quantized weights, or remove quantization_config if these were dequantized",
            )
        parts = {part for weight in encoded.values() for part in weight.parts}
        _check_pairs({n: t for n, t in tensors.items() if n not in parts} if parts else tensors, block_size, listing)
        yield StoredFiles(listing, tensors, descriptors, block_size, manifest, verify_hashes, encoded)


def _open(file: Path, stack: ExitStack) -> int:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        raise CheckpointError("the file is missing", where=str(file), fix="take the whole folder") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the file ({error.strerror})", where=str(file)) from error
    stack.callback(os.close, descriptor)
    return descriptor


def _read_weight_map(path: Path) -> dict[str, str]:
    index = path / INDEX_FILE
    if not index.is_file():
        other = next((p.name for p in sorted(path.iterdir()) if p.suffix in {".bin", ".pt", ".pth"}), None)
        raise CheckpointError(
            f"no weights{f' ({other} is not read: a pickle can run code)' if other else ''}",
            where=str(path),
            expected=f"{SINGLE_FILE} or {INDEX_FILE}",
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError("weight_map is missing", where=str(index))
    for name, file in weight_map.items():
        if not isinstance(file, str) or set("/\\\0") & set(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{name} is said to be in {file!r}", where=str(index), expected="a file of the folder"
            )
    return weight_map


def _merge_shards(
    descriptors: Mapping[Path, int], weight_map: Mapping[str, str], index: Path
) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file, descriptor in descriptors.items():
        file_name = file.name
        for name, stored in read_header(file, descriptor).items():
            if name in tensors:
                raise CheckpointError(
                    f"the tensor is stored twice, in {tensors[name].file.name} too",
                    where=f"{file}: {name}",
                    fix="remove one of them, and correct the index",
                )
            if weight_map.get(name) != file_name:
                raise CheckpointError(
                    f"{index.name} says that the tensor is "
                    + (f"in {weight_map[name]}" if name in weight_map else "in no file"),
                    where=f"{file}: {name}",
                    fix="take the index that belongs to these files",
                )
            tensors[name] = stored
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{file_name} does not hold the tensor", where=f"{index}: {name}", fix=_AGAIN)
    return tensors


def _check_pairs(tensors: Mapping[str, StoredTensor], block_size: tuple[int, int] | None, listing: Path) -> None:
    """Every FP8 tensor has a scale of the right shape, and every scale an FP8 tensor."""
    codes = {name for name, stored in tensors.items() if stored.dtype == "F8_E4M3"}
    for name in sorted(codes):
        place = f"{tensors[name].file}: {name}"
        if block_size is None:
            raise CheckpointError(
                "the tensor is FP8, and config.json does not say in which blocks",
                where=place,
                expected="quantization_config with weight_block_size",
                fix="take the model's own config.json",
            )
        if len(tensors[name].shape) != 2:
            raise CheckpointError(
                f"the FP8 tensor has shape {list(tensors[name].shape)}", where=place, expected="2 dims"
            )
        scale = tensors.get(name + SCALE_SUFFIX)
        if scale is None:
            raise CheckpointError(
                "the FP8 tensor has no scale",
                where=place,
                expected=name + SCALE_SUFFIX,
                fix="take the whole checkpoint",
            )
        expected = fp8_scale_shape(tensors[name].shape, block_size)
        if scale.shape != expected:
            raise CheckpointError(
                f"shape is {list(scale.shape)}",
                where=f"{scale.file}: {name}{SCALE_SUFFIX}",
                expected=f"{list(expected)}, one scale for each {block_size[0]}x{block_size[1]} block",
            )
    for name, stored in tensors.items():
        of = name.removesuffix(SCALE_SUFFIX)
        if of != name and of not in codes:
            what = f"is {tensors[of].dtype}, not FP8" if of in tensors else "is missing"
            raise CheckpointError(f"a scale, but {of} {what}", where=f"{stored.file}: {name}", fix=_AGAIN)
    if block_size is not None and not codes:
        raise CheckpointError(
            "config.json says that weights are FP8, but none is",
            where=str(listing),
            fix="take the FP8 weights, or remove quantization_config if these were dequantized",
        )


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """Open weights. Reading needs memory for the place and for one chunk (for FP8, one row of blocks) besides.

    Attributes:
        listing: the file that names the tensors: model.safetensors or the index.
        tensors: every stored tensor by its name, scales included.
    """

    listing: Path
    tensors: Mapping[str, StoredTensor]
    descriptors: Mapping[Path, int]
    block_size: tuple[int, int] | None
    manifest: Manifest | None
    verify_hashes: bool
    encoded: Mapping[str, EncodedWeight] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The weights; scales, and whatever else belongs to a weight, are part of it."""
        if not self.encoded:
            return [name for name in self.tensors if not name.endswith(SCALE_SUFFIX)]
        parts = {part for weight in self.encoded.values() for part in weight.parts}
        plain = [n for n in self.tensors if n not in parts and not n.endswith((SCALE_SUFFIX, *AUXILIARY_SUFFIXES))]
        return [*plain, *self.encoded]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, whatever it is stored as."""
        return self.encoded[name].shape if name in self.encoded else self.tensors[name].shape

    def read_at(self, stored: StoredTensor, offset: int, content: memoryview) -> None:
        """Fill a buffer with the bytes of a file from an offset on."""
        done = 0
        while done < len(content):
            try:
                count = os.preadv(self.descriptors[stored.file], [content[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read the file ({error.strerror})", where=str(stored.file)) from error
            if count == 0:
                raise CheckpointError("the file was cut while it was read", where=str(stored.file), fix=_AGAIN)
            done += count

    def read_bytes(self, name: str) -> bytes:
        """A stored tensor as it lies there: row-major, little-endian; unchecked."""
        stored = self.tensors[name]
        content = bytearray(stored.num_bytes)
        self.read_at(stored, stored.offset, memoryview(content))
        return bytes(content)

    def read_number(self, name: str) -> float:
        """A tensor of one number.

        Raises:
            CheckpointError: it is of several, or no float.
        """
        stored = self.tensors[name]
        if math.prod(stored.shape) != 1 or stored.dtype not in ("F32", "BF16", "F16"):
            raise CheckpointError(
                f"{stored.dtype} {list(stored.shape)}", where=f"{stored.file}: {name}", expected="one number, a float"
            )
        content = self.read_bytes(name)
        if stored.dtype == "BF16":
            content = bytes(2) + content
        number: float = struct.unpack("<e" if stored.dtype == "F16" else "<f", content)[0]
        return number

    def check_entry(self, name: str) -> str | None:
        """The hash that the manifest gives; its dtype and shape are checked here."""
        if self.manifest is None:
            return None
        stored, entry = self.tensors[name], self.manifest.tensors.get(name)
        dtype = MANIFEST_DTYPES.get(stored.dtype)
        if entry is None or entry.shape != stored.shape or entry.dtype != dtype:
            raise self.unlike_manifest(name)
        return entry.sha256

    def unlike_manifest(self, name: str) -> CheckpointError:
        file = self.tensors[name].file
        return CheckpointError(
            f"{file.name} does not hold the tensor that {MANIFEST_NAME} describes",
            where=f"{file}: {name}",
            fix=f"take the checkpoint anew, or remove {MANIFEST_NAME} if the change was meant",
        )


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a checkpoint folder; None for a folder that Tafkir did not write."""
    file = path / MANIFEST_NAME
    if not file.exists():
        return None
    try:
        return Manifest.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=str(file),
            fix="take the checkpoint anew, or one written by this version",
        ) from error
