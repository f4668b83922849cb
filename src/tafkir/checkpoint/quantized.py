"""Weights that lie in a checkpoint as codes and scales: which tensors belong together, and what they are worth.

Read are ModelOpt's names (`weight`, `weight_scale`, `weight_scale_2`), those of compressed-tensors (`weight_packed`,
`weight_scale`, `weight_global_scale`), and gpt-oss' stacks of experts (`*_blocks`, `*_scales`); DeepSeek's
`weight_scale_inv` is the business of `read.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tafkir.checkpoint.header import StoredTensor
from tafkir.errors import CheckpointError
from tafkir.ops.blocks import fp8_scale_shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "AUXILIARY_SUFFIXES",
    "PACKED_METHODS",
    "EncodedWeight",
    "Encoding",
    "decode_weight",
    "find_encoded",
    "packed_method",
]

Encoding = Literal[
    "nvfp4", "nvfp4_inverse", "mxfp4", "mxfp8", "fp8", "fp8_channel", "fp8_block", "int8", "int4", "mxfp4_stack"
]
"""mxfp4_stack: of gpt-oss; the codes of an expert's matrix lie transposed, in blocks [E, N, K / 32, 16]."""

AUXILIARY_SUFFIXES = (".input_scale", ".input_global_scale", ".k_scale", ".v_scale", ".weight_shape")
"""What engines want to know besides the weights; the weights are worth the same without it."""

