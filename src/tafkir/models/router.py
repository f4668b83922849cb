"""The group-limited router, its expert bias that only selects, and the bias's balance update.

Shapes: N tokens, D hidden, E experts, A active experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tafkir.recipe.model import ModelConfig

__all__ = ["Router", "Routing", "balanced_bias", "route"]


@dataclass(frozen=True, slots=True)
class Routing:
    """Where each token goes: `expert_ids_NA` (int64) with `weights_NA` (float32)."""

    expert_ids_NA: Tensor
    weights_NA: Tensor


def route(scores_NE: Tensor, expert_bias_E: Tensor | None, config: ModelConfig) -> Routing:
    """Choose experts by biased scores within the best groups; weigh them by unbiased scores.

    A group's score is the sum of its two best biased scores (arXiv 2412.19437, section 2.1.2; Ling 2.0 alike).

    Args:
        scores_NE: sigmoid or softmax scores, float32.
        expert_bias_E: float32, added for the selection only; None where the family has none.
        config: gives the groups, the number of active experts and the scaling factor.
    """
    with torch.no_grad():
        biased_NE = scores_NE if expert_bias_E is None else scores_NE + expert_bias_E
        if config.topk_group < config.n_group:
            grouped = biased_NE.view(len(biased_NE), config.n_group, -1)
            group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            chosen = group_scores.topk(config.topk_group, dim=-1, sorted=False).indices
            closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, chosen, False)
            biased_NE = grouped.masked_fill(closed.unsqueeze(-1), -torch.inf).view_as(biased_NE)
        expert_ids_NA = biased_NE.topk(config.num_experts_per_tok, dim=-1).indices
    weights_NA = scores_NE.gather(1, expert_ids_NA)
    if config.norm_topk_prob:
        weights_NA = weights_NA / (weights_NA.sum(-1, keepdim=True) + 1e-20)
    return Routing(expert_ids_NA, weights_NA * config.routed_scaling_factor)


class Router(nn.Module):
    """Scores every expert in float32; `expert_bias` is a float32 buffer that the optimiser never sees, or None."""

    expert_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias_E = torch.empty(config.num_experts, dtype=torch.float32) if config.use_expert_bias else None
        self.register_buffer("expert_bias", bias_E)

    def fresh_weights(self, std: float, generator: torch.Generator) -> None:
        """Normal weights, a bias of zero."""
        self.weight.normal_(0.0, std, generator=generator)
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def forward(self, x_ND: Tensor) -> Routing:
        logits_NE = F.linear(x_ND.float(), self.weight.float())
        scores_NE = logits_NE.sigmoid() if self.config.score_function == "sigmoid" else logits_NE.softmax(-1)
        return route(scores_NE, None if self.expert_bias is None else self.expert_bias.float(), self.config)


def balanced_bias(expert_bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """b + u (sign(e) - mean sign(e)) with e = mean load - load (arXiv 2510.22115, section 2.2; zero mean)."""
    load_E = load_E.to(expert_bias_E.dtype)
    sign_E = torch.sign(load_E.mean() - load_E)
    return expert_bias_E + rate * (sign_E - sign_E.mean())
