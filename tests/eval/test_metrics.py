"""The statistics of eval against closed forms, defining equations, enumeration and simulation."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from fractions import Fraction
from statistics import NormalDist, fmean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tafkir.errors import DataError
from tafkir.eval.metrics import (
    accuracy,
    avg_at_k,
    bootstrap_interval,
    mcnemar_exact,
    mean_interval,
    paired_difference,
    pass_at_k,
    pooled_difference,
    student_t_cdf,
    student_t_quantile,
)

Z = NormalDist().inv_cdf(0.975)


# ---- Student's t ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [-3.0, -0.5, 0.0, 0.7, 4.0])
def test_t_cdf_has_its_closed_forms_for_one_two_and_three_degrees(t: float) -> None:
    root = math.sqrt(3)
    assert student_t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-13)
    assert student_t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-13)
    third = 0.5 + (t / root / (1 + t * t / 3) + math.atan(t / root)) / math.pi
    assert student_t_cdf(t, 3) == pytest.approx(third, abs=1e-13)


@pytest.mark.parametrize("degrees", [4, 17, 250])
def test_t_cdf_is_the_integral_of_its_density(degrees: int) -> None:
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    upper, pieces = 1.3, 2000
    points = [upper * i / pieces for i in range(pieces + 1)]
    density = [math.exp(log_scale - (degrees + 1) / 2 * math.log1p(x * x / degrees)) for x in points]
    simpson = density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2])
    assert student_t_cdf(upper, degrees) == pytest.approx(0.5 + simpson * upper / pieces / 3, abs=1e-12)


@pytest.mark.parametrize(
    ("degrees", "published"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (30, 2.0423), (120, 1.9799)]
)
def test_t_quantile_matches_the_printed_table(degrees: int, published: float) -> None:
    assert student_t_quantile(0.975, degrees) == pytest.approx(published, abs=5e-5)
    assert student_t_quantile(0.025, degrees) == pytest.approx(-published, abs=5e-5)


@given(st.floats(0.01, 0.99), st.integers(1, 2000))
@settings(max_examples=60, deadline=None)
def test_t_quantile_inverts_the_cdf(probability: float, degrees: int) -> None:
    assert student_t_cdf(student_t_quantile(probability, degrees), degrees) == pytest.approx(probability, abs=1e-10)


# ---- one score --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_correct", "total"), [(1, 10), (81, 263), (499, 500), (5, 10)])
def test_wilson_bounds_solve_the_score_equation(num_correct: int, total: int) -> None:
    estimate = accuracy([True] * num_correct + [False] * (total - num_correct))
    assert estimate.value == num_correct / total
    for bound in (estimate.low, estimate.high):
        assert abs(estimate.value - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / total), rel=1e-9)
    assert estimate.low < estimate.value < estimate.high


def test_wilson_at_the_ends_is_one_sided() -> None:
    none, every = accuracy([False] * 20), accuracy([True] * 20)
    assert (none.low, none.high) == (0.0, pytest.approx(Z**2 / (20 + Z**2)))
    assert (every.low, every.high) == (pytest.approx(20 / (20 + Z**2)), 1.0)


def test_avg_at_k_has_the_cluster_robust_error() -> None:
    generator = random.Random(1)
    samples = [[float(generator.random() < p) for _ in range(4)] for p in (0.1, 0.5, 0.9, 0.3, 0.7, 0.2)]
    estimate = avg_at_k(samples)
    pooled = fmean(itertools.chain.from_iterable(samples))
    assert estimate.value == pytest.approx(pooled)
    # The sandwich estimator: squared cluster sums of residuals, with the n / (n - 1) correction.
    clusters = [sum(score - pooled for score in scores) for scores in samples]
    error = math.sqrt(sum(c * c for c in clusters) * 6 / 5) / 24
    assert estimate.high - estimate.value == pytest.approx(student_t_quantile(0.975, 5) * error)


def test_repeating_each_sample_does_not_narrow_the_interval() -> None:
    once = avg_at_k([[1.0], [0.0], [0.0], [1.0], [0.0]])
    often = avg_at_k([[1.0] * 9, [0.0] * 9, [0.0] * 9, [1.0] * 9, [0.0] * 9])
    assert (once.low, once.high) == pytest.approx((often.low, often.high))


def test_avg_at_k_keeps_a_width_when_all_problems_agree() -> None:
    estimate = avg_at_k([[0.0, 0.0]] * 40)
    assert (estimate.value, estimate.low) == (0.0, 0.0)
    assert 0.05 < estimate.high < 0.15
    assert "wilson" in estimate.method
    half = avg_at_k([[1.0, 0.0]] * 40)
    assert half.low < 0.36 and half.high > 0.64


def test_avg_at_k_covers_the_truth_nineteen_times_in_twenty() -> None:
    generator = random.Random(7)
    covered = 0
    for _ in range(300):
        chances = [generator.betavariate(0.6, 1.2) for _ in range(80)]
        samples = [[float(generator.random() < p) for _ in range(4)] for p in chances]
        estimate = avg_at_k(samples)
        covered += estimate.low <= 1 / 3 <= estimate.high
    assert 0.92 <= covered / 300 <= 0.98


def test_bootstrap_agrees_with_the_t_interval_and_repeats() -> None:
    generator = random.Random(3)
    values = [generator.choice([0.0, 0.25, 0.5, 1.0]) for _ in range(300)]
    t, boot = mean_interval(values), bootstrap_interval(values, draws=4000)
    width = t.high - t.low
    assert boot.low == pytest.approx(t.low, abs=0.1 * width)
    assert boot.high == pytest.approx(t.high, abs=0.1 * width)
    assert boot == bootstrap_interval(values, draws=4000)
    assert boot != bootstrap_interval(values, draws=4000, seed=1)


def test_mean_interval_of_one_value_knows_nothing() -> None:
    assert mean_interval([0.5]).high == math.inf


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_average_over_all_subsets(k: int) -> None:
    samples = [[True, False, False, False, True], [False] * 5, [True] * 5, [True, False, False, False, False]]
    by_enumeration = fmean(fmean(any(subset) for subset in itertools.combinations(scores, k)) for scores in samples)
    assert pass_at_k(samples, k) == pytest.approx(by_enumeration, abs=1e-12)


def test_pass_at_k_refuses_more_than_was_sampled() -> None:
    with pytest.raises(DataError, match="1 <= k <= 2"):
        pass_at_k([[True, False], [True, True, True]], 3)


# ---- two scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wins", "losses"), [(10, 2), (0, 0), (7, 7), (1, 0), (60, 35), (310, 250)])
def test_mcnemar_is_the_exact_binomial_test(wins: int, losses: int) -> None:
    total = wins + losses
    weights = [Fraction(math.comb(total, i), 2**total) for i in range(total + 1)]
    # Two-sided: every outcome at most as likely as the one seen (the distribution is symmetric).
    exact = sum(w for w in weights if w <= weights[wins])
    assert mcnemar_exact(wins, losses) == pytest.approx(float(exact), rel=1e-12)
    assert mcnemar_exact(losses, wins) == mcnemar_exact(wins, losses)


def test_mcnemar_matches_a_published_value() -> None:
    assert mcnemar_exact(10, 2) == pytest.approx(0.03857, abs=5e-6)


def test_paired_difference_by_hand() -> None:
    before = {"a": [1.0, 0.0], "b": [0.0, 0.0], "c": [1.0, 1.0], "d": [0.0, 1.0]}
    after = {"a": [1.0, 1.0], "b": [0.0, 0.0], "c": [0.0, 1.0], "d": [1.0, 1.0]}
    difference = paired_difference(before, after)
    deltas = [0.5, 0.0, -0.5, 0.5]
    half = 3.182446305 * stdev(deltas) / 2
    assert difference.value == pytest.approx(0.125)
    assert difference.high - difference.value == pytest.approx(half, rel=1e-8)
    assert (difference.wins, difference.losses, difference.num_problems) == (2, 1, 4)
    assert difference.min_detectable == pytest.approx((1.959964 + 0.841621) * stdev(deltas) / 2, rel=1e-5)


def test_the_p_value_crosses_five_percent_where_the_interval_crosses_zero() -> None:
    generator = random.Random(5)
    for shift in (0.0, 0.05, 0.1, 0.2):
        before = {str(i): [generator.random(), generator.random()] for i in range(60)}
        after = {i: [score + shift for score in scores[:1]] + [generator.random()] for i, scores in before.items()}
        difference = paired_difference(before, after)
        assert (difference.p_value < 0.05) == (difference.low > 0 or difference.high < 0)


def test_greedy_answers_get_mcnemars_p_value() -> None:
    before = {str(i): [float(i < 2)] for i in range(20)}
    after = {str(i): [float(2 <= i < 12)] for i in range(20)}
    difference = paired_difference(before, after)
    assert (difference.wins, difference.losses) == (10, 2)
    assert difference.p_value == mcnemar_exact(10, 2)


def test_pairing_beats_two_separate_intervals() -> None:
    generator = random.Random(11)
    hard = {str(i): generator.random() for i in range(200)}
    before = {i: [float(generator.random() < p) for _ in range(4)] for i, p in hard.items()}
    after = {i: [float(generator.random() < min(1, p + 0.1)) for _ in range(4)] for i, p in hard.items()}
    paired = paired_difference(before, after)
    apart = [avg_at_k(list(side.values())) for side in (before, after)]
    assert paired.high - paired.low < 0.8 * math.hypot(*(e.high - e.low for e in apart))


def test_unchanged_answers_leave_a_bounded_doubt() -> None:
    same = {str(i): [float(i % 2)] for i in range(100)}
    difference = paired_difference(same, same)
    assert difference.value == 0 and difference.p_value == 1.0
    assert difference.low == -difference.high
    assert 0.02 < difference.high < 0.05
    assert difference.min_detectable == difference.high


def test_different_problems_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        paired_difference({"a": [1.0], "b": [0.0]}, {"a": [1.0], "c": [0.0]})
    assert "2 problems were answered on one side only" in str(caught.value)
    assert "max_problems" in str(caught.value)


def test_one_run_pools_to_its_own_difference() -> None:
    before, after = {"a": [0.0], "b": [1.0], "c": [0.0]}, {"a": [1.0], "b": [1.0], "c": [0.0]}
    pooled = pooled_difference([(before, after)])
    assert pooled.pooled == paired_difference(before, after)
    assert pooled.across_runs is None


def test_pooling_averages_runs_inside_each_problem() -> None:
    generator = random.Random(2)
    pairs = []
    for _ in range(3):
        before = {str(i): [float(generator.random() < 0.3) for _ in range(4)] for i in range(50)}
        after = {str(i): [float(generator.random() < 0.5) for _ in range(4)] for i in range(50)}
        pairs.append((before, after))
    pooled = pooled_difference(pairs)
    # Equal sample counts: joining the runs' samples within each problem is the same thing.
    joined = [{i: [score for pair in pairs for score in pair[side][i]] for i in pairs[0][0]} for side in (0, 1)]
    together = paired_difference(*joined)
    assert pooled.pooled.value == pytest.approx(together.value)
    assert pooled.pooled.low == pytest.approx(together.low)
    assert pooled.by_run == tuple(pytest.approx(paired_difference(*pair).value) for pair in pairs)
    assert pooled.across_runs is not None
    half = 4.302652730 * stdev(pooled.by_run) / math.sqrt(3)
    assert pooled.across_runs.high - pooled.across_runs.value == pytest.approx(half)


def test_runs_over_different_problems_do_not_pool() -> None:
    with pytest.raises(DataError, match="one side only"):
        pooled_difference([({"a": [0.0]}, {"a": [1.0]}), ({"b": [0.0]}, {"b": [1.0]})])


@pytest.mark.parametrize(
    "call",
    [
        lambda: accuracy([]),
        lambda: avg_at_k([]),
        lambda: avg_at_k([[1.0], []]),
        lambda: mean_interval([]),
        lambda: bootstrap_interval([]),
        lambda: paired_difference({}, {}),
        lambda: pooled_difference([]),
    ],
)
def test_nothing_to_score_is_an_error(call: object) -> None:
    with pytest.raises(DataError):
        call()  # type: ignore[operator]


def test_metrics_import_without_torch_or_numpy() -> None:
    code = "import sys, tafkir.eval.metrics; print(any(m in sys.modules for m in ('torch', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
