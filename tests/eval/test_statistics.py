"""Verdicts, bootstrap, majority votes, averages over tasks and planning, against printed values and simulation."""

from __future__ import annotations

import itertools
import math
import random
from statistics import NormalDist, fmean, stdev

import pytest

from tafkir.errors import DataError
from tafkir.eval.metrics import paired_difference, paired_ratio
from tafkir.eval.statistics import (
    Noise,
    holm,
    judge,
    macro_average,
    majority_at_k,
    noise_of,
    paired_bootstrap,
    samples_needed,
    standard_error,
)


def _scores(rows: list[list[float]]) -> dict[str, list[float]]:
    return {f"q{i}": row for i, row in enumerate(rows)}


def test_clustered_error_is_that_of_statsmodels() -> None:
    """OLS(y, ones).fit(cov_type="cluster", cov_kwds={"groups": question}).bse of statsmodels 0.14."""
    samples = [[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1]]
    assert standard_error(samples) == pytest.approx(0.150231303144333, rel=1e-9)
    assert standard_error([[1, 0]]) == 0


def test_majority_votes_average_ties() -> None:
    clear = [("7", 1.0), ("7", 1.0), ("5", 0.0)]
    tied = [("7", 1.0), ("5", 0.0), (None, 0.0)]
    written_apart = [("1/2", 1.0), ("0.5", 1.0), ("3", 0.0), ("3", 0.0), ("0.50", 1.0)]
    silent: list[tuple[str | None, float]] = [(None, 0.0), (None, 0.0)]
    assert majority_at_k([clear]).value == 1
    assert majority_at_k([tied]).value == 0.5
    assert majority_at_k([written_apart]).value == 1
    assert majority_at_k([silent]).value == 0
    assert majority_at_k([clear, tied, written_apart, silent]).value == pytest.approx(2.5 / 4)


def test_holm_matches_statsmodels_and_its_definition() -> None:
    # multipletests([...], method="holm") of statsmodels 0.14.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    generator = random.Random(3)
    p = [generator.random() ** 3 for _ in range(6)]
    found = holm(p)
    for i, j in itertools.permutations(range(6), 2):
        assert found[i] >= p[i] and (p[i] > p[j] or found[i] <= found[j])
    assert holm([]) == []


def test_macro_average_is_welch() -> None:
    a, b = [0.0, 1.0, 1.0, 1.0, 0.0, 1.0], [0.2, 0.4, 0.1, 0.9]
    found = macro_average([a, b])
    # scipy.stats.ttest_ind(a, [-x for x in b], equal_var=False).confidence_interval(), halved.
    assert found.value == pytest.approx((fmean(a) + fmean(b)) / 2)
    assert (found.low, found.high) == pytest.approx((0.2148416406, 0.8518250260))
    with pytest.raises(DataError, match="two questions"):
        macro_average([a, [1.0]])


def test_bootstrap_agrees_with_all_resamples() -> None:
    """Three questions have 27 equally likely resamples: the drawn quantiles are theirs."""
    before, after = _scores([[1, 0], [1, 1], [0, 1]]), _scores([[1, 1], [1, 0], [1, 1]])
    difference, ratio = paired_bootstrap(before, after, draws=40_000)
    a, b = [0.5, 1.0, 0.5], [1.0, 0.5, 1.0]
    resamples = list(itertools.product(range(3), repeat=3))
    exact = sorted(fmean(b[i] - a[i] for i in taken) for taken in resamples)
    # 1 of 27 is more than 2.5 %, so both ends are the extremes.
    assert (difference.low, difference.high) == pytest.approx((exact[0], exact[-1]))
    assert ratio is not None and ratio.value == pytest.approx(2.5 / 2)
    assert ratio.low == pytest.approx(min(sum(b[i] for i in t) / sum(a[i] for i in t) for t in resamples))
    assert paired_bootstrap(_scores([[0], [0]]), _scores([[1], [0]]))[1] is None


