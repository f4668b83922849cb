"""A day of a fleet: what came is served, scaling saves hours, and a scaler that forgets the others swings."""

from __future__ import annotations

import math
import time

import pytest

from tafkir.errors import RecipeError
from tafkir.plan.day import Scaler, Traffic, run_day

PEAK = Traffic(peak=1000.0, trough=0.2)


def test_a_fixed_fleet_by_hand() -> None:
    """100 replicas for 24 hours; the mean of the cosine lies in the middle of trough and peak."""
    day = run_day(PEAK, Scaler(fixed=100), capacity=12.5)
    assert day.replica_hours == pytest.approx(2400) and day.most == 100 and day.changes == 0
    assert day.requests == pytest.approx(86400 * 1000 * 0.6, rel=1e-3)
    assert day.late == 0 and day.longest_wait_s == 0


def test_too_few_replicas_make_a_line_of_the_length_that_is_missing() -> None:
    """Half the peak's capacity: the line at its longest is the integral of what exceeds it."""
    day = run_day(PEAK, Scaler(fixed=50), capacity=12.5)
    excess = sum(max(0.0, PEAK.rate(60.0 * minute) - 625) * 60 for minute in range(1440))
    assert day.longest_wait_s == pytest.approx(excess / 625, rel=1e-6) and 0.4 < day.late < 1


def test_scaling_follows_the_traffic() -> None:
    fixed = run_day(PEAK, Scaler(fixed=100), capacity=12.5)
    scaled = run_day(PEAK, Scaler(), capacity=12.5, days=2)
    # 60 % of the peak in the mean, at 80 % of what replicas carry, and some that are not taken away at once.
    assert 0.6 < scaled.replica_hours / fixed.replica_hours < 0.9
    assert scaled.most == 100 and scaled.late < 0.01 and scaled.turns <= 2


def test_a_scaler_that_forgets_the_others_swings() -> None:
    """1.1 replicas' worth of traffic: two are below `low`, one is above `target`, so it goes 2, 1, 2, 1, ..."""
    steady = Traffic(peak=11.0, trough=1.0)
    naive = run_day(steady, Scaler(consolidates=False, start_s=0.0), capacity=10.0)
    careful = run_day(steady, Scaler(start_s=0.0), capacity=10.0)
    assert naive.turns > 1000 and naive.late > 0.3
    assert careful.turns == 0 and careful.late == 0


def test_failures_cost_capacity_while_replicas_start() -> None:
    """Each of 100 replicas fails twice a day and is away for half an hour: 1 / 24 of them in the mean."""
    scaler = Scaler(fixed=100, start_s=1800.0)
    healthy, failing = (run_day(PEAK, scaler, 10.2, failures_per_day=rate) for rate in (0.0, 2.0))
    assert failing.failures == pytest.approx(200 / (1 + 1 / 24), rel=0.02)
    assert healthy.late == 0 < failing.late


def test_a_hundred_thousand_chips_take_no_longer() -> None:
    start = time.process_time()
    day = run_day(Traffic(peak=1e6), Scaler(), capacity=100.0, days=7, failures_per_day=0.01)
    assert day.most * 8 >= 1e5 and time.process_time() - start < 2


def test_bad_days() -> None:
    for traffic, capacity in ((Traffic(-1.0), 1.0), (Traffic(1.0, 2.0), 1.0), (PEAK, 0.0)):
        with pytest.raises(RecipeError, match="rates must be positive"):
            run_day(traffic, Scaler(), capacity)
    with pytest.raises(RecipeError, match="must not be negative"):
        run_day(PEAK, Scaler(), 1.0, failures_per_day=-1.0)
    assert math.isclose(PEAK.rate(43200), 1000)
