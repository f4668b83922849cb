"""Policy-gradient loss as pure functions of flat token tensors.

Shapes: T sampled tokens of all completions one after the other, S completions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tafkir.recipe.rl import Acceptance, IcePop

__all__ = ["PolicyLoss", "Reduction", "icepop_weights", "policy_loss", "reduce_tokens"]

Reduction = Literal["sequence_mean", "token_mean"]


@dataclass(frozen=True, slots=True)
class IcePopWeights:
    """Weight of each token, and what the mask did."""

    weight_T: Tensor
    masked_T: Tensor
    nonfinite: int


def icepop_weights(
    train_logprobs_T: Tensor, sampling_logprobs_T: Tensor, *, alpha: float = 0.5, beta: float = 5.0
) -> IcePopWeights:
    """The weights M(k) of IcePop (arXiv 2510.18855, equations 1-3).

    k = p_train / p_sampling for the *same* weights; M(k) = k where alpha <= k <= beta, both ends included, and 0
    elsewhere. The band is tested in log space, so that a huge ratio never becomes inf * 0 = NaN. A token whose
    log-ratio is not finite is masked and counted.

    Args:
        train_logprobs_T: log-probabilities under the training engine at the weights that sampled, float.
        sampling_logprobs_T: log-probabilities stored by the sampling engine, float.
        alpha: lower end of the band. Zero leaves it open.
        beta: upper end of the band.

    Returns:
        Detached weights (T,), the mask of dropped tokens (T,) bool, and the number of non-finite ratios.
    """
    log_k_T = (train_logprobs_T - sampling_logprobs_T).detach().double()
    finite_T = torch.isfinite(log_k_T)
    low = torch.tensor(alpha, dtype=torch.float64).log()
    high = torch.tensor(beta, dtype=torch.float64).log()
    # One part in 10^6 (the rounding of fp32 log-probabilities) keeps k = alpha and k = beta inside.
    inside_T = finite_T & (log_k_T >= low - 1e-6) & (log_k_T <= high + 1e-6)
    weight_T = torch.where(inside_T, log_k_T, torch.zeros_like(log_k_T)).exp() * inside_T
    return IcePopWeights(weight_T.to(train_logprobs_T.dtype), ~inside_T, int((~finite_T).sum()))


def reduce_tokens(
    values_T: Tensor,
    sequence_T: Tensor,
    lengths_S: Tensor,
    *,
    reduction: Reduction,
    num_sequences: float,
    num_tokens: float,
) -> Tensor:
    """Mean over all tokens, or over the tokens of each completion and then over completions.

    The denominators are those of the *whole* optimiser step, so that the sum over micro-batches equals the loss
    of the batch in one piece.

    Args:
        values_T: per-token values.
        sequence_T: index of each token's completion, int64.
        lengths_S: tokens of each completion; masked tokens count.
        reduction: which mean.
        num_sequences: completions in the whole step.
        num_tokens: tokens in the whole step.
    """
    if reduction == "token_mean":
        return values_T.sum() / num_tokens
    return (values_T / lengths_S[sequence_T]).sum() / num_sequences


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The scalar to differentiate, and per-token facts for the monitor."""

    loss: Tensor
    weight_T: Tensor
    masked_T: Tensor
    clipped_T: Tensor
    nonfinite: int


def policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    sampling_logprobs_T: Tensor,
    advantages_T: Tensor,
    sequence_T: Tensor,
    lengths_S: Tensor,
    *,
    acceptance: Acceptance,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    reduction: Reduction = "sequence_mean",
    num_sequences: float | None = None,
    num_tokens: float | None = None,
    kl_coef: float = 0.0,
    ref_logprobs_T: Tensor | None = None,
) -> PolicyLoss:
    """GRPO with the IcePop mask (arXiv 2510.18855, equation 1), negated for descent.

    `-mean_i 1/|y_i| sum_t M(k) min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) + kl_coef * KL(pi || pi_ref)`, with
    `r = exp(logprobs - old_logprobs)` and `k = exp(old_logprobs - sampling_logprobs)`. Masked tokens get no
    policy gradient and stay in the denominator; the KL term (k3 estimator) covers every token.

    Args:
        logprobs_T: log-probabilities of the sampled tokens under the weights being trained; carries the gradient.
        old_logprobs_T: the same under the weights that sampled, from the training engine.
        sampling_logprobs_T: the same, as the sampling engine stored them.
        advantages_T: advantage of each token's completion.
        sequence_T: index of each token's completion, int64, below S.
        lengths_S: tokens of each completion.
        acceptance: the acceptance region; `none` is plain GRPO.
        clip_eps_low: PPO clip below one.
        clip_eps_high: PPO clip above one.
        reduction: how tokens are averaged.
        num_sequences: completions of the whole step (default: S).
        num_tokens: tokens of the whole step (default: T).
        kl_coef: weight of the penalty towards the reference policy.
        ref_logprobs_T: log-probabilities under the reference policy; needed when `kl_coef > 0`.
    """
    old_T = old_logprobs_T.detach()
    if isinstance(acceptance, IcePop):
        ice = icepop_weights(old_T, sampling_logprobs_T, alpha=acceptance.alpha, beta=acceptance.beta)
    else:
        ice = IcePopWeights(torch.ones_like(old_T), torch.zeros_like(old_T, dtype=torch.bool), 0)
    ratio_T = (logprobs_T - old_T).exp()
    clipped_ratio_T = ratio_T.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    surrogate_T = torch.minimum(ratio_T * advantages_T, clipped_ratio_T * advantages_T)
    # `where`, not a product: a dropped token must not turn a non-finite surrogate into NaN.
    values_T = torch.where(ice.masked_T, torch.zeros_like(surrogate_T), -ice.weight_T * surrogate_T)
    if kl_coef > 0:
        assert ref_logprobs_T is not None
        delta_T = ref_logprobs_T - logprobs_T
        values_T = values_T + kl_coef * (delta_T.exp() - delta_T - 1)
    loss = reduce_tokens(
        values_T,
        sequence_T,
        lengths_S,
        reduction=reduction,
        num_sequences=num_sequences or lengths_S.numel(),
        num_tokens=num_tokens or values_T.numel(),
    )
    clipped_T = (clipped_ratio_T * advantages_T < ratio_T * advantages_T).detach()
    return PolicyLoss(loss, ice.weight_T, ice.masked_T, clipped_T, ice.nonfinite)
