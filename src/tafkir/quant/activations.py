"""Inputs of the quantized matrices in NVFP4, for an engine's own decoder, or one that trains for quantization.

Shapes: N tokens, D hidden, E experts, I expert width, A active experts per token, P = N * A pairs of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tafkir.models.decoder import Decoder
from tafkir.models.experts import Experts, MoE
from tafkir.models.layers import Linear
from tafkir.ops.fake_quant import round_inputs
from tafkir.ops.fp8 import FP8_MAX
from tafkir.ops.moe import swiglu
from tafkir.ops.nvfp4 import E2M1_MAX

__all__ = ["INPUT_AMAX", "QuantizedExperts", "quantize_activations", "quantize_inputs", "quantize_inputs_of"]

INPUT_AMAX = E2M1_MAX * FP8_MAX
"""What a global scale of one stands for: it needs no calibration (ModelOpt ships recipes with `input_scale` 1)."""


def quantize_inputs(x: Tensor, amax: float = INPUT_AMAX) -> Tensor:
    """Activations [N, K] in NVFP4, with block scales of their own and a global scale of amax / 2688.

    A scale over the whole batch would make a request's tokens depend on who else runs. Gradients go straight through.
    """
    return round_inputs(x, amax)


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
        num_experts, active = len(self.down_proj), expert_ids_NA.shape[1]
        flat_P = expert_ids_NA.reshape(-1)
        order_P = torch.sort(flat_P, stable=True).indices
        counts = torch.bincount(flat_P, minlength=num_experts).tolist()
        token_P = torch.div(order_P, active, rounding_mode="floor")
        x_PD = _maybe(x_ND, self.amax[0]).index_select(0, token_P)
        hidden_PI = _maybe(swiglu(_apart(x_PD, self.gate_up_proj, counts)), self.amax[1])
        weights_P1 = weights_NA.reshape(-1, 1).index_select(0, order_P)
        y_PD = _apart(hidden_PI, self.down_proj, counts) * weights_P1.to(x_ND.dtype)
        inverse_P = torch.empty_like(order_P)
        inverse_P[order_P] = torch.arange(len(order_P), device=order_P.device)
        y_NAD: Tensor = y_PD.index_select(0, inverse_P).unflatten(0, (-1, active))
        return y_NAD.sum(1)


def _apart(x_PK: Tensor, weights_ERK: Tensor, counts: list[int]) -> Tensor:
    """Each expert's matrix on its own rows, which lie one expert after the other: [P, R]."""
    parts = zip(x_PK.split(counts), weights_ERK.unbind(0), strict=True)
    return torch.cat([F.linear(x, weight) for x, weight in parts if len(x)])


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
