"""The weights of a checkpoint folder: its safetensors files, open, and their tensors read straight into place."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tafkir.checkpoint.finite import all_finite, bits_finite
from tafkir.checkpoint.header import STORED_DTYPES, StoredTensor, read_header
from tafkir.checkpoint.manifest import DTYPE_NAMES, MANIFEST_NAME, Manifest
from tafkir.checkpoint.quantized import AUXILIARY_SUFFIXES, EncodedWeight, decode_weight, find_encoded
from tafkir.errors import CheckpointError
from tafkir.ops.fp8 import dequantize_fp8_blocks, fp8_scale_shape

__all__ = ["INDEX_FILE", "SINGLE_FILE", "WeightFiles", "fp8_block_size", "open_weights", "read_json"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"

# What is read at a time: small enough to be checked and hashed while it is still in the cache.
CHUNK_BYTES = 1 << 20
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
    if quantization.get("quant_method") in ("modelopt", "compressed-tensors"):
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
def open_weights(
    path: Path,
    *,
    block_size: tuple[int, int] | None = None,
    packed: str | None = None,
    manifest: Manifest | None = None,
    verify_hashes: bool = True,
) -> Iterator[WeightFiles]:
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
        yield WeightFiles(listing, tensors, descriptors, block_size, manifest, verify_hashes, encoded)


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
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith(".safetensors"):
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
class WeightFiles:
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

    def read_stored(self, name: str) -> Tensor:
        """A new tensor as it lies there, codes and scales included; only its hash is checked.

        Args:
            name: one of `tensors`.
        """
        stored = self.tensors[name]
        if stored.dtype not in STORED_DTYPES:
            raise CheckpointError(f"dtype is {stored.dtype}", where=f"{stored.file}: {name}", expected="a known one")
        place = torch.empty(stored.shape, dtype=STORED_DTYPES[stored.dtype])
        with self._stream(name) as read:
            read(_content(place.view(-1)))
        return place

    def _decode(self, name: str, place: Tensor) -> None:
        weight = self.encoded[name]
        if tuple(place.shape) != weight.shape:
            where = f"{self.tensors[weight.codes].file}: {name}"
            raise CheckpointError(
                f"shape is {list(weight.shape)}", where=where, expected=f"{list(place.shape)} by config.json"
            )
        if place.is_contiguous():
            decode_weight(weight, self.read_stored, out=place)
        else:
            place.copy_(decode_weight(weight, self.read_stored, dtype=place.dtype))
        if not all_finite(place):
            raise self._not_finite(weight.codes, True, place.dtype)

    def read(self, name: str) -> Tensor:
        """A new tensor in the stored dtype; codes and FP8 become float32. Errors as in `read_into`."""
        if name in self.encoded:
            place = torch.empty(self.encoded[name].shape)
            self._decode(name, place)
            return place
        dtype = self._dtype(name)
        place = torch.empty(self.tensors[name].shape, dtype=torch.float32 if dtype.itemsize == 1 else dtype)
        self.read_into(name, place)
        return place

    def read_into(self, name: str, place: Tensor) -> None:
        """Fill a CPU tensor with a stored one, cast to its dtype; FP8 is dequantized.

        Args:
            name: one of `names`.
            place: of the stored shape; float32, bfloat16 or float16, of any strides.

        Raises:
            CheckpointError: the shape is another, the file ends early, the values are not finite (before or after
                the cast), or the tensor is not what the manifest says; the message names file and tensor.
        """
        if name in self.encoded:
            self._decode(name, place)
            return
        dtype = self._dtype(name)
        self._check_shape(name, tuple(place.shape))
        if dtype == torch.float8_e4m3fn:
            self._dequantize(name, place)
        elif place.is_contiguous():
            self._fill(name, place.view(-1))
        else:
            whole = torch.empty(place.shape, dtype=place.dtype)
            self._fill(name, whole.view(-1))
            place.copy_(whole)

    def read_window(self, name: str, shape: tuple[int, ...], rows: range, columns: range, place: Tensor) -> None:
        """Fill a CPU tensor with some rows and columns of a stored one, reading nothing else of it (FP8: whole rows of
        blocks). What the manifest says of dtype and shape is checked; a hash is one of a whole tensor, and is not.

        Args:
            name: one of `names`.
            shape: what the stored tensor must have: one dim or two.
            rows: along dim 0.
            columns: along dim 1; range(1) where there is none.
            place: [rows] or [rows, columns], contiguous.

        Raises:
            CheckpointError: as in `read_into`.
        """
        if name in self.encoded:
            whole = torch.empty(shape)
            self._decode(name, whole)
            part = whole[rows.start : rows.stop]
            place.copy_(part if part.dim() < 2 else part[:, columns.start : columns.stop])
            return
        stored, dtype = self.tensors[name], self._dtype(name)
        self._check_shape(name, shape)
        self._check_entry(name)
        width = math.prod(shape[1:])
        if dtype == torch.float8_e4m3fn:
            self._dequantize_window(name, rows, columns, place)
        elif len(columns) == width:
            self._fill(name, place.view(-1), skip=rows.start * width * dtype.itemsize)
        else:
            step = max(1, CHUNK_BYTES // (len(columns) * dtype.itemsize))
            scratch = torch.empty(min(step, len(rows)), len(columns), dtype=dtype)
            for start in range(0, len(rows), step):
                chunk = rows[start : start + step]
                for into, row in zip(scratch, chunk, strict=False):
                    offset = stored.offset + (row * width + columns.start) * dtype.itemsize
                    self._read_at(stored, offset, _content(into))
                part, source = place[start : start + len(chunk)], scratch[: len(chunk)]
                part.copy_(source)
                self._check_cast(name, source.view(-1), part.view(-1))

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        stored = self.tensors[name]
        if stored.shape != expected:
            raise CheckpointError(
                f"shape is {list(stored.shape)}",
                where=f"{stored.file}: {name}",
                expected=f"{list(expected)} by config.json",
                fix="use the config.json that belongs to these weights",
            )

    def _dtype(self, name: str) -> torch.dtype:
        stored = self.tensors[name]
        known = stored.dtype in ("F32", "BF16", "F16", "F8_E4M3")
        if not known and not (stored.dtype == "F8_E8M0" and name.endswith(SCALE_SUFFIX)):
            raise CheckpointError(
                f"dtype is {stored.dtype}",
                where=f"{stored.file}: {name}",
                expected="F32, BF16, F16, or F8_E4M3 with a scale",
            )
        return STORED_DTYPES[stored.dtype]

    def _fill(self, name: str, flat: Tensor, skip: int | None = None) -> None:
        """Read a chunk at a time, and check it while it is in the cache; `skip` as in `_stream`."""
        dtype = self._dtype(name)
        if flat.dtype != dtype:
            self._cast(name, flat, dtype, skip)
            return
        # Slices of numpy arrays cost less than those of tensors, and a large model has thousands of small chunks.
        content = flat.view(torch.uint8).numpy()
        bits = content.view(np.int16 if dtype.itemsize == 2 else np.int32)
        step = CHUNK_BYTES // dtype.itemsize
        with self._stream(name, skip) as read:
            for start in range(0, flat.numel(), step):
                read(content[start * dtype.itemsize : (start + step) * dtype.itemsize].data)
                if not bits_finite(bits[start : start + step], dtype):
                    raise self._not_finite(name, False, dtype)

    def _cast(self, name: str, flat: Tensor, dtype: torch.dtype, skip: int | None) -> None:
        """Like `_fill`, by way of one chunk in the stored dtype."""
        scratch = torch.empty(min(CHUNK_BYTES // dtype.itemsize, flat.numel()), dtype=dtype)
        with self._stream(name, skip) as read:
            for place in flat.split(len(scratch)) if len(scratch) else ():
                source = scratch[: len(place)]
                read(_content(source))
                place.copy_(source)
                self._check_cast(name, source, place)

    def _check_cast(self, name: str, source: Tensor, place: Tensor) -> None:
        """A cast can overflow but not repair, so the narrower side tells all; both flat."""
        if not all_finite(place if place.dtype.itemsize <= source.dtype.itemsize else source):
            raise self._not_finite(name, all_finite(source), place.dtype)

    def _dequantize_window(self, name: str, rows: range, columns: range, place: Tensor) -> None:
        """Whole rows of blocks through scratch, a row of blocks at a time."""
        assert self.block_size is not None
        height, width = self.block_size[0], self.tensors[name].shape[1]
        scales = self._scales(name)
        for block_row in range(rows.start // height, -(-rows.stop // height)):
            first = block_row * height
            codes = torch.empty(min(height, self.tensors[name].shape[0] - first), width, dtype=torch.float8_e4m3fn)
            self._read_at(self.tensors[name], self.tensors[name].offset + first * width, _content(codes.view(-1)))
            values = torch.empty(codes.shape, dtype=place.dtype)
            dequantize_fp8_blocks(codes, scales[block_row : block_row + 1], self.block_size, out=values)
            if not all_finite(values):
                raise self._not_finite(name, bool(codes.float().isfinite().all()), place.dtype)
            begin, end = max(rows.start, first), min(rows.stop, first + len(codes))
            wanted = values[begin - first : end - first, columns.start : columns.stop]
            place[begin - rows.start : end - rows.start] = wanted

    def _scales(self, name: str) -> Tensor:
        """The scales of an FP8 tensor, float32."""
        scale = torch.empty(self.tensors[name + SCALE_SUFFIX].shape, dtype=self._dtype(name + SCALE_SUFFIX))
        with self._stream(name + SCALE_SUFFIX) as read:
            read(_content(scale.view(-1)))
        scale = scale.float()
        if not (all_finite(scale) and (scale >= 0).all()):
            raise self._not_finite(name + SCALE_SUFFIX, False, scale.dtype)
        return scale

    def _dequantize(self, name: str, place: Tensor) -> None:
        assert self.block_size is not None  # `_check_pairs` refuses FP8 without it
        scale = self._scales(name)
        height = min(scale.shape[0], CHUNK_BYTES // (self.block_size[0] * max(1, place.shape[1]))) or 1
        scratch = torch.empty(height * self.block_size[0], place.shape[1], dtype=torch.float8_e4m3fn)
        with self._stream(name) as read:
            for block_row in range(0, scale.shape[0], height):
                start = block_row * self.block_size[0]
                part = place[start : start + scratch.shape[0]]
                codes = scratch[: part.shape[0]]
                read(_content(codes.view(-1)))
                dequantize_fp8_blocks(codes, scale[block_row : block_row + height], self.block_size, out=part)
                if not all_finite(part):
                    raise self._not_finite(name, bool(codes.float().isfinite().all()), place.dtype)

    def _read_at(self, stored: StoredTensor, offset: int, content: memoryview) -> None:
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

    @contextmanager
    def _stream(self, name: str, skip: int | None = None) -> Iterator[Callable[[memoryview], None]]:
        """A function that fills one buffer after the other with the next bytes; the hash is checked at the end.

        Args:
            skip: bytes to leave out at the beginning; None for a tensor that is read to its end, and so has a hash.
        """
        stored = self.tensors[name]
        entry = self._check_entry(name)
        digest = hashlib.sha256() if entry is not None and self.verify_hashes and skip is None else None
        offset = stored.offset + (skip or 0)

        def read(content: memoryview) -> None:
            nonlocal offset
            self._read_at(stored, offset, content)
            offset += len(content)
            if digest is not None:
                digest.update(content)

        yield read
        if digest is not None and entry != digest.hexdigest():
            raise self._unlike_manifest(name)

    def _check_entry(self, name: str) -> str | None:
        """The hash that the manifest gives; its dtype and shape are checked here."""
        if self.manifest is None:
            return None
        stored, entry = self.tensors[name], self.manifest.tensors.get(name)
        dtype = str(STORED_DTYPES[stored.dtype]).removeprefix("torch.")
        if entry is None or entry.shape != stored.shape or entry.dtype != dtype:
            raise self._unlike_manifest(name)
        return entry.sha256

    def _unlike_manifest(self, name: str) -> CheckpointError:
        file = self.tensors[name].file
        return CheckpointError(
            f"{file.name} does not hold the tensor that {MANIFEST_NAME} describes",
            where=f"{file}: {name}",
            fix=f"take the checkpoint anew, or remove {MANIFEST_NAME} if the change was meant",
        )

    def _not_finite(self, name: str, source_is_finite: bool, dtype: torch.dtype) -> CheckpointError:
        where = f"{self.tensors[name].file}: {name}"
        if source_is_finite:
            return CheckpointError(
                f"the weights overflow in {DTYPE_NAMES[dtype]}", where=where, fix="load in a wider dtype"
            )
        if name.endswith(SCALE_SUFFIX):
            return CheckpointError("the scales are not finite and positive", where=where, fix=_AGAIN)
        return CheckpointError("the weights are not finite", where=where, fix="use an earlier checkpoint")


def _content(flat: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in place; numpy knows neither bfloat16 nor FP8."""
    return flat.view(torch.uint8).numpy().data
