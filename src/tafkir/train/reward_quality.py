"""What a reward model is worth on held-out pairs: accuracy, calibration, and whether it only likes length."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from tafkir.errors import TrainingError
from tafkir.intervals import CONFIDENCE, Estimate, accuracy, wilson
from tafkir.train.reward_model import ScoredPair

__all__ = [
    "calibration_error",
    "correlation",
    "measure_reward_model",
    "rank_correlation",
    "reliability_table",
    "reward_scale",
]

MATCHED = 0.1
"""Sides whose lengths differ by at most this share of the longer one are matched."""

_DRAWS = 1000


def measure_reward_model(pairs: Sequence[ScoredPair], num_bins: int = 10) -> dict[str, Any]:
    """Everything that `result.json` says of a reward model's held-out pairs, each share with its 95 % interval.

    `length_bias` has the correlation of reward and length over all answers, that of the two differences over pairs,
    the accuracy of the rule "the longer one is better" beside the model's, and the model's accuracy on pairs whose
    chosen side is longer, shorter, and of matched length.

    Raises:
        TrainingError: there is no pair, or a reward is not finite; the message names the pair.
    """
    if not pairs:
        raise TrainingError("no pair is held out to measure the reward model on", fix="raise preferences.heldout_share")
    for pair in pairs:
        if not math.isfinite(pair.chosen_reward) or not math.isfinite(pair.rejected_reward):
            raise TrainingError("the reward is not finite", where=pair.id, fix="lower reward.learning_rate")
    margins = [pair.chosen_reward - pair.rejected_reward for pair in pairs]
    probabilities = [_sigmoid(margin) for margin in margins]
    return {
        "num_pairs": len(pairs),
        "accuracy": _accuracy(pairs),
        "by_source": {
            source: _accuracy([pair for pair in pairs if pair.source == source])
            for source in sorted({pair.source for pair in pairs})
        },
        "loss": fmean(-_log_sigmoid(margin) for margin in margins),
        "calibration_error": calibration_error(probabilities, num_bins).to_dict(),
        "reliability": reliability_table(probabilities, num_bins),
        "length_bias": _length_bias(pairs, margins),
    }


def reward_scale(pairs: Sequence[ScoredPair]) -> tuple[float, float]:
    """Mean and standard deviation of the rewards of all sides; the deviation is at least 1e-6."""
    rewards = [reward for pair in pairs for reward in (pair.chosen_reward, pair.rejected_reward)]
    return fmean(rewards), max(stdev(rewards), 1e-6)


def reliability_table(probabilities: Sequence[float], num_bins: int = 10) -> list[dict[str, Any]]:
    """Confidence against accuracy, in bins of equal width over [1/2, 1]; empty bins are left out.

    A pair's confidence is the probability of the side that the model prefers, and it is right where that is the
    chosen one. Each row has the bin's bounds, its pairs, their mean confidence, and their accuracy with its interval.
    """
    bins: dict[int, list[float]] = {}
    for p in probabilities:
        bins.setdefault(_bin(p, num_bins), []).append(p)
    rows = []
    for index, members in sorted(bins.items()):
        right = wilson(sum(p > 0.5 for p in members), len(members))
        rows.append(
            {
                "low": 0.5 + index / (2 * num_bins),
                "high": 0.5 + (index + 1) / (2 * num_bins),
                "num_pairs": len(members),
                "confidence": fmean(max(p, 1 - p) for p in members),
                "accuracy": right.to_dict(),
            }
        )
    return rows


def calibration_error(probabilities: Sequence[float], num_bins: int = 10) -> Estimate:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3), with a percentile bootstrap.

    The estimate is biased upwards in small samples, and so are its resamples: the interval says how far it scatters.

    Args:
        probabilities: of the chosen side winning, by the model.
    """
    generator = random.Random(0)
    drawn = sorted(_ece(generator.choices(probabilities, k=len(probabilities)), num_bins) for _ in range(_DRAWS))
    tail = (1 - CONFIDENCE) / 2
    low, high = drawn[math.ceil(tail * _DRAWS) - 1], drawn[math.ceil((1 - tail) * _DRAWS) - 1]
    return Estimate(_ece(probabilities, num_bins), low, high, len(probabilities), f"bootstrap, {_DRAWS} draws")


def _ece(probabilities: Sequence[float], num_bins: int) -> float:
    gaps = [0.0] * num_bins
    for p in probabilities:
        gaps[_bin(p, num_bins)] += (p > 0.5) - max(p, 1 - p)
    return sum(map(abs, gaps)) / len(probabilities)


def _bin(p: float, num_bins: int) -> int:
    return min(int((max(p, 1 - p) - 0.5) * 2 * num_bins), num_bins - 1)


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Pearson's r; None where a side does not vary."""
    if len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    return statistics.correlation(xs, ys)


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Spearman's rho, ties at their mean rank; None where a side does not vary."""
    return correlation(_ranks(xs), _ranks(ys))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            ranks[i] = (start + end - 1) / 2
        start = end
    return ranks


def _accuracy(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """Share of pairs with the chosen side ahead; a tie is not."""
    return accuracy([pair.chosen_reward > pair.rejected_reward for pair in pairs]).to_dict()


def _length_bias(pairs: Sequence[ScoredPair], margins: Sequence[float]) -> dict[str, Any]:
    lengths = [float(n) for pair in pairs for n in (pair.chosen_tokens, pair.rejected_tokens)]
    rewards = [r for pair in pairs for r in (pair.chosen_reward, pair.rejected_reward)]
    differences = [float(pair.chosen_tokens - pair.rejected_tokens) for pair in pairs]
    kinds: dict[str, list[ScoredPair]] = {"chosen_longer": [], "chosen_shorter": [], "matched": []}
    for pair, difference in zip(pairs, differences, strict=True):
        matched = abs(difference) <= MATCHED * max(pair.chosen_tokens, pair.rejected_tokens)
        kinds["matched" if matched else "chosen_longer" if difference > 0 else "chosen_shorter"].append(pair)
    decided = [difference > 0 for difference in differences if difference]
    return {
        "reward_length_correlation": correlation(rewards, lengths),
        "reward_length_rank_correlation": rank_correlation(rewards, lengths),
        "margin_length_correlation": correlation(list(margins), differences),
        "longer_is_better": accuracy(decided).to_dict() if decided else None,
        "accuracy": {kind: _accuracy(own) if own else None for kind, own in kinds.items()},
    }


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))
