"""Surrogates: what the policy loss maximises at each token, from the policy's own ratio r.

r_t = p(y_t; theta) / p(y_t; theta_old), both from the training engine: it measures the update, not the engines. Each
function returns the surrogate (T,), which carries the gradient, and which tokens were clipped, bool.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tafkir.recipe.rl import PolicyLossTable

__all__ = ["PolicyTokens", "cispo", "gspo", "ppo", "reinforce", "surrogate"]


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """What a surrogate reads: T tokens of S completions."""

    logprobs_T: Tensor
    old_logprobs_T: Tensor
    advantages_T: Tensor
    masked_T: Tensor
    sequence_T: Tensor
    lengths_S: Tensor

    def ratio(self) -> Tensor:
        """r, at dropped tokens 1: they weigh nothing, and nothing of theirs may overflow."""
        log_ratio_T = self.logprobs_T - self.old_logprobs_T
        return torch.where(self.masked_T, torch.zeros_like(log_ratio_T), log_ratio_T).exp()


Values = tuple[Tensor, Tensor]


def ppo(tokens: PolicyTokens, eps_low: float, eps_high: float, dual_clip: float | None = None) -> Values:
    """min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) (PPO, arXiv 1707.06347; clip-higher: DAPO, arXiv 2503.14476).

    With `dual_clip` c it is at least c A where A < 0 (arXiv 1912.09729, equation 5).
    """
    ratio_T, advantages_T = tokens.ratio(), tokens.advantages_T
    clipped_ratio_T = ratio_T.clamp(1 - eps_low, 1 + eps_high)
    value_T = torch.minimum(ratio_T * advantages_T, clipped_ratio_T * advantages_T)
    clipped_T = clipped_ratio_T * advantages_T < ratio_T * advantages_T
    if dual_clip is not None:
        floor_T = torch.where(advantages_T < 0, dual_clip * advantages_T, torch.full_like(value_T, -torch.inf))
        clipped_T = clipped_T | (value_T < floor_T)
        value_T = torch.maximum(value_T, floor_T)
    return value_T, clipped_T.detach()


def cispo(tokens: PolicyTokens, eps_low: float, eps_high: float) -> Values:
    """sg(clip(r, 1 - eps_low, 1 + eps_high)) A ln p: no token loses its gradient (CISPO, arXiv 2506.13585)."""
    ratio_T = tokens.ratio().detach()
    clipped_ratio_T = ratio_T.clamp(1 - eps_low, 1 + eps_high)
    return clipped_ratio_T * tokens.advantages_T * tokens.logprobs_T, clipped_ratio_T != ratio_T


def gspo(tokens: PolicyTokens, eps_low: float, eps_high: float) -> Values:
    """min(s A, clip(s) A) with one s_i = exp(mean_t ln r_t) a completion (GSPO, arXiv 2507.18071, equations 5 and 7).

    In GSPO-token's form (equations 13-14), s_t = sg(s_i) p / sg(p): the same values and, for one advantage a
    completion, the same gradient, while a dropped token gets none.
    """
    log_ratio_T = tokens.logprobs_T - tokens.old_logprobs_T
    sum_S = torch.zeros_like(tokens.lengths_S, dtype=log_ratio_T.dtype)
    mean_S = sum_S.index_add_(0, tokens.sequence_T, log_ratio_T.detach()) / tokens.lengths_S
    ratio_T = mean_S.exp()[tokens.sequence_T] * (tokens.logprobs_T - tokens.logprobs_T.detach()).exp()
    clipped_ratio_T = ratio_T.clamp(1 - eps_low, 1 + eps_high)
    unclipped_T, clipped_T = ratio_T * tokens.advantages_T, clipped_ratio_T * tokens.advantages_T
    return torch.minimum(unclipped_T, clipped_T), (clipped_T < unclipped_T).detach()


def reinforce(tokens: PolicyTokens) -> Values:
    """A ln p: the policy gradient itself, no ratio and no clip (Williams, 1992)."""
    return tokens.advantages_T * tokens.logprobs_T, torch.zeros_like(tokens.masked_T)


def surrogate(tokens: PolicyTokens, config: PolicyLossTable) -> Values:
    """The surrogate that the recipe names."""
    eps = config.clip_eps_low, config.clip_eps_high
    match config.surrogate:
        case "ppo":
            return ppo(tokens, *eps, config.dual_clip)
        case "cispo":
            return cispo(tokens, *eps)
        case "gspo":
            return gspo(tokens, *eps)
        case "reinforce":
            return reinforce(tokens)
