"""The group-limited router, its expert bias that only selects, and the bias's balance update.

Shapes: N tokens, D hidden, E experts, A active experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tafkir.errors import TrainingError
from tafkir.ops.routing import choose_experts
from tafkir.recipe.model import ModelConfig

__all__ = ["Router", "Routing", "balanced_bias", "check_replay", "route"]


@dataclass(frozen=True, slots=True)
class Routing:
    """Where each token goes, and from what.

    Attributes:
        expert_ids_NA: int64, each token's experts.
        weights_NA: float32, their weights.
        scores_NE: float32, sigmoid or softmax of the logits, without the expert bias.
        logits_NE: float32.
    """

    expert_ids_NA: Tensor
    weights_NA: Tensor
    scores_NE: Tensor
    logits_NE: Tensor


def route(
    scores_NE: Tensor, expert_bias_E: Tensor | None, config: ModelConfig, replayed_expert_ids_NA: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose experts by biased scores within the best groups; weigh them by unbiased scores.

    A group's score is the sum of its two best biased scores (arXiv 2412.19437, section 2.1.2; Ling 2.0 alike).

    Args:
        scores_NE: sigmoid or softmax scores, float32.
        expert_bias_E: float32, added for the selection only; None where the family has none.
        config: gives the groups, the number of active experts and the scaling factor.
        replayed_expert_ids_NA: int64, experts to take instead (Rollout Routing Replay, arXiv 2510.11370); their
            weights come from the present scores, so the router still learns. A row of -1 chooses for itself.

    Returns:
        The experts, int64 [N, A], and their weights, float32 [N, A].
    """
    with torch.no_grad():
        sizes = (config.n_group, config.topk_group, config.num_experts_per_tok)
        expert_ids_NA = choose_experts(scores_NE, expert_bias_E, *sizes)
        if replayed_expert_ids_NA is not None:
            expert_ids_NA = torch.where(replayed_expert_ids_NA < 0, expert_ids_NA, replayed_expert_ids_NA)
    weights_NA = scores_NE.gather(1, expert_ids_NA)
    if config.norm_topk_prob:
        weights_NA = weights_NA / (weights_NA.sum(-1, keepdim=True) + 1e-20)
    return expert_ids_NA, weights_NA * config.routed_scaling_factor


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

    def forward(self, x_ND: Tensor, replayed_expert_ids_NA: Tensor | None = None) -> Routing:
        logits_NE = F.linear(x_ND.float(), self.weight.float())
        scores_NE = logits_NE.sigmoid() if self.config.score_function == "sigmoid" else logits_NE.softmax(-1)
        bias_E = None if self.expert_bias is None else self.expert_bias.float()
        expert_ids_NA, weights_NA = route(scores_NE, bias_E, self.config, replayed_expert_ids_NA)
        return Routing(expert_ids_NA, weights_NA, scores_NE, logits_NE)


def check_replay(
    replayed_expert_ids: Sequence[Tensor] | None, num_tokens: int, routers: Sequence[Router]
) -> Sequence[Tensor]:
    """The experts to replay, layer by layer, checked; none where there are none.

    Raises:
        TrainingError: another number of layers, another shape, an expert that is not there, or a row that names
            experts in part.
    """
    if replayed_expert_ids is None:
        return ()
    if len(replayed_expert_ids) != len(routers):
        raise TrainingError(
            f"replayed experts of {len(replayed_expert_ids)} layers", expected=f"those of {len(routers)} MoE layers"
        )
    for layer, (ids_NA, router) in enumerate(zip(replayed_expert_ids, routers, strict=True)):
        config, where = router.config, f"MoE layer {layer}"
        shape = [num_tokens, config.num_experts_per_tok]
        if list(ids_NA.shape) != shape or ids_NA.dtype != torch.int64:
            raise TrainingError(
                f"replayed experts are {ids_NA.dtype} {list(ids_NA.shape)}", where=where, expected=f"int64 {shape}"
            )
        unknown_NA = ids_NA < 0
        if bool((ids_NA >= config.num_experts).any()) or bool((unknown_NA != unknown_NA[:, :1]).any()):
            raise TrainingError(
                "replayed experts are out of range",
                where=where,
                expected=f"0 to {config.num_experts - 1}, or a whole row of -1 where none were recorded",
            )
    return replayed_expert_ids


def balanced_bias(expert_bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """b + u (sign(e) - mean sign(e)) with e = mean load - load (arXiv 2510.22115, section 2.2; zero mean)."""
    load_E = load_E.to(expert_bias_E.dtype)
    sign_E = torch.sign(load_E.mean() - load_E)
    return expert_bias_E + rate * (sign_E - sign_E.mean())
