"""The weights of a checkpoint folder: its safetensors files, open, and their tensors read straight into place."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tafkir.checkpoint.files import (
    INDEX_FILE,
    SCALE_SUFFIX,
    SINGLE_FILE,
    StoredFiles,
    fp8_block_size,
    open_files,
    read_json,
)
from tafkir.checkpoint.finite import all_finite, bits_finite
from tafkir.checkpoint.manifest import Manifest
from tafkir.checkpoint.quantized import decode_weight
from tafkir.checkpoint.tensors import DTYPE_NAMES, STORED_DTYPES
from tafkir.errors import CheckpointError
from tafkir.ops.fp8 import dequantize_fp8_blocks

__all__ = ["INDEX_FILE", "SINGLE_FILE", "WeightFiles", "fp8_block_size", "open_weights", "read_json"]

# What is read at a time: small enough to be checked and hashed while it is still in the cache.
CHUNK_BYTES = 1 << 20
_AGAIN = "download or save it again"


@contextmanager
def open_weights(
    path: Path,
    *,
    block_size: tuple[int, int] | None = None,
    packed: str | None = None,
    manifest: Manifest | None = None,
    verify_hashes: bool = True,
) -> Iterator[WeightFiles]:
    """`files.open_files`, to be read as tensors; arguments and errors are the same."""
    with open_files(
        path, block_size=block_size, packed=packed, manifest=manifest, verify_hashes=verify_hashes
    ) as files:
        yield WeightFiles.of(files)


class WeightFiles(StoredFiles):
    """Open weights. Reading needs memory for the place and for one chunk (for FP8, one row of blocks) besides."""

    __slots__ = ()

    @classmethod
    def of(cls, files: StoredFiles) -> WeightFiles:
        """The same files, to be read as tensors."""
        return cls(
            files.listing,
            files.tensors,
            files.descriptors,
            files.block_size,
            files.manifest,
            files.verify_hashes,
            files.encoded,
        )

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
        self.check_entry(name)
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
                    self.read_at(stored, offset, _content(into))
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
            self.read_at(self.tensors[name], self.tensors[name].offset + first * width, _content(codes.view(-1)))
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

    @contextmanager
    def _stream(self, name: str, skip: int | None = None) -> Iterator[Callable[[memoryview], None]]:
        """A function that fills one buffer after the other with the next bytes; the hash is checked at the end.

        Args:
            skip: bytes to leave out at the beginning; None for a tensor that is read to its end, and so has a hash.
        """
        stored = self.tensors[name]
        entry = self.check_entry(name)
        digest = hashlib.sha256() if entry is not None and self.verify_hashes and skip is None else None
        offset = stored.offset + (skip or 0)

        def read(content: memoryview) -> None:
            nonlocal offset
            self.read_at(stored, offset, content)
            offset += len(content)
            if digest is not None:
                digest.update(content)

        yield read
        if digest is not None and entry != digest.hexdigest():
            raise self.unlike_manifest(name)

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