def _draw(generator: random.Random, size: int, samples: int, shift: float) -> tuple[dict[str, list[float]], ...]:
    """Two models on questions of all difficulties; the second is right more often by `shift` on each."""
    chances = [0.1 + 0.8 * generator.random() for _ in range(size)]
    return tuple(
        _scores([[float(generator.random() < chance + move) for _ in range(samples)] for chance in chances])
        for move in (0.0, shift)
    )


def test_bootstrap_agrees_with_t_and_fieller_on_many_questions() -> None:
    before, after = _draw(random.Random(1), 400, 4, 0.05)
    difference, ratio = paired_bootstrap(before, after)
    closed, share = paired_difference(before, after), paired_ratio(before, after)
    assert share is not None and ratio is not None
    width = closed.high - closed.low
    assert difference.low == pytest.approx(closed.low, abs=0.05 * width)
    assert difference.high == pytest.approx(closed.high, abs=0.05 * width)
    assert (ratio.low, ratio.high) == pytest.approx((share.low, share.high), abs=0.05 * (share.high - share.low))


def test_verdicts() -> None:
    same = _scores([[1.0]] * 180 + [[0.0]] * 20)
    assert judge(same, same, margin=0.02).verdict == "equivalent"
    few = _scores([[1.0]] * 9 + [[0.0]])
    undecided = judge(few, few, margin=0.02)
    assert undecided.verdict == "undecided" and not undecided.non_inferior
    worse = _scores([[1.0]] * 150 + [[0.0]] * 50)
    found = judge(same, worse, margin=0.02)
    assert found.verdict == "worse" and found.retention is not None
    assert found.retention.value == pytest.approx(150 / 180) and not found.non_inferior
    better = judge(worse, same, margin=0.02)
    assert better.verdict == "better" and better.non_inferior
    # A sure but tiny difference within the margin counts as none.
    tiny = _scores([[0.5, 0.5]] * 200), _scores([[0.505, 0.505]] * 199 + [[0.5, 0.5]])
    assert judge(*tiny, margin=0.02).verdict == "equivalent"
    with pytest.raises(DataError, match="a margin of 0"):
        judge(same, same, margin=0)


def test_equivalence_is_rarely_claimed_at_the_margin() -> None:
    """TOST errs in at most one of twenty where the difference is as large as the margin."""
    generator = random.Random(5)
    judged = [judge(*_draw(generator, 60, 4, -0.06), margin=0.06, draws=10) for _ in range(150)]
    claims = sum(each.verdict == "equivalent" for each in judged)
    assert claims / 150 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)


def test_noise_is_told_apart_and_plans_samples() -> None:
    """The variance of differences simulated anew with k samples is what the parts say."""
    generator = random.Random(2)
    before, after = _draw(generator, 1000, 6, 0.0)
    noise = noise_of(before, after)
    assert noise.within == pytest.approx(2 * (0.5 * 0.5 - 0.64 / 12), rel=0.05)
    assert noise.between == pytest.approx(0, abs=0.02)
    again = _draw(generator, 2000, 2, 0.0)
    error = stdev(fmean(again[1][i]) - fmean(again[0][i]) for i in again[0]) / math.sqrt(2000)
    power = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
    assert noise.detectable(2, num_problems=2000) == pytest.approx(power * error, rel=0.1)
    assert noise_of(before).within == pytest.approx(noise.within, rel=0.1)
    single = {i: scores[:1] for i, scores in before.items()}
    assert noise_of(single).within == pytest.approx(0.5, rel=0.02)


def test_planning_inverts_what_can_be_seen() -> None:
    noise = Noise(between=0.01, within=0.3, num_problems=60)
    needed = samples_needed(noise, 0.05)
    assert needed is not None and noise.detectable(needed) <= 0.05 < noise.detectable(needed - 1)
    assert samples_needed(noise, 0.5) == 1
    assert samples_needed(noise, 0.02) is None
