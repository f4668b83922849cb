"""What may be claimed of two models: a verdict against a margin, what could have been seen, and many tests at once.

Built on `tafkir.eval.metrics`: the unit of uncertainty is the question, with all of its samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, variance
from typing import Any, Literal

import numpy as np

from tafkir.errors import DataError
from tafkir.eval.metrics import PairedDifference, avg_at_k, paired_difference, paired_ratio
from tafkir.intervals import CONFIDENCE, Estimate, student_t_quantile

__all__ = [
    "MARGIN",
    "Judgement",
    "MacroAverage",
    "Noise",
    "Verdict",
    "holm",
    "judge",
    "macro_average",
    "majority_at_k",
    "noise_of",
    "paired_bootstrap",
    "samples_needed",
    "standard_error",
]

MARGIN = 0.01
"""Differences within one point are taken for equal where no other margin is asked for."""

Verdict = Literal["better", "worse", "equivalent", "undecided"]
Scores = Mapping[str, Sequence[float]]

_POWER = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
_MAX_SAMPLES = 4096
_DRAWS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Judgement:
    """How a model stands beside another one on the same questions.

    Attributes:
        verdict: `equivalent` where two one-sided tests at 5 % put the difference within the margin (TOST, Schuirmann
            1987: the 90 % interval lies in it), also where a tiny difference is certain; else `better` or `worse`
            where the 95 % interval leaves zero; else `undecided`.
        non_inferior: whether the one test against the lower margin is passed; "lossless" needs it.
        difference: paired, clustered by question, with the difference that could have been seen.
        bootstrap: the same difference with the percentile bootstrap over questions, as a check.
        retention: share of the first score that the second keeps, with Fieller's interval; None where it is zero.
        retention_bootstrap: the same share, resampled.
        p_holm: the difference's p-value corrected by Holm, where several comparisons were made.
    """

    verdict: Verdict
    non_inferior: bool
    margin: float
    difference: PairedDifference
    bootstrap: Estimate
    retention: Estimate | None
    retention_bootstrap: Estimate | None
    p_holm: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class MacroAverage:
    """Mean over tasks with equal weights, the standard error of that mean, and its interval."""

    value: float
    standard_error: float
    low: float
    high: float
    num_tasks: int


@dataclass(frozen=True, slots=True)
class Noise:
    """Variance of one question's paired difference: what is `between` questions, and `within` one sample of each."""

    between: float
    within: float
    num_problems: int

    def detectable(self, samples: int, num_problems: int | None = None) -> float:
        """The difference seen with 80 % power at 5 % by so many samples a question."""
        return _POWER * math.sqrt((self.between + self.within / samples) / (num_problems or self.num_problems))


def standard_error(samples: Sequence[Sequence[float]]) -> float:
    """Of the mean over questions, clustered by question (Miller 2024, arXiv 2411.00640); 0 for a single one."""
    means = [fmean(scores) for scores in samples]
    return math.sqrt(variance(means) / len(means)) if len(means) > 1 else 0.0


def majority_at_k(problems: Sequence[Sequence[tuple[str | None, float]]], confidence: float = CONFIDENCE) -> Estimate:
    """maj@k: the score of each question's most frequent answer, the mean of the tied ones where several are.

    Args:
        problems: for each question, (extracted answer, score) of its samples. Full scores are one answer however they
            are written, and a sample without an answer votes for nothing; where none has one the score is 0.
    """
    values = []
    for samples in problems:
        votes = Counter(_ballot(answer, score) for answer, score in samples if answer is not None or score >= 1)
        most = max(votes.values(), default=0)
        leaders = {ballot for ballot, count in votes.items() if count == most}
        kept = [[s for a, s in samples if _ballot(a, s) == leader] for leader in leaders]
        values.append([fmean(fmean(scores) for scores in kept) if kept else 0.0])
    return avg_at_k(values, confidence)


def _ballot(answer: str | None, score: float) -> tuple[bool, str | None]:
    return (True, None) if score >= 1 else (False, answer)


