"""What a weight becomes on disk in each number format: the tensors' names, dtypes and shapes.

Without torch; the contents are `encode.py`'s.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tafkir.checkpoint.header import DTYPE_BYTES
from tafkir.ops.blocks import INT4_GROUP_SIZE, MX_BLOCK_SIZE, fp8_scale_shape
from tafkir.ops.blocks import NVFP4_BLOCK_SIZE as BLOCK_SIZE
from tafkir.recipe.quantize import FormatName, LayoutName

__all__ = ["NVFP4_FORMATS", "Piece", "pieces_of"]

_Spec = tuple[str, str, tuple[int, ...]]

NVFP4_FORMATS: frozenset[FormatName] = frozenset({"nvfp4", "nvfp4_w4a16"})


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor to be written.

    Attributes:
        name: of the tensor.
        dtype: its name in a safetensors header.
        shape: of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def content_of(self, number: float) -> memoryview:
        """The bytes of a tensor of one number in F32, F16 or BF16, rounded to even."""
        if self.dtype == "BF16":
            (bits,) = struct.unpack("<I", struct.pack("<f", number))
            return memoryview(struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16))
        return memoryview(struct.pack({"F32": "<f", "F16": "<e"}[self.dtype], number))


def pieces_of(name: str, shape: Sequence[int], format: FormatName, layout: LayoutName, dtype: str) -> list[Piece]:
    """The tensors that a weight becomes.

    Args:
        name: of the weight, `....weight` where the format is not keep (not for gpt-oss).
        shape: of the weight; a matrix [N, K] where the format is not keep, for gpt-oss experts [E, K, N].
        format: what it becomes.
        layout: whose names.
        dtype: header name of the dtype that the weight is computed in, and kept in by keep.
    """
    if format == "keep":
        return [Piece(name, dtype, tuple(shape))]
    if layout == "gpt-oss":
        experts, width, rows = shape
        stack = (experts, rows, width // MX_BLOCK_SIZE)
        return [Piece(f"{name}_blocks", "U8", (*stack, MX_BLOCK_SIZE // 2)), Piece(f"{name}_scales", "U8", stack)]
    rows, width = shape
    blocks = fp8_scale_shape((rows, width))
    plain: Mapping[FormatName, list[_Spec]]
    if layout == "modelopt":
        plain = {
            "nvfp4": [
                ("", "U8", (rows, width // 2)), ("_scale", "F8_E4M3", (rows, width // BLOCK_SIZE)),
                ("_scale_2", "F32", ()), ("input_scale", "F32", ()),
            ],
            "nvfp4_w4a16": [
                ("", "U8", (rows, width // 2)), ("_scale", "F8_E4M3", (rows, width // BLOCK_SIZE)),
                ("_scale_2", "F32", ()),
            ],
            "mxfp8": [("", "F8_E4M3", (rows, width)), ("_scale", "U8", (rows, width // MX_BLOCK_SIZE))],
            "fp8": [("", "F8_E4M3", (rows, width)), ("_scale", "F32", ()), ("input_scale", "F32", ())],
            "fp8_channel": [("", "F8_E4M3", (rows, width)), ("_scale", "F32", (rows,))],
            "fp8_block": [("", "F8_E4M3", (rows, width)), ("_scale", "F32", (blocks[0], 1, blocks[1], 1))],
        }  # fmt: skip
    else:
        four: list[_Spec] = [("_packed", "U8", (rows, width // 2)), ("_scale", "F8_E4M3", (rows, width // BLOCK_SIZE))]
        four.append(("_global_scale", "F32", (1,)))
        plain = {
            "nvfp4": [*four, ("input_global_scale", "F32", (1,))],
            "nvfp4_w4a16": four,
            "mxfp4": [("_packed", "U8", (rows, width // 2)), ("_scale", "U8", (rows, width // MX_BLOCK_SIZE))],
            "mxfp8": [("", "F8_E4M3", (rows, width)), ("_scale", "U8", (rows, width // MX_BLOCK_SIZE))],
            "fp8": [("", "F8_E4M3", (rows, width)), ("_scale", dtype, (1,))],
            "fp8_channel": [("", "F8_E4M3", (rows, width)), ("_scale", dtype, (rows, 1))],
            "fp8_block": [("", "F8_E4M3", (rows, width)), ("_scale", "F32", blocks)],
            "int8": [("", "I8", (rows, width)), ("_scale", dtype, (rows, 1))],
            "int4": [
                ("_packed", "I32", (rows, width // 8)), ("_scale", dtype, (rows, width // INT4_GROUP_SIZE)),
                ("_shape", "I64", (2,)),
            ],
        }  # fmt: skip
    stem = name.removesuffix("weight")
    return [
        Piece(f"{stem}{suffix}" if suffix.startswith("input") else f"{name}{suffix}", dtype, shape)
        for suffix, dtype, shape in plain[format]
    ]
