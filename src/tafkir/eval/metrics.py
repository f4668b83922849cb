"""What a score is worth: accuracy, avg@k, pass@k and paired differences, each with its interval.

Pure functions over plain lists, without torch or numpy. The unit of uncertainty is the problem: k samples of one
problem are one cluster, never k independent draws (Miller 2024, arXiv 2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

from tafkir.errors import DataError
from tafkir.intervals import (
    CONFIDENCE,
    Estimate,
    accuracy,
    bootstrap_interval,
    mean_interval,
    student_t_cdf,
    student_t_quantile,
    wilson,
)

__all__ = [
    "Estimate",
    "PairedDifference",
    "PooledDifference",
    "accuracy",
    "avg_at_k",
    "bootstrap_interval",
    "mcnemar_exact",
    "mean_interval",
    "paired_difference",
    "paired_ratio",
    "pass_at_k",
    "pooled_difference",
    "student_t_cdf",
    "student_t_quantile",
]


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How far B stands above A on the same problems.

    `wins` and `losses` count the problems whose mean rose or fell. `p_value` is McNemar's exact one where every
    problem has a single yes or no on each side (or all differences are equal), and the paired t-test's otherwise.
    `min_detectable` is the difference that this many problems would have shown with 80 % power.
    """

    value: float
    low: float
    high: float
    num_problems: int
    wins: int
    losses: int
    p_value: float
    min_detectable: float
    method: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PooledDifference:
    """A paired difference over several runs (seeds) of the same comparison.

    `pooled` averages each problem's difference over the runs and takes problems as clusters: it says what these
    runs did on problems like these. `across_runs` takes each run's mean difference as one observation: it says
    what a fresh seed would do, and is None for a single run.
    """

    pooled: PairedDifference
    by_run: tuple[float, ...]
    across_runs: Estimate | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "pooled": self.pooled.to_dict(),
            "by_run": list(self.by_run),
            "across_runs": self.across_runs.to_dict() if self.across_runs else None,
        }


def avg_at_k(samples: Sequence[Sequence[float]], confidence: float = CONFIDENCE) -> Estimate:
    """Mean over problems of the mean over that problem's samples, with an interval clustered by problem.

    Student's t on the problem means, cut to [0, 1]. Where all problem means agree the t interval has no width,
    so Wilson's with one trial a problem stands in (`method` says which).

    Args:
        samples: per problem, the 0/1 (or fractional) scores of its samples.
    """
    if not samples or any(len(scores) == 0 for scores in samples):
        raise DataError("a problem without samples cannot be averaged", expected="at least one sample per problem")
    means = [fmean(scores) for scores in samples]
    if len(means) == 1 or min(means) == max(means):
        return _wilson_of_mean(means, confidence)
    estimate = mean_interval(means, confidence)
    low, high = max(0.0, estimate.low), min(1.0, estimate.high)
    return Estimate(estimate.value, low, high, len(means), "t, clustered by problem")


def _wilson_of_mean(means: Sequence[float], confidence: float) -> Estimate:
    # With one distinct mean the nearest whole counts bracket it; the wider side of each is kept.
    total, mean = len(means), fmean(means)
    below = wilson(math.floor(mean * total + 1e-9), total, confidence)
    above = wilson(math.ceil(mean * total - 1e-9), total, confidence)
    return Estimate(mean, below.low, above.high, total, "wilson on problems")


def pass_at_k(samples: Sequence[Sequence[bool]], k: int) -> float:
    """Unbiased pass@k: mean over problems of 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374)."""
    if not samples:
        raise DataError("there is no problem to score", expected="at least one problem")
    shortest = min(len(scores) for scores in samples)
    if not 1 <= k <= shortest:
        raise DataError(f"pass@{k} needs {k} samples of every problem", expected=f"1 <= k <= {shortest}")
    return fmean(_pass_probability(len(scores), sum(map(bool, scores)), k) for scores in samples)


