"""Products with weights that stay as they are stored: float32, bfloat16, INT8, FP8 or NVFP4, decoded on the way.

Activations and sums are float32. Shapes: N tokens, K columns, M rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.ops import native
from tafkir.ops.fp8 import dequantize_fp8_blocks
from tafkir.ops.nvfp4 import dequantize_nvfp4

__all__ = [
    "FEW_ROWS",
    "MatrixStruct",
    "PackedFormat",
    "PackedMatrix",
    "goes_in_bfloat16",
    "packed_linear",
    "packed_linear_reference",
    "packed_values",
    "packed_values_reference",
    "structs_of",
    "takes_rows",
]

PackedFormat = Literal["float32", "bfloat16", "int8", "fp8", "nvfp4", "nvfp4_inverse"]

FORMATS: dict[PackedFormat, int] = {
    "float32": 0, "bfloat16": 1, "int8": 2, "fp8": 3, "nvfp4": 4, "nvfp4_inverse": 5,
}  # fmt: skip
_CODES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn,
    "nvfp4": torch.uint8, "nvfp4_inverse": torch.uint8,
}  # fmt: skip
_LANES = 16
FEW_ROWS = 48
"""Up to so many tokens a product always decodes the weights on the way; for more, see `takes_rows`."""


class MatrixStruct(ctypes.Structure):
    """`Matrix` of native/decode.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("format", "rows", "columns", "tile_rows", "tile_columns")),
        *((name, ctypes.c_void_p) for name in ("codes", "scales")),
        ("total", ctypes.c_double),
    ]


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A matrix [M, K] as it is stored.

    Attributes:
        format: how.
        codes: [M, K] in the format's dtype; NVFP4: uint8 [M, K / 2], the first of two codes in the low half.
        scales: float32, one for each tile (INT8, FP8); NVFP4: float8_e4m3fn [M, K / 16].
        total: NVFP4's second scale; block scales are multiplied by it, or divided where the format is inverse.
        tile: rows and columns that share a float32 scale.
    """

    format: PackedFormat
    codes: Tensor
    scales: Tensor | None = None
    total: float = 1.0
    tile: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        tiled = self.format in ("int8", "fp8")
        ragged = self.columns % _LANES or (tiled and self.tile[1] % _LANES and self.tile[1] != self.columns)
        if ragged or self.codes.dtype != _CODES[self.format] or not self.codes.is_contiguous():
            raise CheckpointError(
                f"a {self.format} matrix of {self.codes.dtype} {list(self.codes.shape)}",
                expected=f"contiguous {_CODES[self.format]} with a multiple of {_LANES} columns",
            )
        if tiled or self.format.startswith("nvfp4"):
            rows, columns = (-(-self.rows // self.tile[0]), -(-self.columns // self.tile[1]))
            shape = (rows, columns) if tiled else (self.rows, self.columns // _LANES)
            dtype = torch.float32 if tiled else torch.float8_e4m3fn
            scales = self.scales
            if scales is None or tuple(scales.shape) != shape or scales.dtype != dtype or not scales.is_contiguous():
                found = "none" if scales is None else f"{scales.dtype} {list(scales.shape)}"
                raise CheckpointError(f"the scales are {found}", expected=f"contiguous {dtype} {list(shape)}")

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        return self.codes.shape[1] * (2 if self.format.startswith("nvfp4") else 1)

    @property
    def num_bytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def struct(self) -> MatrixStruct:
        """What the kernels read; valid while the tensors live."""
        scales = None if self.scales is None else self.scales.data_ptr()
        sizes = (FORMATS[self.format], self.rows, self.columns, *self.tile)
        return MatrixStruct(*sizes, self.codes.data_ptr(), scales, self.total)


def structs_of(parts: Sequence[PackedMatrix]) -> ctypes.Array[MatrixStruct]:
    """The kernels' view of matrices, one after the other; valid while their tensors live."""
    return (MatrixStruct * len(parts))(*(part.struct for part in parts))


def packed_values_reference(matrix: PackedMatrix) -> Tensor:
    """What a matrix is worth, float32 [M, K], by the functions that load checkpoints."""
    if matrix.scales is None:
        return matrix.codes.float()
    if matrix.format == "int8":
        factors = matrix.scales.repeat_interleave(matrix.tile[0], 0).repeat_interleave(matrix.tile[1], 1)
        return matrix.codes.float() * factors[: matrix.rows, : matrix.columns]
    if matrix.format == "fp8":
        return dequantize_fp8_blocks(matrix.codes, matrix.scales, matrix.tile)
    inverse = matrix.format == "nvfp4_inverse"
    return dequantize_nvfp4(matrix.codes, matrix.scales, torch.tensor(matrix.total), inverse=inverse)


def packed_values(matrix: PackedMatrix) -> Tensor:
    """The same bits as `packed_values_reference`."""
    if native.kernels_in_use() != "native" or matrix.codes.device.type != "cpu":
        return packed_values_reference(matrix)
    if matrix.format == "float32":
        return matrix.codes
    out, struct = torch.empty(matrix.rows, matrix.columns), matrix.struct
    native.call("tafkir_packed_values", ctypes.addressof(struct), out)
    return out


def packed_linear_reference(x_NK: Tensor, parts: Sequence[PackedMatrix]) -> Tensor:
    """x W^T for the parts' rows, one part after the other: dequantize, then multiply."""
    return torch.cat([F.linear(x_NK, packed_values_reference(part)) for part in parts], dim=-1)


def takes_rows(num_tokens: int, parts: Sequence[PackedMatrix]) -> bool:
    """Whether the kernels should multiply so many tokens; else a BLAS is faster, on weights that are decoded whole."""
    if num_tokens <= FEW_ROWS or native.rows_are_alone():
        return num_tokens > 0
    return all(part.format != "float32" for part in parts) and native.has_tiles()


def goes_in_bfloat16(num_tokens: int, formats: Collection[str]) -> bool:
    """Whether oneDNN multiplies so many tokens in bfloat16: weights stored so, where activations may be that, too."""
    return num_tokens > FEW_ROWS and set(formats) == {"bfloat16"} and native.is_bfloat16_enough()


def packed_linear(
    x_NK: Tensor, parts: Sequence[PackedMatrix], structs: ctypes.Array[MatrixStruct] | None = None
) -> Tensor:
    """The same as `packed_linear_reference`, but for the order of summation.

    Where `native.rows_alone` holds, a token's numbers do not depend on how many there are.

    Args:
        x_NK: float32.
        parts: matrices of K columns.
        structs: `structs_of(parts)`, from one who keeps it.

    Returns:
        float32 [N, rows of all parts].
    """
    num_tokens, rows = len(x_NK), sum(part.rows for part in parts)
    if goes_in_bfloat16(num_tokens, [part.format for part in parts]):
        out, x_NK = torch.empty(num_tokens, rows), x_NK.bfloat16()
        for part, to in zip(parts, out.split([part.rows for part in parts], dim=1), strict=True):
            to.copy_(F.linear(x_NK, part.codes))
        return out
    if not (takes_rows(num_tokens, parts) and native.takes(x_NK) and parts[0].codes.device.type == "cpu"):
        return torch.cat([F.linear(x_NK, packed_values(part)) for part in parts], dim=-1)
    out = torch.empty(num_tokens, rows)
    structs = structs_of(parts) if structs is None else structs
    native.call("tafkir_packed_linear", ctypes.addressof(structs), len(parts), x_NK.contiguous(), num_tokens, rows, out)
    return out
