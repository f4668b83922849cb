"""Inputs of the quantized matrices in NVFP4, for a decoder that an engine owns. Training never sees this.

Shapes: N tokens, D hidden, E experts, I expert width, A active experts per token.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tafkir.models.decoder import Decoder
from tafkir.models.experts import Experts, MoE
from tafkir.models.layers import Linear
from tafkir.ops.fp8 import FP8_MAX
from tafkir.ops.moe import swiglu
from tafkir.ops.nvfp4 import E2M1_MAX, fake_quantize_nvfp4

__all__ = ["QuantizedExperts", "quantize_activations", "quantize_inputs"]


_INPUT_AMAX = E2M1_MAX * FP8_MAX


def quantize_inputs(x: Tensor) -> Tensor:
    """Activations [N, K] in NVFP4, with block scales of their own and a global scale of one.

    One stands for an amax of 2688, which needs no calibration (ModelOpt ships recipes with `input_scale` 1). A scale
    over the whole batch would make a request's tokens depend on who else runs.
    """
    return fake_quantize_nvfp4(x, amax=_INPUT_AMAX)


class QuantizedExperts(nn.Module):
    """Routed experts whose matrices read NVFP4 inputs; shares the parameters of the experts that it stands in for."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj

    def forward(self, x_ND: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        x_ND, out_ND = quantize_inputs(x_ND), x_ND.new_zeros(x_ND.shape)
        for expert in expert_ids_NA.unique().tolist():
            token, slot = (expert_ids_NA == expert).nonzero(as_tuple=True)
            hidden = quantize_inputs(swiglu(F.linear(x_ND[token], self.gate_up_proj[expert])))
            weight = weights_NA[token, slot].unsqueeze(1).to(x_ND.dtype)
            out_ND.index_add_(0, token, F.linear(hidden, self.down_proj[expert]) * weight)
        return out_ND


def quantize_activations(decoder: Decoder) -> None:
    """Hook every linear map and every stack of experts in the decoder's layers; head and routers stay as they are."""
    for layer in decoder.layers:
        for module in layer.modules():
            if isinstance(module, MoE):
                # Same parameter names, so weights load as before.
                module.experts = QuantizedExperts(module.experts)  # type: ignore[assignment]
            elif isinstance(module, Linear):
                module.register_forward_pre_hook(_quantize_argument)


def _quantize_argument(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (quantize_inputs(args[0]), *args[1:])
