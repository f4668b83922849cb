"""What a share or a mean is worth: intervals of independent observations, as pure functions over plain lists."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, stdev
from typing import Any

from tafkir.errors import DataError

__all__ = [
    "CONFIDENCE",
    "Estimate",
    "accuracy",
    "bootstrap_interval",
    "mean_interval",
    "student_t_cdf",
    "student_t_quantile",
    "t_half_width",
    "wilson",
]

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share or mean with its interval. `method` names how the interval was made."""

    value: float
    low: float
    high: float
    num_problems: int
    method: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def accuracy(correct: Sequence[bool], confidence: float = CONFIDENCE) -> Estimate:
    """Share of correct answers with Wilson's score interval (one answer a problem)."""
    if not correct:
        raise DataError("there is no answer to score", expected="at least one problem")
    return wilson(sum(map(bool, correct)), len(correct), confidence)


def wilson(num_correct: int, total: int, confidence: float = CONFIDENCE) -> Estimate:
    """A share with Wilson's score interval."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = num_correct / total
    shrink = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / shrink
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / shrink
    # The closed form misses 0 and 1 by a rounding error when every answer agrees.
    low = 0.0 if num_correct == 0 else max(0.0, centre - half)
    high = 1.0 if num_correct == total else min(1.0, centre + half)
    return Estimate(share, low, high, total, "wilson")


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean of one value a problem with Student's t interval; infinite for a single value."""
    if not values:
        raise DataError("there is no value to average", expected="at least one problem")
    mean = fmean(values)
    if len(values) == 1:
        return Estimate(mean, -math.inf, math.inf, 1, "t")
    half = t_half_width(values, confidence)
    return Estimate(mean, mean - half, mean + half, len(values), "t")


def t_half_width(values: Sequence[float], confidence: float) -> float:
    """Half the width of Student's t interval of a mean; at least two values."""
    return student_t_quantile(0.5 + confidence / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def bootstrap_interval(
    values: Sequence[float], *, draws: int = 2000, seed: int = 0, confidence: float = CONFIDENCE
) -> Estimate:
    """Mean with the percentile bootstrap over problems: the check beside the t interval, without its assumptions."""
    if not values:
        raise DataError("there is no value to resample", expected="at least one problem")
    generator = random.Random(seed)
    size = len(values)
    means = sorted(fmean(generator.choices(values, k=size)) for _ in range(draws))
    tail = (1 - confidence) / 2
    low = means[max(0, math.ceil(tail * draws) - 1)]
    high = means[min(draws - 1, math.ceil((1 - tail) * draws) - 1)]
    return Estimate(fmean(values), low, high, size, f"bootstrap, {draws} draws")


def student_t_cdf(t: float, degrees: float) -> float:
    """P(T <= t) for Student's t with `degrees` degrees of freedom, through the incomplete beta function."""
    if math.isinf(t):
        return 0.0 if t < 0 else 1.0
    tail = 0.5 * _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))
    return tail if t < 0 else 1 - tail


@lru_cache(maxsize=256)
def student_t_quantile(probability: float, degrees: float) -> float:
    """The t with P(T <= t) = `probability`, by bisection on the distribution function (error below 1e-10)."""
    if not 0 < probability < 1 or degrees <= 0:
        raise ValueError(f"no quantile at probability={probability}, degrees={degrees}")
    if probability < 0.5:
        return -student_t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees) < probability:
        low, high = high, high * 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high) or high - low < 1e-12 * high:
            break
        if student_t_cdf(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised I_x(a, b), by the continued fraction of DLMF 8.17.22 evaluated with Lentz's method."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / a * _beta_fraction(a, b, x)


def _beta_fraction(a: float, b: float, x: float) -> float:
    tiny = 1e-300
    c = 1.0
    d = 1.0 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    result = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for coefficient in (even, odd):
            d = 1.0 / _away_from_zero(1 + coefficient * d, tiny)
            c = _away_from_zero(1 + coefficient / c, tiny)
            result *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return result


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
