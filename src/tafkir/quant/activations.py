"""Inputs of the quantized matrices in NVFP4, for a decoder that an engine owns. Training never sees this.

Shapes: N tokens, D hidden, E experts, I expert width, A active experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tafkir.models.decoder import Decoder
from tafkir.models.experts import Experts, MoE
from tafkir.models.layers import Linear
from tafkir.ops.fp8 import FP8_MAX
from tafkir.ops.moe import swiglu
from tafkir.ops.nvfp4 import E2M1_MAX, fake_quantize_nvfp4

__all__ = ["INPUT_AMAX", "QuantizedExperts", "quantize_activations", "quantize_inputs", "quantize_inputs_of"]

INPUT_AMAX = E2M1_MAX * FP8_MAX
"""What a global scale of one stands for: it needs no calibration (ModelOpt ships recipes with `input_scale` 1)."""


def quantize_inputs(x: Tensor, amax: float = INPUT_AMAX) -> Tensor:
    """Activations [N, K] in NVFP4, with block scales of their own and a global scale of amax / 2688.

    A scale over the whole batch would make a request's tokens depend on who else runs.
    """
    return fake_quantize_nvfp4(x, amax=amax)


class QuantizedExperts(nn.Module):
    """Routed experts whose matrices read NVFP4 inputs; shares the parameters of the experts that it stands in for.

    Args:
        experts: those.
        amax: of the inputs of gate/up and of down; None leaves them as they are.
    """

    def __init__(self, experts: Experts, amax: tuple[float | None, float | None] = (INPUT_AMAX, INPUT_AMAX)) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.amax = amax

    def forward(self, x_ND: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        x_ND, out_ND = _maybe(x_ND, self.amax[0]), x_ND.new_zeros(x_ND.shape)
        for expert in expert_ids_NA.unique().tolist():
            token, slot = (expert_ids_NA == expert).nonzero(as_tuple=True)
            hidden = _maybe(swiglu(F.linear(x_ND[token], self.gate_up_proj[expert])), self.amax[1])
            weight = weights_NA[token, slot].unsqueeze(1).to(x_ND.dtype)
            out_ND.index_add_(0, token, F.linear(hidden, self.down_proj[expert]) * weight)
        return out_ND


def _maybe(x: Tensor, amax: float | None) -> Tensor:
    return x if amax is None else quantize_inputs(x, amax)


def quantize_activations(decoder: Decoder) -> None:
    """Hook every linear map and every stack of experts in the decoder's layers; head and routers stay as they are."""
    quantize_inputs_of(
        decoder, {name: INPUT_AMAX for name, _ in decoder.named_parameters() if name.startswith("layers.")}
    )


def quantize_inputs_of(decoder: Decoder, amax: Mapping[str, float]) -> None:
    """Quantize the inputs of some matrices of the decoder's layers, whenever it runs.

    Args:
        amax: by the matrix's name in the decoder, such as `layers.0.attention.qkv_proj.weight` or
            `layers.1.mlp.experts.down_proj`: the largest magnitude that its inputs' scales cover. Other parameters
            have no inputs, and are passed over.
    """
    for path, module in list(decoder.named_modules()):
        if not path.startswith("layers."):
            continue
        if isinstance(module, MoE):
            pair = tuple(amax.get(f"{path}.experts.{part}_proj") for part in ("gate_up", "down"))
            if any(pair):
                # Same parameter names, so weights load as before.
                module.experts = QuantizedExperts(module.experts, pair)  # type: ignore[assignment,arg-type]
        elif isinstance(module, Linear) and f"{path}.weight" in amax:
            module.register_forward_pre_hook(partial(_quantize_argument, amax=amax[f"{path}.weight"]))


def _quantize_argument(module: nn.Module, args: tuple[Any, ...], *, amax: float) -> tuple[Any, ...]:
    return (quantize_inputs(args[0], amax), *args[1:])
