"""Acceptance regions: what the ratio k of training to sampling engine does to each sampled token.

k_t = p_train(y_t) / p_sampling(y_t) for the weights that sampled: it measures the two engines, not the update. Every
bound is inclusive and tested in log space, so that a huge ratio never becomes inf * 0 = NaN; a token whose log-ratio is
not finite is dropped and counted. Shapes: T sampled tokens of all completions one after the other, S completions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tafkir.recipe.rl import Acceptance, DppoTv, GeoRs, IcePop, KPop, Mis, NoAcceptance, SeqTis, Tis

__all__ = ["Accepted", "Ratios", "accept_tokens", "dppo_tv", "geo_rs", "icepop", "kpop", "mis", "seq_tis", "tis"]

# One part in 10^6 (the rounding of fp32 log-probabilities) keeps what lies on a bound inside.
_SLACK = 1e-6
# A token's complement is never taken as less likely than this: fp32 log-probabilities cannot tell it from zero.
_LOG_TINY = -27.0


@dataclass(frozen=True, slots=True)
class Accepted:
    """Detached weight of each token (0 where it is dropped), which are dropped, and how many ratios were not finite."""

    weight_T: Tensor
    masked_T: Tensor
    nonfinite: int


@dataclass(frozen=True, slots=True)
class Ratios:
    """What a region decides on, in float64. `log_k_T` is 0 where it would not be finite, which `finite_T` tells."""

    log_k_T: Tensor
    finite_T: Tensor
    train_logprobs_T: Tensor
    sampling_logprobs_T: Tensor
    advantages_T: Tensor
    sequence_T: Tensor
    lengths_S: Tensor

    def per_completion(self, values_T: Tensor) -> Tensor:
        """Sums over the tokens of each completion."""
        total_S = torch.zeros(self.lengths_S.numel(), dtype=values_T.dtype, device=values_T.device)
        return total_S.index_add_(0, self.sequence_T, values_T)

    def is_whole(self) -> Tensor:
        """Completions all of whose ratios are finite: of the others the product is not known."""
        return self.per_completion((~self.finite_T).double()) == 0


Region = tuple[Tensor, Tensor]
"""Log of each token's weight, and which tokens stay."""


def tis(ratios: Ratios, cap: float) -> Region:
    """Truncated importance sampling, w = min(k, C) (Yao et al., "Off-Policy RL", 2025)."""
    return ratios.log_k_T.clamp(max=_log(cap)), ratios.finite_T


def seq_tis(ratios: Ratios, cap: float) -> Region:
    """The same for whole completions, w = min(prod_t k_t, C) at each of their tokens (verl, `rollout_is=sequence`)."""
    log_w_S = ratios.per_completion(ratios.log_k_T).clamp(max=_log(cap))
    return log_w_S[ratios.sequence_T], ratios.is_whole()[ratios.sequence_T]


def mis(ratios: Ratios, cap: float) -> Region:
    """w = K = prod_t k_t where K <= C, else the completion is dropped (masked importance sampling; TRL)."""
    log_w_S = ratios.per_completion(ratios.log_k_T)
    keep_S = ratios.is_whole() & (log_w_S <= _log(cap) + _SLACK)
    return log_w_S[ratios.sequence_T], keep_S[ratios.sequence_T]


def icepop(ratios: Ratios, alpha: float, beta: float) -> Region:
    """M(k) = k where alpha <= k <= beta, else 0 (IcePop, arXiv 2510.18855, equations 1-3). Alpha 0: no lower end."""
    log_k_T = ratios.log_k_T
    inside_T = ratios.finite_T & (log_k_T >= _log(alpha) - _SLACK) & (log_k_T <= _log(beta) + _SLACK)
    return log_k_T, inside_T