def _pass_probability(num_samples: int, num_correct: int, k: int) -> float:
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided exact McNemar p-value: the binomial test of `wins` among the discordant problems against 1/2."""
    discordant = wins + losses
    if discordant == 0:
        return 1.0
    tail = sum(math.comb(discordant, i) for i in range(min(wins, losses) + 1))
    # Integers first: the tail and 2^n are exact, and their quotient stays finite for any n.
    return min(1.0, 2 * tail / (1 << discordant))


def paired_difference(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], confidence: float = CONFIDENCE
) -> PairedDifference:
    """Mean over problems of (mean of `after`) - (mean of `before`), with a paired t interval.

    Args:
        before, after: problem id -> scores of its samples; both hold the same problems.
    """
    ids = _same_problems(before, after)
    differences = [fmean(after[i]) - fmean(before[i]) for i in ids]
    single = all(len(side[i]) == 1 and side[i][0] in (0, 1) for side in (before, after) for i in ids)
    return _summarise_differences(differences, single, confidence)


def _same_problems(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    unmatched = sorted(before.keys() ^ after.keys())
    if unmatched:
        raise DataError(
            f"{len(unmatched)} problems were answered on one side only",
            where=unmatched[0],
            expected="the same problems on both sides",
            fix="evaluate both with the same data, split and max_problems",
        )
    if not before:
        raise DataError("there is no problem to compare", expected="at least one problem on both sides")
    return sorted(before)


def _summarise_differences(differences: Sequence[float], single: bool, confidence: float) -> PairedDifference:
    # Differences of fractions like 1/3 carry rounding dust that must not count as a win.
    wins = sum(d > 1e-12 for d in differences)
    losses = sum(d < -1e-12 for d in differences)
    size, mean = len(differences), fmean(differences)
    spread = stdev(differences) if size > 1 else 0.0
    error = spread / math.sqrt(size)
    if error > 0:
        half = student_t_quantile(0.5 + confidence / 2, size - 1) * error
        low, high, method = mean - half, mean + half, "paired t, clustered by problem"
    else:
        low, high, method = _flat_bounds(mean, size, confidence)
    normal = NormalDist()
    detectable = (normal.inv_cdf(0.975) + normal.inv_cdf(0.8)) * error if error > 0 else high - mean
    # Where every difference is the same the t statistic is undefined, and the sign test (which McNemar's is) holds.
    exact = single or error == 0
    p_value = mcnemar_exact(wins, losses) if exact else 2 * student_t_cdf(-abs(mean / error), size - 1)
    return PairedDifference(mean, max(-1.0, low), min(1.0, high), size, wins, losses, p_value, detectable, method)


def paired_ratio(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], confidence: float = CONFIDENCE
) -> Estimate | None:
    """What is left of a mean: (mean of `after`) / (mean of `before`) on the same problems, with Fieller's interval.

    The interval holds every ratio r at which a paired t-test would not refuse mean(after - r before) = 0 (Fieller
    1954); problems are the clusters. Where `before` itself is not surely above zero it has no upper end (infinity).

    Args:
        before, after: problem id -> scores of its samples, none negative; both hold the same problems.

    Returns:
        None where every score of `before` is zero: there is nothing to keep.
    """
    ids = _same_problems(before, after)
    first, second = ([fmean(side[i]) for i in ids] for side in (before, after))
    size, mean, other = len(ids), fmean(first), fmean(second)
    if mean <= 0:
        return None
    ratio = other / mean
    differences = [b - a for a, b in zip(first, second, strict=True)]
    if max(differences) - min(differences) < 1e-12:
        low, high, method = _flat_bounds(other - mean, size, confidence)
        return Estimate(ratio, max(0.0, 1 + low / mean), 1 + high / mean, size, method)
    square = student_t_quantile(0.5 + confidence / 2, size - 1) ** 2 / size
    a = mean**2 - square * _covariance(first, first)
    b = mean * other - square * _covariance(first, second)
    c = other**2 - square * _covariance(second, second)
    if a <= 0:
        return Estimate(ratio, 0.0, math.inf, size, "Fieller, paired; the mean before may be zero")
    half = math.sqrt(max(0.0, b * b - a * c))
    return Estimate(ratio, max(0.0, (b - half) / a), (b + half) / a, size, "Fieller, paired, clustered by problem")


def _covariance(x: Sequence[float], y: Sequence[float]) -> float:
    mean_x, mean_y = fmean(x), fmean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / (len(x) - 1)


def _flat_bounds(mean: float, size: int, confidence: float) -> tuple[float, float, str]:
    # No problem differs from another: the share of problems that could still move is bounded by Wilson's zero.
    reach = wilson(0, size, confidence).high
    return mean - reach, mean + reach, "wilson bound, all differences equal"


def pooled_difference(
    pairs: Sequence[tuple[Mapping[str, Sequence[float]], Mapping[str, Sequence[float]]]],
    confidence: float = CONFIDENCE,
) -> PooledDifference:
    """One paired difference over several runs of the same comparison, problems as clusters.

    Args:
        pairs: per run, its (before, after) as in `paired_difference`; every run holds the same problems.
    """
    if not pairs:
        raise DataError("there is no run to pool", expected="at least one run")
    ids = _same_problems(*pairs[0])
    for before, after in pairs[1:]:
        _same_problems(pairs[0][0], before)
        _same_problems(before, after)
    table = [[fmean(after[i]) - fmean(before[i]) for i in ids] for before, after in pairs]
    by_run = tuple(fmean(row) for row in table)
    per_problem = [fmean(column) for column in zip(*table, strict=True)]
    single = len(pairs) == 1 and all(len(side[i]) == 1 for side in pairs[0] for i in ids)
    pooled = _summarise_differences(per_problem, single, confidence)
    across = mean_interval(by_run, confidence) if len(by_run) > 1 else None
    return PooledDifference(pooled, by_run, across)
