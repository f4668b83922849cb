"""From samples to scores: what an answer is worth, item by item, by every metric, and the estimate of a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from tafkir.eval.metrics import Estimate, accuracy, avg_at_k, pass_at_k
from tafkir.eval.samples import Sample
from tafkir.eval.statistics import majority_at_k
from tafkir.tasks.ratings import percentile, rating_difference, solved_rating

__all__ = [
    "codeforces_difference",
    "codeforces_rating",
    "estimate_of",
    "item_scores",
    "majority_scores",
    "metric_scores",
    "pass_scores",
    "score_of",
]

_RATED = "codeforces"
_Z = 1.959964


def score_of(sample: Sample) -> float:
    """The reward of an answer that is better or worse ("graded"), and else whether it is right."""
    return sample.reward if sample.outcome == "graded" else float(sample.correct)


def item_scores(samples: Iterable[Sample]) -> dict[str, list[float]]:
    """Item -> scores of its samples; failures say nothing and are left out."""
    scores: dict[str, list[float]] = {}
    for sample in samples:
        if not sample.failed:
            scores.setdefault(sample.item, []).append(score_of(sample))
    return scores


def pass_scores(samples: Iterable[Sample], tries: int) -> dict[str, list[float]]:
    """Item -> the chance that one of so many of its answers is right (unbiased; of fewer answers, any of them)."""
    return {
        item: [pass_at_k([[score > 0 for score in own]], min(tries, len(own)))]
        for item, own in item_scores(samples).items()
    }


def majority_scores(samples: Iterable[Sample]) -> dict[str, list[float]]:
    """Item -> the score of its most frequent answer, the mean of tied ones (maj@k)."""
    votes: dict[str, list[tuple[str | None, float]]] = {}
    for sample in samples:
        if not sample.failed:
            votes.setdefault(sample.item, []).append((sample.extracted, score_of(sample)))
    return {item: [majority_at_k([own]).value] for item, own in votes.items()}


def metric_scores(samples: Iterable[Sample], metric: str) -> dict[str, list[float]]:
    """Item -> scores by the metric on a task's card; of pass@k with k above 1 there is one."""
    tries = int(metric.removeprefix("pass@")) if metric.startswith("pass@") else 1
    return item_scores(samples) if tries == 1 else pass_scores(samples, tries)


def _rated(samples: Iterable[Sample]) -> dict[str, tuple[float, float]]:
    """Problem -> its rating, and the share of tries that solved it; problems without a rating are left out."""
    known = [sample for sample in samples if sample.source == _RATED and sample.difficulty and not sample.failed]
    try:
        ratings = {sample.item: float(sample.difficulty) for sample in known}
    except ValueError:
        return {}
    return {item: (ratings[item], fmean(own)) for item, own in item_scores(known).items()}


def codeforces_rating(samples: Iterable[Sample]) -> dict[str, Any] | None:
    """The rating of who solves these problems as often; None for anything but Codeforces' problems with ratings.

    Returns:
        `value`, `low`, `high` (95 %), `num_problems`, and `percentile` among the users of 2024.
    """
    rated = _rated(samples)
    if not rated:
        return None
    value, error = solved_rating(list(rated.values()))
    ends = {"low": value - _Z * error, "high": value + _Z * error}
    return {"value": value, **ends, "num_problems": len(rated), "percentile": percentile(value)}


def codeforces_difference(first: Iterable[Sample], second: Iterable[Sample]) -> dict[str, Any] | None:
    """How much higher the second's rating is, on the problems that both tried: `value`, `low`, `high`."""
    sides = _rated(first), _rated(second)
    both = sorted(sides[0].keys() & sides[1].keys())
    if not both:
        return None
    value, error = rating_difference(*([side[item] for item in both] for side in sides))
    return {"value": value, "low": value - _Z * error, "high": value + _Z * error}


def estimate_of(scores: Mapping[str, Sequence[float]]) -> Estimate:
    """Wilson's interval of one yes or no an item, and else Student's t clustered by item."""
    if all(len(own) == 1 and own[0] in (0, 1) for own in scores.values()):
        return accuracy([own[0] > 0 for own in scores.values()])
    return avg_at_k(list(scores.values()))
