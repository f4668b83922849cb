"""The policy-gradient loss as a pure function of flat token tensors.

Shapes: T sampled tokens of all completions one after the other, S completions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tafkir.recipe.rl import KlEstimator, PolicyLossTable, Reduction
from tafkir.train.acceptance import accept_tokens
from tafkir.train.surrogates import PolicyTokens, surrogate

__all__ = ["PolicyLoss", "kl_penalty", "policy_loss", "reduce_tokens"]


def reduce_tokens(
    values_T: Tensor,
    sequence_T: Tensor,
    lengths_S: Tensor,
    *,
    reduction: Reduction,
    num_sequences: float,
    num_tokens: float,
    max_tokens: int,
) -> Tensor:
    """Mean over the tokens of each completion and then over completions, mean over all tokens, or a constant's share.

    The denominators are those of the *whole* optimiser step, so that the sum over micro-batches equals the loss
    of the batch in one piece.

    Args:
        values_T: per-token values.
        sequence_T: index of each token's completion, int64.
        lengths_S: tokens of each completion; dropped tokens count.
        reduction: `sequence_mean` (GRPO), `token_mean` (DAPO, arXiv 2503.14476) or `constant`: the sum over
            completions times the length limit (Dr. GRPO, arXiv 2503.20783).
        num_sequences: completions in the whole step.
        num_tokens: tokens in the whole step.
        max_tokens: the length limit.
    """
    if reduction == "token_mean":
        return values_T.sum() / num_tokens
    if reduction == "constant":
        return values_T.sum() / (num_sequences * max_tokens)
    return (values_T / lengths_S[sequence_T]).sum() / num_sequences


def kl_penalty(logprobs_T: Tensor, ref_logprobs_T: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimates of KL(pi || pi_ref) at sampled tokens (Schulman, "Approximating KL Divergence", 2020).

    With d = ln pi_ref - ln pi: k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1. All three estimate the same value; as a
    loss, k2's gradient is the one of the divergence, k3's comes close to it, and k1's is zero in expectation.
    """
    delta_T = ref_logprobs_T - logprobs_T
    if estimator == "k1":
        return -delta_T
    if estimator == "k2":
        return delta_T.square() / 2
    return delta_T.exp() - delta_T - 1


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
    config: PolicyLossTable,
    num_sequences: float | None = None,
    num_tokens: float | None = None,
    ref_logprobs_T: Tensor | None = None,
) -> PolicyLoss:
    """Acceptance weight times surrogate, plus the KL penalty, reduced and negated for descent.

    `-R[w(k) surrogate(r, A)] + coef R[KL(pi || pi_ref)]`, with `r = exp(logprobs - old_logprobs)`, `k =
    exp(old_logprobs - sampling_logprobs)` and R the reduction. At the defaults it is GRPO with the IcePop mask
    (arXiv 2510.18855, equation 1). Dropped tokens get no policy gradient and stay in every denominator.

    Args:
        logprobs_T: log-probabilities of the sampled tokens under the weights being trained; carries the gradient.
        old_logprobs_T: the same under the weights that sampled, from the training engine.
        sampling_logprobs_T: the same, as the sampling engine stored them.
        advantages_T: advantage of each token's completion.
        sequence_T: index of each token's completion, int64, below S.
        lengths_S: tokens of each completion.
        config: acceptance region, surrogate with its clips, KL penalty and reduction.
        num_sequences: completions of the whole step (default: S).
        num_tokens: tokens of the whole step (default: T).
        ref_logprobs_T: log-probabilities under the reference policy; needed when `config.kl.coef > 0`.
    """
    old_T = old_logprobs_T.detach()
    accepted = accept_tokens(config.acceptance, old_T, sampling_logprobs_T, advantages_T, sequence_T, lengths_S)
    tokens = PolicyTokens(logprobs_T, old_T, advantages_T, accepted.masked_T, sequence_T, lengths_S)
    surrogate_T, clipped_T = surrogate(tokens, config)
    # `where`, not a product: a dropped token must not turn a non-finite surrogate into NaN.
    values_T = torch.where(accepted.masked_T, torch.zeros_like(surrogate_T), -accepted.weight_T * surrogate_T)
    if config.kl.coef > 0:
        assert ref_logprobs_T is not None
        if not config.kl.masked_tokens:
            ref_logprobs_T = torch.where(accepted.masked_T, logprobs_T.detach(), ref_logprobs_T)
        kl_T = kl_penalty(logprobs_T, ref_logprobs_T, config.kl.estimator)
        if not config.kl.masked_tokens:
            kl_T = torch.where(accepted.masked_T, torch.zeros_like(kl_T), kl_T)
        values_T = values_T + config.kl.coef * kl_T
    loss = reduce_tokens(
        values_T,
        sequence_T,
        lengths_S,
        reduction=config.reduction,
        num_sequences=num_sequences or lengths_S.numel(),
        num_tokens=num_tokens or values_T.numel(),
        max_tokens=config.max_completion_tokens,
    )
    return PolicyLoss(loss, accepted.weight_T, accepted.masked_T, clipped_T, accepted.nonfinite)