def kpop(ratios: Ratios, phi: float) -> Region:
    """w = k unless max(KL(p || q), KL(q || p)) > phi, with Bernoulli p = p_train and q = p_sampling (KPop).

    KL(p || q) = p ln(p / q) + (1 - p) ln((1 - p) / (1 - q)).
    """
    p_T, q_T = ratios.train_logprobs_T.exp(), ratios.sampling_logprobs_T.exp()
    log_not_p_T = torch.log(-torch.expm1(ratios.train_logprobs_T)).clamp(min=_LOG_TINY)
    log_not_q_T = torch.log(-torch.expm1(ratios.sampling_logprobs_T)).clamp(min=_LOG_TINY)
    log_k_T, log_not_k_T = ratios.log_k_T, log_not_p_T - log_not_q_T
    forward_T = p_T * log_k_T + (1 - p_T) * log_not_k_T
    backward_T = -q_T * log_k_T - (1 - q_T) * log_not_k_T
    return log_k_T, ratios.finite_T & (torch.maximum(forward_T, backward_T) <= phi + _SLACK)


def dppo_tv(ratios: Ratios, delta: float) -> Region:
    """w = k unless p - q > delta with A > 0, or p - q < -delta with A < 0 (DPPO, binary total variation)."""
    lead_T = (ratios.train_logprobs_T.exp() - ratios.sampling_logprobs_T.exp()) * ratios.advantages_T.sign()
    return ratios.log_k_T, ratios.finite_T & (lead_T <= delta + _SLACK)


def geo_rs(ratios: Ratios, low: float, high: float) -> Region:
    """w = k, and a completion is dropped unless low <= exp(mean_t ln k_t) <= high (NeMo-RL, `seq-mask-tis`)."""
    mean_S = ratios.per_completion(ratios.log_k_T) / ratios.lengths_S
    keep_S = ratios.is_whole() & (mean_S >= _log(low) - _SLACK) & (mean_S <= _log(high) + _SLACK)
    return ratios.log_k_T, keep_S[ratios.sequence_T]


def accept_tokens(
    acceptance: Acceptance,
    train_logprobs_T: Tensor,
    sampling_logprobs_T: Tensor,
    advantages_T: Tensor,
    sequence_T: Tensor,
    lengths_S: Tensor,
) -> Accepted:
    """Weigh and drop tokens as an acceptance region says.

    Args:
        acceptance: the region with its bounds.
        train_logprobs_T: log-probabilities under the training engine at the weights that sampled, float.
        sampling_logprobs_T: log-probabilities stored by the sampling engine, float.
        advantages_T: advantage of each token; one region looks at its sign.
        sequence_T: index of each token's completion, int64, below S.
        lengths_S: tokens of each completion.
    """
    if isinstance(acceptance, NoAcceptance):
        ones_T = torch.ones_like(train_logprobs_T).detach()
        return Accepted(ones_T, torch.zeros_like(ones_T, dtype=torch.bool), 0)
    log_k_T = (train_logprobs_T - sampling_logprobs_T).detach().double()
    finite_T = torch.isfinite(log_k_T)
    log_k_T = torch.where(finite_T, log_k_T, torch.zeros_like(log_k_T))
    logprobs = (train_logprobs_T.detach().double(), sampling_logprobs_T.detach().double())
    ratios = Ratios(log_k_T, finite_T, *logprobs, advantages_T, sequence_T, lengths_S)
    log_weight_T, keep_T = _region(acceptance, ratios)
    weight_T = torch.where(keep_T, log_weight_T, torch.zeros_like(log_weight_T)).exp() * keep_T
    return Accepted(weight_T.to(train_logprobs_T.dtype), ~keep_T, int((~finite_T).sum()))


def _region(acceptance: Acceptance, ratios: Ratios) -> Region:
    match acceptance:
        case IcePop():
            return icepop(ratios, acceptance.alpha, acceptance.beta)
        case Tis():
            return tis(ratios, acceptance.cap)
        case SeqTis():
            return seq_tis(ratios, acceptance.cap)
        case Mis():
            return mis(ratios, acceptance.cap)
        case KPop():
            return kpop(ratios, acceptance.phi)
        case DppoTv():
            return dppo_tv(ratios, acceptance.delta)
        case GeoRs():
            return geo_rs(ratios, acceptance.low, acceptance.high)
        case _:
            raise AssertionError(acceptance)


def _log(bound: float) -> float:
    return float(torch.tensor(bound, dtype=torch.float64).log())
