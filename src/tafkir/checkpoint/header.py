"""The header of a safetensors file: which tensor stands where. Read strictly, written as safetensors writes it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tafkir.errors import CheckpointError

__all__ = ["DTYPE_BYTES", "MANIFEST_DTYPES", "StoredTensor", "layout", "read_header"]

DTYPE_BYTES: Mapping[str, int] = {
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "I64": 8,
}
"""Bytes a number, for the dtypes that are read; in the order in which safetensors sorts them, last first."""

MANIFEST_DTYPES: Mapping[str, str] = {
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "F32": "float32",
    "I64": "int64",
}
"""What the manifest calls them: torch's names."""

_RANK = {code: rank for rank, code in enumerate(DTYPE_BYTES)}
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: the safetensors file.
        dtype: its name in the header, such as "BF16"; may be one that is not in `DTYPE_BYTES`.
        shape: of the tensor.
        offset: of its first byte in the file.
        num_bytes: its length; row-major, little-endian.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(file: Path, descriptor: int) -> dict[str, StoredTensor]:
    """Every tensor of an open file.

    Raises:
        CheckpointError: the header is damaged, or its tensors do not fill the file exactly.
    """
    try:
        size = os.fstat(descriptor).st_size
        prefix = os.pread(descriptor, 8, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{size} bytes do not hold the header")
        header = json.loads(os.pread(descriptor, length, 8), object_pairs_hook=_refuse_twins)
        header.pop("__metadata__", None)
        tensors = {name: _stored(file, name, entry, 8 + length) for name, entry in header.items()}
        _check_extent(tensors, 8 + length, size)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"the file is truncated or damaged ({error})", where=str(file), fix="download or save it again"
        ) from error
    return tensors


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the header names {next(n for n in names if names.count(n) > 1)} twice")
    return content


def _stored(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    begin, end = (int(i) for i in entry["data_offsets"])
    shape = tuple(int(i) for i in entry["shape"])
    dtype = str(entry["dtype"])
    known = DTYPE_BYTES.get(dtype)
    if begin < 0 or any(i < 0 for i in shape) or (known and end - begin != math.prod(shape) * known):
        raise ValueError(f"{name}: {end - begin} bytes for {dtype} {list(shape)}")
    return StoredTensor(file, dtype, shape, data_start + begin, end - begin)


def _check_extent(tensors: Mapping[str, StoredTensor], start: int, size: int) -> None:
    """The tensors lie one after the other, without gaps or overlaps, up to the end of the file."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset != start:
            raise ValueError(f"{name} starts at byte {tensor.offset} instead of {start}")
        start += tensor.num_bytes
    if start != size:
        raise ValueError(f"the tensors end at byte {start}, the file at {size}")


def layout(file: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, StoredTensor]]:
    """The header for tensors (name, dtype, shape) and where each goes; the same bytes as safetensors' own writer.

    Wide dtypes come first, names in order within a dtype, and spaces make the header's length a multiple of 8.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda item: (-_RANK[item[1]], item[0])):
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed = {name: _stored(file, name, entry, start) for name, entry in header.items() if name != "__metadata__"}
    return len(text).to_bytes(8, "little") + text, placed
