"""How far the sampling engine and the training engine disagree about the tokens that were sampled."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EntropyProbe", "mismatch_metrics", "out_of_band"]

# Logits of this many numbers at once are small beside what training needs, whatever the vocabulary.
_CHUNK_LOGITS = 1 << 22
_PROBED = 256


def mismatch_metrics(
    train_logprobs_T: Tensor,
    sampling_logprobs_T: Tensor,
    masked_T: Tensor,
    sequence_T: Tensor,
    num_sequences: int,
    *,
    low: float = 0.5,
    high: float = 5.0,
) -> dict[str, float]:
    """Summary of log-probability differences at equal weights.

    Args:
        masked_T: tokens that the acceptance region dropped.
        sequence_T: index of each token's completion, below `num_sequences`.
        low: lower end of the band that tokens and completions are counted by.
        high: its upper end; both ends are inside.

    Returns:
        `mismatch/abs_logprob_diff_mean` and `_max` (nats; Ring's authors call a run lost above a mean of 0.05),
        `mismatch/kl` (k3 estimate of KL(sampling || training), nats), `mismatch/masked_fraction` (tokens),
        `mismatch/masked_sequences` (share of completions with a masked token), `mismatch/out_of_band` and
        `mismatch/out_of_band_sequences` (shares of tokens whose k, and of completions whose product of k, leaves the
        band), and `mismatch/ess` (effective sample size of the ratios as a share of the tokens). Non-finite differences
        are out of the band, otherwise left out, and counted in `mismatch/nonfinite`.
    """
    log_k_T = (train_logprobs_T - sampling_logprobs_T).detach().double()
    finite_T = torch.isfinite(log_k_T)
    log_k = log_k_T[finite_T]
    hit_S = torch.zeros(num_sequences, dtype=torch.bool)
    hit_S[sequence_T[masked_T]] = True
    if log_k.numel() == 0:
        log_k = torch.zeros(1, dtype=torch.float64)
    k = log_k.clamp(max=50.0).exp()
    product_S = torch.zeros(num_sequences, dtype=torch.float64).index_add_(0, sequence_T, log_k_T)
    return {
        "mismatch/abs_logprob_diff_mean": float(log_k.abs().mean()),
        "mismatch/abs_logprob_diff_max": float(log_k.abs().max()),
        "mismatch/kl": float((k - 1 - log_k).mean()),
        "mismatch/masked_fraction": _share(masked_T),
        "mismatch/masked_sequences": _share(hit_S),
        "mismatch/out_of_band": _share(out_of_band(log_k_T, low, high)),
        "mismatch/out_of_band_sequences": _share(out_of_band(product_S, low, high)),
        "mismatch/ess": float(k.sum() ** 2 / (k.square().sum() * k.numel())),
        "mismatch/nonfinite": float((~finite_T).sum()),
    }


def out_of_band(log_k: Tensor, low: float, high: float) -> Tensor:
    """Where exp(log_k) is below `low` or above `high`, or not a number; both ends are inside up to fp32's rounding."""
    bounds = torch.tensor([low, high], dtype=torch.float64).log()
    return ~((log_k >= bounds[0] - 1e-6) & (log_k <= bounds[1] + 1e-6))


def _share(hit: Tensor) -> float:
    return float(hit.double().mean()) if hit.numel() else 0.0


class EntropyProbe:
    """Entropy of the policy at dropped tokens against all tokens, exact, at no more than some hundred positions.

    Dropped tokens are the uncertain ones where IcePop works as its authors describe (arXiv 2510.18855, appendix C).
    """

    def __init__(self) -> None:
        self._all: list[Tensor] = []
        self._masked: list[Tensor] = []

    def add(self, hidden_TD: Tensor, head_VD: Tensor, masked_T: Tensor, temperature: float) -> None:
        """Look at a micro-batch: evenly spaced tokens, and evenly spaced ones of those that were dropped.

        Args:
            hidden_TD: final hidden states that predict the T sampled tokens.
            head_VD: the head's weights over V tokens.
            masked_T: which of the tokens were dropped.
            temperature: sampling temperature.
        """
        masked = masked_T.nonzero().flatten()
        some = _spread(len(hidden_TD))
        self._all.append(_entropy(hidden_TD[some], head_VD, temperature))
        self._masked.append(_entropy(hidden_TD[masked[_spread(len(masked))]], head_VD, temperature))

    @staticmethod
    def joined(probes: Iterable[EntropyProbe]) -> EntropyProbe:
        """What several probes looked at, in their order."""
        whole = EntropyProbe()
        for probe in probes:
            whole._all += probe._all
            whole._masked += probe._masked
        return whole

    def metrics(self) -> dict[str, float]:
        """`mismatch/entropy` and, where a token was dropped, `mismatch/entropy_masked`, nats."""
        parts = {"mismatch/entropy": torch.cat(self._all), "mismatch/entropy_masked": torch.cat(self._masked)}
        return {name: float(values.mean()) for name, values in parts.items() if values.numel()}


def _spread(count: int) -> Tensor:
    """Indices below `count`, evenly spaced, so many as a probe looks at."""
    return torch.arange(count) if count <= _PROBED else torch.arange(_PROBED) * count // _PROBED


@torch.no_grad()
def _entropy(hidden_MD: Tensor, head_VD: Tensor, temperature: float) -> Tensor:
    rows = max(1, _CHUNK_LOGITS // head_VD.shape[0])
    parts = []
    for part_CD in hidden_MD.detach().split(rows):
        logprobs_CV = (F.linear(part_CD, head_VD).float() / temperature).log_softmax(-1)
        parts.append(-(logprobs_CV.exp() * logprobs_CV).sum(-1))
    return torch.cat(parts)
