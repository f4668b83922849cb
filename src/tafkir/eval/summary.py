"""From graded answers to scores and differences, over all problems and per source; plain dicts for `result.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from tafkir.errors import DataError
from tafkir.eval.metrics import PairedDifference, accuracy, avg_at_k, bootstrap_interval, paired_difference, pass_at_k
from tafkir.eval.records import GREEDY, EvalRecord

__all__ = ["ALL", "METRICS", "Metric", "difference_table", "problem_scores", "score_table", "sources_of"]

ALL = "all"
"""Name of the row over all sources together."""

Metric = Literal["average", "greedy"]
METRICS: tuple[Metric, ...] = ("average", "greedy")
Scores = Mapping[str, Sequence[float]]


def sources_of(records: Iterable[EvalRecord]) -> dict[str, int]:
    """Problems per source, in the order in which the sources appear."""
    problems: dict[str, set[str]] = {}
    for record in records:
        problems.setdefault(record.source, set()).add(record.example_id)
    return {source: len(ids) for source, ids in problems.items()}


def problem_scores(records: Iterable[EvalRecord], metric: Metric, source: str = ALL) -> dict[str, list[float]]:
    """Problem id -> 0/1 scores: of the sampled answers for `average`, of the one greedy answer for `greedy`."""
    scores: dict[str, list[float]] = {}
    for record in records:
        if source in (ALL, record.source) and (record.repeat == GREEDY) == (metric == "greedy"):
            scores.setdefault(record.example_id, []).append(float(record.correct))
    return scores


def score_table(records: Sequence[EvalRecord]) -> dict[str, dict[str, Any]]:
    """Scores over all problems and per source.

    Returns:
        source -> `average` (avg@k), `bootstrap` (the same, resampled, as a check), `greedy`, `pass_at` (k -> pass@k
        for powers of two), `outcomes` (counts, greedy and sampled) and `mean_tokens`.
    """
    return {source: _score(records, source) for source in (ALL, *sources_of(records))}


def _score(records: Sequence[EvalRecord], source: str) -> dict[str, Any]:
    own = [record for record in records if source in (ALL, record.source)]
    sampled = problem_scores(own, "average")
    greedy = problem_scores(own, "greedy")
    samples = min((len(scores) for scores in sampled.values()), default=0)
    table: dict[str, Any] = {}
    if sampled:
        table["average"] = avg_at_k(list(sampled.values())).to_dict()
        table["bootstrap"] = bootstrap_interval([fmean(scores) for scores in sampled.values()]).to_dict()
        outcomes = [[score > 0 for score in scores] for scores in sampled.values()]
        table["pass_at"] = {str(k): pass_at_k(outcomes, k) for k in _powers_of_two(samples)}
    if greedy:
        table["greedy"] = accuracy([scores[0] > 0 for scores in greedy.values()]).to_dict()
    table["outcomes"] = {
        "greedy": dict(Counter(r.outcome for r in own if r.repeat == GREEDY).most_common()),
        "sampled": dict(Counter(r.outcome for r in own if r.repeat != GREEDY).most_common()),
    }
    table["mean_tokens"] = fmean(r.tokens for r in own)
    return table


def _powers_of_two(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]


def difference_table(
    before: Sequence[EvalRecord], after: Sequence[EvalRecord], names: tuple[str, str]
) -> list[dict[str, Any]]:
    """Paired differences between two sets of answers to the same problems, per source and metric.

    A metric that one side lacks (a baseline has no sampled answers) is left out.

    Args:
        names: what to call the two sides.

    Raises:
        DataError: the two sides answered different problems.
    """
    rows = []
    for metric in METRICS:
        for source in (ALL, *sources_of(after)):
            sides = problem_scores(before, metric, source), problem_scores(after, metric, source)
            if all(sides):
                rows.append({**_labels(names, source, metric), **_difference(*sides, names).to_dict()})
    return rows


def _labels(names: tuple[str, str], source: str, metric: str) -> dict[str, str]:
    return {"before": names[0], "after": names[1], "source": source, "metric": metric}


def _difference(before: Scores, after: Scores, names: tuple[str, str]) -> PairedDifference:
    try:
        return paired_difference(before, after)
    except DataError as error:
        raise DataError(
            error.what, where=f"{names[0]} against {names[1]}: {error.where}", expected=error.expected, fix=error.fix
        ) from error
