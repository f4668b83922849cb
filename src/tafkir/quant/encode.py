"""What a weight becomes in each number format: the contents of the tensors that `formats.py` names."""

from __future__ import annotations

import torch
from torch import Tensor

from tafkir.ops.fp8 import quantize_fp8, quantize_fp8_blocks
from tafkir.ops.integers import quantize_int4, quantize_int8
from tafkir.ops.mxfp import quantize_mxfp4, quantize_mxfp8
from tafkir.ops.nvfp4 import Nvfp4
from tafkir.ops.nvfp4_scales import quantize_nvfp4_inverse, search_nvfp4
from tafkir.quant.formats import NVFP4_FORMATS
from tafkir.recipe.quantize import FormatName, QuantizeConfig

__all__ = ["arrange_nvfp4", "encode_weight"]


def encode_weight(
    weight: Tensor, format: FormatName, config: QuantizeConfig, *, amax: Tensor | None = None
) -> list[Tensor]:
    """The contents of a weight's pieces, in their order.

    Args:
        weight: [N, K], float32, bfloat16 or float16; for gpt-oss experts [E, K, N].
        format: what it becomes; not keep.
        config: layout, choice of scales, scale of activations.
        amax: of all the weights that share its global scale; None takes its own.

    Raises:
        CheckpointError: the weight is not finite.
    """
    peer = config.layout == "compressed-tensors"
    if format in NVFP4_FORMATS:
        return _encode_nvfp4(weight, format, config, amax)
    if config.layout == "gpt-oss":
        # One expert at a time: what the codes take on the way is several times a weight.
        parts = [quantize_mxfp4(expert.mT.contiguous()) for expert in weight]
        return [torch.stack(part) for part in zip(*parts, strict=True)]
    if format == "mxfp4":
        return list(quantize_mxfp4(weight))
    if format == "mxfp8":
        return list(quantize_mxfp8(weight, "ocp" if peer else "modelopt"))
    if format == "fp8":
        codes, scale = quantize_fp8(weight, "tensor", config.layout, amax=None if peer else amax)
        return [codes, scale] if peer else [codes, scale, torch.tensor(config.input_scale)]
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
    if config.layout == "compressed-tensors" and config.scale_choice == "max":
        packed, scale, inverse = quantize_nvfp4_inverse(weight, amax=amax)
        return _with_input_scale([packed, scale, inverse.reshape(1)], format, config)
    # Without data every direction counts alike, and then the choice by output errors is that by errors.
    search = "mse" if config.scale_choice == "local_hessian" else config.scale_choice
    return arrange_nvfp4(search_nvfp4(weight, search, amax=amax), format, config)


def arrange_nvfp4(chosen: Nvfp4, format: FormatName, config: QuantizeConfig) -> list[Tensor]:
    """The contents of the pieces of a weight whose codes and scales are chosen, in their order.

    Args:
        chosen: with a global scale to multiply by; compressed-tensors stores its inverse.
        format: nvfp4 or nvfp4_w4a16.
        config: layout, scale of activations.
    """
    peer = config.layout == "compressed-tensors"
    total = chosen.global_scale.reciprocal().reshape(1) if peer else chosen.global_scale
    return _with_input_scale([chosen.packed, chosen.scale, total], format, config)


def _with_input_scale(made: list[Tensor], format: FormatName, config: QuantizeConfig) -> list[Tensor]:
    if format == "nvfp4":
        peer = config.layout == "compressed-tensors"
        made.append(torch.tensor([1.0 / config.input_scale] if peer else config.input_scale))
    return made