PACKED_METHODS = ("modelopt", "compressed-tensors", "mxfp4")
"""What config.json calls checkpoints of codes and scales; mxfp4 is gpt-oss' own name."""
_FP8_BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class EncodedWeight:
    """A weight in parts.

    Attributes:
        encoding: the number format.
        shape: of the weight.
        codes: name of the stored codes.
        scale: name of the stored scales.
        global_scale: name of the stored second scale, where the format has one.
    """

    encoding: Encoding
    shape: tuple[int, ...]
    codes: str
    scale: str
    global_scale: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Every stored tensor that the weight is made of."""
        return tuple(name for name in (self.codes, self.scale, self.global_scale) if name)


def packed_method(hf_config: Mapping[str, Any], folder: Path) -> str | None:
    """One of `PACKED_METHODS` where a checkpoint says that it is quantized so; else None."""
    method = (hf_config.get("quantization_config") or {}).get("quant_method")
    if method is None and (folder / "hf_quant_config.json").is_file():
        return "modelopt"
    return str(method) if str(method) in PACKED_METHODS else None


def find_encoded(tensors: Mapping[str, StoredTensor]) -> dict[str, EncodedWeight]:
    """The weights that are stored in parts, by the name that they would have in one piece.

    Raises:
        CheckpointError: codes lack a scale, a scale lacks its codes, or their shapes do not belong together.
    """
    found: dict[str, EncodedWeight] = {}
    for name, stored in tensors.items():
        if name.endswith(".weight_packed"):
            found[name.removesuffix("_packed")] = _packed(name, stored, tensors)
        elif name.endswith(".weight") and stored.dtype in ("U8", "F8_E4M3", "I8"):
            found[name] = _plain(name, stored, tensors)
        elif name.endswith("_blocks") and stored.dtype == "U8" and stored.shape[3:] == (16,):
            found[name.removesuffix("_blocks")] = _stack(name, stored, tensors)
    used = {part for weight in found.values() for part in weight.parts}
    for name, stored in tensors.items():
        if name not in used and name.endswith((".weight_scale", ".weight_scale_2", ".weight_global_scale")):
            raise CheckpointError(
                "a scale without codes", where=f"{stored.file}: {name}", fix="take the whole checkpoint"
            )
    return found


def _packed(name: str, stored: StoredTensor, tensors: Mapping[str, StoredTensor]) -> EncodedWeight:
    """compressed-tensors' `weight_packed`."""
    stem = name.removesuffix("_packed")
    scale = _need(f"{stem}_scale", name, tensors)
    rows, *width = stored.shape
    if stored.dtype == "I32":
        shape = (rows, math.prod(width) * 8)
        return _checked(EncodedWeight("int4", shape, name, f"{stem}_scale"), tensors, (rows, scale.shape[-1]))
    shape = (rows, math.prod(width) * 2)
    if scale.dtype == "U8":
        return _checked(EncodedWeight("mxfp4", shape, name, f"{stem}_scale"), tensors, (rows, shape[1] // 32))
    _need(f"{stem}_global_scale", name, tensors)
    weight = EncodedWeight("nvfp4_inverse", shape, name, f"{stem}_scale", f"{stem}_global_scale")
    return _checked(weight, tensors, (rows, shape[1] // 16))


def _stack(name: str, stored: StoredTensor, tensors: Mapping[str, StoredTensor]) -> EncodedWeight:
    """gpt-oss' experts; the weight has the shape of transformers' parameter, [E, K, N]."""
    experts, rows, blocks, width = stored.shape
    scale = f"{name.removesuffix('_blocks')}_scales"
    _need(scale, name, tensors)
    weight = EncodedWeight("mxfp4_stack", (experts, blocks * width * 2, rows), name, scale)
    return _checked(weight, tensors, (experts, rows, blocks))


def _plain(name: str, stored: StoredTensor, tensors: Mapping[str, StoredTensor]) -> EncodedWeight:
    """Codes under the weight's own name."""
    scale = _need(f"{name}_scale", name, tensors)
    shape = stored.shape
    if stored.dtype == "U8":
        _need(f"{name}_scale_2", name, tensors)
        whole = (*shape[:-1], shape[-1] * 2)
        weight = EncodedWeight("nvfp4", whole, name, f"{name}_scale", f"{name}_scale_2")
        return _checked(weight, tensors, (*shape[:-1], whole[-1] // 16))
    if stored.dtype == "I8":
        return _checked(EncodedWeight("int8", shape, name, f"{name}_scale"), tensors, (shape[0], 1))
    if scale.dtype == "U8":
        weight = EncodedWeight("mxfp8", shape, name, f"{name}_scale")
        return _checked(weight, tensors, (*shape[:-1], shape[-1] // 32))
    blocks = fp8_scale_shape(shape, _FP8_BLOCK)
    kinds: dict[tuple[int, ...], Encoding] = {
        (): "fp8", (1,): "fp8", (shape[0],): "fp8_channel", (shape[0], 1): "fp8_channel", blocks: "fp8_block",
        (blocks[0], 1, blocks[1], 1): "fp8_block",
    }  # fmt: skip
    encoding = kinds.get(scale.shape)
    if encoding is None:
        raise CheckpointError(
            f"the scale has shape {list(scale.shape)}",
            where=f"{scale.file}: {name}_scale",
            expected=f"one for all of {list(shape)}, for each row, or for each 128x128 block",
        )
    return EncodedWeight(encoding, shape, name, f"{name}_scale")


def _need(name: str, of: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    if name not in tensors:
        raise CheckpointError(
            "the codes have no scale", where=f"{tensors[of].file}: {of}", expected=name, fix="take the whole checkpoint"
        )
    return tensors[name]


def _checked(weight: EncodedWeight, tensors: Mapping[str, StoredTensor], scale_shape: tuple[int, ...]) -> EncodedWeight:
    scale = tensors[weight.scale]
    if scale.shape != scale_shape:
        raise CheckpointError(
            f"the scales have shape {list(scale.shape)}",
            where=f"{scale.file}: {weight.scale}",
            expected=f"{list(scale_shape)} for {weight.encoding} of {list(weight.shape)}",
        )
    return weight


def decode_weight(
    weight: EncodedWeight,
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What the codes are worth, in float32, rounded once to the wanted dtype.

    Args:
        weight: one of `find_encoded`.
        read: gives a stored tensor by name.
        dtype: of the result where `out` is not given; None means float32.
        out: of the weight's shape, contiguous: filled and returned.

    Raises:
        CheckpointError: a scale is not finite.
    """
    # Here and not above, because what finds the parts of weights does without torch.
    import torch

    from tafkir.ops.fp8 import dequantize_fp8, dequantize_fp8_blocks
    from tafkir.ops.integers import dequantize_int4, dequantize_int8
    from tafkir.ops.mxfp import dequantize_mxfp4, dequantize_mxfp8
    from tafkir.ops.nvfp4 import dequantize_nvfp4

    dtype = dtype or torch.float32
    codes, scale = read(weight.codes), read(weight.scale)
    total = read(weight.global_scale) if weight.global_scale else None
    for name, tensor in ((weight.scale, scale), (weight.global_scale, total)):
        if tensor is not None and not torch.isfinite(tensor.float()).all():
            raise CheckpointError("the scales are not finite", where=name, fix="quantize the checkpoint again")
    if weight.encoding in ("nvfp4", "nvfp4_inverse"):
        assert total is not None
        inverse = weight.encoding == "nvfp4_inverse"
        return dequantize_nvfp4(codes, scale, total.reshape(()), dtype=dtype, out=out, inverse=inverse)
    if weight.encoding == "mxfp4_stack":
        values = torch.empty(weight.shape, dtype=dtype) if out is None else out
        for place, blocks, own in zip(values, codes, scale, strict=True):
            place.copy_(dequantize_mxfp4(blocks.flatten(1), own, dtype=place.dtype).mT)
        return values
    if weight.encoding == "mxfp4":
        return dequantize_mxfp4(codes, scale, dtype=dtype, out=out)
    if weight.encoding == "fp8_block":
        blocks = scale.reshape(fp8_scale_shape(weight.shape, _FP8_BLOCK))
        return dequantize_fp8_blocks(codes, blocks, _FP8_BLOCK, dtype=dtype, out=out)
    if weight.encoding == "mxfp8":
        values = dequantize_mxfp8(codes, scale, dtype=dtype)
    elif weight.encoding == "int8":
        values = dequantize_int8(codes, scale, dtype=dtype)
    elif weight.encoding == "int4":
        values = dequantize_int4(codes, scale, dtype=dtype)
    else:
        values = dequantize_fp8(codes, scale, dtype=dtype)
    return values if out is None else out.copy_(values)
