"""From samples to scores: what an answer is worth, item by item, and the estimate of a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tafkir.eval.metrics import Estimate, accuracy, avg_at_k
from tafkir.eval.samples import Sample

__all__ = ["estimate_of", "item_scores", "score_of"]


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


def estimate_of(scores: Mapping[str, Sequence[float]]) -> Estimate:
    """Wilson's interval of one yes or no an item, and else Student's t clustered by item."""
    if all(len(own) == 1 and own[0] in (0, 1) for own in scores.values()):
        return accuracy([own[0] > 0 for own in scores.values()])
    return avg_at_k(list(scores.values()))