def macro_average(tasks: Sequence[Sequence[float]], confidence: float = CONFIDENCE) -> MacroAverage:
    """Mean of the tasks' means: of scores, or of paired differences. The tasks are fixed, their questions are drawn.

    Welch's degrees of freedom (Satterthwaite 1946) give the width.

    Args:
        tasks: for each task one value a question.
    """
    if not tasks or any(len(values) < 2 for values in tasks):
        raise DataError("a task with fewer than two questions has no error", expected="two questions of every task")
    parts = [variance(values) / len(values) for values in tasks]
    total = sum(parts)
    mean, error = fmean(fmean(values) for values in tasks), math.sqrt(total) / len(tasks)
    spread = sum(part**2 / (len(values) - 1) for part, values in zip(parts, tasks, strict=True))
    half = student_t_quantile(0.5 + confidence / 2, total**2 / spread) * error if spread else 0.0
    return MacroAverage(mean, error, mean - half, mean + half, len(tasks))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for being several (Holm 1979), in the same order."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def paired_bootstrap(
    before: Scores, after: Scores, *, draws: int = 10_000, seed: int = 0, confidence: float = CONFIDENCE
) -> tuple[Estimate, Estimate | None]:
    """Percentile intervals of the mean difference and of the ratio of means: questions drawn with all of their samples.

    The ratio is None where every score of `before` is 0; draws without one are left out of its interval.
    """
    ids = list(before)
    first, second = (np.array([fmean(side[i]) for i in ids]) for side in (before, after))
    size, generator = len(ids), np.random.default_rng(seed)
    sums: list[Any] = []
    for start in range(0, draws, max(1, _DRAWS_AT_ONCE // size)):
        count = min(draws - start, max(1, _DRAWS_AT_ONCE // size))
        taken = generator.integers(0, size, (count, size))
        sums.append(np.stack([first[taken].mean(axis=1), second[taken].mean(axis=1)]))
    a, b = np.concatenate(sums, axis=1)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    method = f"paired bootstrap over questions, {draws} draws"

    def estimate(value: float, values: Any) -> Estimate:
        low, high = (float(end) for end in np.quantile(values, tails))
        return Estimate(value, low, high, size, method)

    difference = estimate(float(second.mean() - first.mean()), b - a)
    if first.mean() <= 0:
        return difference, None
    known = a > 0
    return difference, estimate(float(second.mean() / first.mean()), b[known] / a[known])


def judge(before: Scores, after: Scores, *, margin: float = MARGIN, draws: int = 10_000) -> Judgement:
    """Compare two models on the same questions; see `Judgement`.

    Args:
        before, after: question -> scores of its samples.
        margin: the largest difference that counts as none, as a share (0.01 is one point).

    Raises:
        DataError: the two sides answered different questions, or the margin is not above zero.
    """
    if not 0 < margin < 1:
        raise DataError(f"a margin of {margin:g} shows nothing", expected="between 0 and 1, such as 0.01 for a point")
    difference = paired_difference(before, after)
    # Two one-sided tests at 5 % pass exactly where the 90 % interval lies within the margin.
    narrow = paired_difference(before, after, confidence=1 - 2 * (1 - CONFIDENCE))
    non_inferior = narrow.low > -margin
    resampled, share = paired_bootstrap(before, after, draws=draws)
    return Judgement(
        verdict=_verdict(difference, equivalent=non_inferior and narrow.high < margin),
        non_inferior=non_inferior,
        margin=margin,
        difference=difference,
        bootstrap=resampled,
        retention=paired_ratio(before, after),
        retention_bootstrap=share,
    )


def _verdict(difference: PairedDifference, *, equivalent: bool) -> Verdict:
    if equivalent:
        return "equivalent"
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "undecided"


def noise_of(before: Scores, after: Scores | None = None) -> Noise:
    """The noise of a paired difference, from answers that are there.

    One model alone stands for two of its kind that are equally able. A single sample a question cannot tell what is
    between questions from what is within them: all of it is then taken for the latter, the best case for sampling more.
    """
    sides = [before, before if after is None else after]
    differences = [fmean(sides[1][i]) - fmean(sides[0][i]) for i in before]
    total = variance(differences) if len(differences) > 1 else 0.0
    if any(len(scores) < 2 for side in sides for scores in side.values()):
        share = fmean(fmean(scores) for scores in before.values())
        return Noise(0.0, 2 * share * (1 - share) if after is None else total, len(before))
    within = sum(fmean(variance(scores) for scores in side.values()) for side in sides)
    if after is None:
        return Noise(0.0, within, len(before))
    sampled = sum(fmean(variance(scores) / len(scores) for scores in side.values()) for side in sides)
    return Noise(max(0.0, total - sampled), within, len(before))


def samples_needed(noise: Noise, effect: float) -> int | None:
    """The fewest samples a question that show `effect` with 80 % power; None where no number of them does."""
    room = noise.num_problems * (effect / _POWER) ** 2 - noise.between
    if room <= 0:
        return None
    needed = max(1, math.ceil(noise.within / room - 1e-9))
    return needed if needed <= _MAX_SAMPLES else None
