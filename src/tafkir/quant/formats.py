"""What a weight becomes on disk in each number format: the tensors' names, dtypes and shapes, and their contents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tafkir.checkpoint.header import STORED_DTYPES
from tafkir.ops.fp8 import fp8_scale_shape, quantize_fp8, quantize_fp8_blocks
from tafkir.ops.integers import INT4_GROUP_SIZE, quantize_int4, quantize_int8
from tafkir.ops.mxfp import MX_BLOCK_SIZE, quantize_mxfp4, quantize_mxfp8
from tafkir.ops.nvfp4 import BLOCK_SIZE
from tafkir.ops.nvfp4_scales import quantize_nvfp4_inverse, search_nvfp4
from tafkir.recipe.quantize import FormatName, LayoutName, QuantizeConfig

__all__ = ["NVFP4_FORMATS", "Piece", "encode_weight", "pieces_of"]

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
        return math.prod(self.shape) * STORED_DTYPES[self.dtype].itemsize


def pieces_of(name: str, shape: Sequence[int], format: FormatName, layout: LayoutName, dtype: str) -> list[Piece]:
    """The tensors that a weight becomes.

    Args:
        name: of the weight, `....weight` where the format is not keep.
        shape: of the weight; a matrix [N, K] where the format is not keep.
        format: what it becomes.
        layout: whose names.
        dtype: header name of the dtype that the weight is computed in, and kept in by keep.
    """
    if format == "keep":
        return [Piece(name, dtype, tuple(shape))]
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


def encode_weight(
    weight: Tensor, format: FormatName, config: QuantizeConfig, *, amax: Tensor | None = None
) -> list[Tensor]:
    """The contents of a weight's pieces, in their order.

    Args:
        weight: [N, K], float32, bfloat16 or float16.
        format: what it becomes; not keep.
        config: layout, choice of scales, scale of activations.
        amax: of all the weights that share its global scale; None takes its own.

    Raises:
        CheckpointError: the weight is not finite.
    """
    peer = config.layout == "compressed-tensors"
    if format in NVFP4_FORMATS:
        return _encode_nvfp4(weight, format, config, amax)
    if format == "mxfp4":
        return list(quantize_mxfp4(weight))
    if format == "mxfp8":
        return list(quantize_mxfp8(weight, "ocp" if peer else "modelopt"))
    if format == "fp8":
        return list(quantize_fp8(weight, "tensor", config.layout))
    if format == "fp8_channel":
        codes, scale = quantize_fp8(weight, "row", config.layout)
        return [codes, scale if peer else scale.flatten()]
    if format == "fp8_block":
        codes, scale = quantize_fp8_blocks(weight)
        return [codes, scale if peer else scale[:, None, :, None]]
    if format == "int8":
        return list(quantize_int8(weight))
    codes, scale = quantize_int4(weight)
    return [codes, scale, torch.tensor(weight.shape)]


def _encode_nvfp4(weight: Tensor, format: FormatName, config: QuantizeConfig, amax: Tensor | None) -> list[Tensor]:
    peer = config.layout == "compressed-tensors"
    if peer and config.scale_choice == "max":
        packed, scale, total = quantize_nvfp4_inverse(weight, amax=amax)
    else:
        packed, scale, total = search_nvfp4(weight, config.scale_choice, amax=amax)
        total = total.reciprocal() if peer else total
    made = [packed, scale, total.reshape(1) if peer else total]
    if format == "nvfp4":
        made.append(torch.tensor([1.0 / config.input_scale] if peer else config.input_scale))
    return made
