"""The mixture-of-experts sublayer: router, stacked routed experts and an ungated shared expert.

Shapes: N tokens, D hidden, E experts, I expert width, A active experts per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tafkir.models.layers import SwiGLU
from tafkir.models.router import Router, Routing
from tafkir.ops.moe import moe_experts
from tafkir.recipe.model import ModelConfig

__all__ = ["Experts", "MoE"]


class Experts(nn.Module):
    """Routed SwiGLU experts as two stacked weights: [E, 2I, D] (gate rows first) and [E, D, I].

    `kernel` computes them: `moe_experts`, or what stands in for it on a device.
    """

    kernel: Callable[..., Tensor] = staticmethod(moe_experts)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num, hidden, width))

    def forward(self, x_ND: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        return self.kernel(x_ND, self.gate_up_proj, self.down_proj, expert_ids_NA, weights_NA)


class MoE(nn.Module):
    """Routed experts plus the shared expert, which every token visits at full weight."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        width = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, width) if width else None

    def forward(self, x_ND: Tensor, replayed_expert_ids_NA: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Returns the sublayer's output [N, D] and where each token went."""
        routing = self.router(x_ND, replayed_expert_ids_NA)
        out_ND = self.experts(x_ND, routing.expert_ids_NA, routing.weights_NA)
        if self.shared_experts is not None:
            out_ND = out_ND + self.shared_experts(x_ND)
        return out_ND, routing
