"""How far the sampling engine and the training engine disagree about the tokens that were sampled."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mismatch_metrics"]


def mismatch_metrics(
    train_logprobs_T: Tensor, sampling_logprobs_T: Tensor, masked_T: Tensor, sequence_T: Tensor, num_sequences: int
) -> dict[str, float]:
    """Summary of log-probability differences at equal weights.

    Returns:
        `mismatch/abs_logprob_diff_mean` and `_max` (nats; Ring's authors call a run lost above a mean of 0.05),
        `mismatch/kl` (k3 estimate of KL(sampling || training), nats), `mismatch/masked_fraction` (tokens),
        `mismatch/masked_sequences` (share of completions with a masked token), and `mismatch/ess` (effective
        sample size of the ratios as a share of the tokens). Non-finite differences are left out and counted in
        `mismatch/nonfinite`.
    """
    log_k_T = (train_logprobs_T - sampling_logprobs_T).detach().double()
    finite_T = torch.isfinite(log_k_T)
    log_k = log_k_T[finite_T]
    hit_S = torch.zeros(num_sequences, dtype=torch.bool)
    hit_S[sequence_T[masked_T]] = True
    if log_k.numel() == 0:
        log_k = torch.zeros(1, dtype=torch.float64)
    k = log_k.clamp(max=50.0).exp()
    return {
        "mismatch/abs_logprob_diff_mean": float(log_k.abs().mean()),
        "mismatch/abs_logprob_diff_max": float(log_k.abs().max()),
        "mismatch/kl": float((k - 1 - log_k).mean()),
        "mismatch/masked_fraction": float(masked_T.double().mean()) if masked_T.numel() else 0.0,
        "mismatch/masked_sequences": float(hit_S.double().mean()) if num_sequences else 0.0,
        "mismatch/ess": float(k.sum() ** 2 / (k.square().sum() * k.numel())),
        "mismatch/nonfinite": float((~finite_T).sum()),
    }
