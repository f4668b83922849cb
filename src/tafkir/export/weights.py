"""How matrices stand in an ONNX file: plain, halved, as 8-bit integers, or in NVFP4, each unpacked when it is loaded.

Every format is decoded by ordinary operators, so that any runtime can read it; the arithmetic stays float32.

Shapes: N outputs, K inputs of a matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tafkir.ops.nvfp4 import BLOCK_SIZE, E2M1_VALUES, Nvfp4, dequantize_nvfp4, quantize_nvfp4

if TYPE_CHECKING:
    from tafkir.export.graph import Graph, Value

__all__ = ["WEIGHT_FORMATS", "WeightFormat", "decoded", "emit_matrix"]

WeightFormat = Literal["float32", "float16", "int8", "fp4"]
"""`int8`: symmetric, one scale an output. `fp4`: NVFP4, E2M1 codes with an E4M3 scale for each 16 inputs."""

WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)

_INT8_MAX = 127.0
# Numbers of types in ONNX files.
_FLOAT, _INT32 = 1, 6


def decoded(weight_NK: Tensor, format: WeightFormat) -> Tensor:
    """The float32 matrix that a format stands for: what the graph computes with."""
    weight_NK = weight_NK.detach().float()
    if format == "float16":
        return weight_NK.half().float()
    if format == "int8":
        codes, scale_N = _int8(weight_NK)
        return codes.float() * scale_N[:, None]
    if format == "fp4":
        return dequantize_nvfp4(*_nvfp4(weight_NK))[:, : weight_NK.shape[1]]
    return weight_NK


def emit_matrix(graph: Graph, weight_NK: Tensor, format: WeightFormat, *, transposed: bool) -> Value:
    """The matrix as float32: [N, K] to stand on the left of a product, or transposed to stand on the right."""
    weight_NK = weight_NK.detach().float()
    if format == "fp4":
        value = _emit_nvfp4(graph, weight_NK)
        return graph.op("Transpose", value, perm=[1, 0]) if transposed else value
    array = (weight_NK.t() if transposed else weight_NK).contiguous().numpy()
    if format == "float32":
        return graph.constant(array)
    if format == "float16":
        return graph.op("Cast", graph.constant(array.astype(np.float16)), to=_FLOAT)
    codes, scale_N = _int8(weight_NK)
    stored, scale = (codes.t(), scale_N) if transposed else (codes, scale_N[:, None])
    # Ordinary operators, not DequantizeLinear: runtimes fold these when they load, and not again in every step.
    whole = graph.op("Cast", graph.constant(stored.numpy()), to=_FLOAT)
    return graph.op("Mul", whole, graph.constant(scale.numpy()))


def _int8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of the rows; a row of zeros has scale 1."""
    scale_N = weight_NK.abs().amax(1) / _INT8_MAX
    scale_N = torch.where(scale_N > 0, scale_N, torch.ones_like(scale_N))
    return (weight_NK / scale_N[:, None]).round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8), scale_N


def _nvfp4(weight_NK: Tensor) -> Nvfp4:
    """Filled up with zeros to whole blocks."""
    return quantize_nvfp4(F.pad(weight_NK, (0, -weight_NK.shape[1] % BLOCK_SIZE)))


def _emit_nvfp4(graph: Graph, weight_NK: Tensor) -> Value:
    """Two codes a byte and a byte for each block's scale, both looked up in tables of what they mean."""
    outputs, inputs = weight_NK.shape
    packed, scale, global_scale = _nvfp4(weight_NK)
    codes = graph.constant(packed.numpy())
    low = graph.op("BitwiseAnd", codes, graph.constant(np.array(15, dtype=np.uint8)))
    high = graph.op("BitShift", codes, graph.constant(np.array(4, dtype=np.uint8)), direction="RIGHT")
    pairs = [graph.op("Unsqueeze", half, graph.constant([-1])) for half in (low, high)]
    blocks = graph.constant([outputs, scale.shape[1], BLOCK_SIZE])
    values = _look_up(graph, _e2m1_table(), graph.op("Reshape", graph.op("Concat", *pairs, axis=-1), blocks))
    steps = _look_up(graph, _e4m3_table(), graph.constant(scale.view(torch.uint8).unsqueeze(-1).numpy()))
    steps = graph.op("Mul", steps, graph.constant(global_scale.numpy()))
    whole = graph.op("Reshape", graph.op("Mul", values, steps), graph.constant([outputs, -1]))
    if inputs % BLOCK_SIZE:
        whole = graph.op("Slice", whole, graph.constant([0]), graph.constant([inputs]), graph.constant([1]))
    return whole


def _look_up(graph: Graph, table: NDArray[np.float32], bytes_: Value) -> Value:
    return graph.op("Gather", graph.constant(table), graph.op("Cast", bytes_, to=_INT32))


def _e2m1_table() -> NDArray[np.float32]:
    sizes = np.array(E2M1_VALUES, dtype=np.float32)
    return np.concatenate((sizes, -sizes))


def _e4m3_table() -> NDArray[np.float32]:
    table: NDArray[np.float32] = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    return np.nan_to_num(table)
