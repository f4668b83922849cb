"""Accuracy, calibration and length bias of rewards against closed forms; the guard's every verdict."""

from __future__ import annotations

import json
import math
import random

import pytest

from tafkir.errors import TrainingError
from tafkir.recipe.rlhf import GuardConfig
from tafkir.train.reward_guard import RewardGuard
from tafkir.train.reward_model import ScoredPair
from tafkir.train.reward_quality import (
    calibration_error,
    correlation,
    measure_reward_model,
    rank_correlation,
    reliability_table,
    reward_scale,
)


def pair(chosen: float, rejected: float, lengths: tuple[int, int] = (10, 10), source: str = "a") -> ScoredPair:
    return ScoredPair("p", source, chosen, rejected, *lengths)


def test_calibration_error_by_hand() -> None:
    """Four pairs at confidence 0.9, of which three are right, and one at 0.6 that is wrong: (4/5) 0.15 + (1/5) 0.6."""
    probabilities = [0.9, 0.9, 0.9, 0.1, 0.4]
    assert calibration_error(probabilities, 5).value == pytest.approx(0.8 * 0.15 + 0.2 * 0.6)
    rows = reliability_table(probabilities, 5)
    assert [(row["num_pairs"], row["confidence"], row["accuracy"]["value"]) for row in rows] == [
        (1, pytest.approx(0.6), 0.0),
        (4, pytest.approx(0.9), 0.75),
    ]
    assert rows[1]["low"] == pytest.approx(0.9) and rows[1]["high"] == pytest.approx(1.0)


def test_a_model_that_knows_what_it_does_not_know_is_calibrated() -> None:
    draw = random.Random(0)
    margins = [draw.gauss(0, 2) for _ in range(1000)]
    # The label follows the model's own probability, so the model is right about itself.
    honest = [m if draw.random() < 1 / (1 + math.exp(-m)) else -m for m in margins]
    sure = [3 * m for m in honest]
    errors = [calibration_error([1 / (1 + math.exp(-m)) for m in side]) for side in (honest, sure)]
    assert errors[0].value < 0.06 < 0.08 < errors[1].value
    assert errors[0].low < errors[0].value < errors[0].high


def test_correlations_match_their_definitions() -> None:
    xs, ys = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 10.0]
    assert correlation(xs, ys) == pytest.approx(13 / math.sqrt(250))
    assert rank_correlation(xs, ys) == pytest.approx(0.8)
    assert rank_correlation([1.0, 1.0, 2.0], [5.0, 5.0, 9.0]) == pytest.approx(1.0)
    assert correlation(xs, [7.0] * 4) is None


def test_a_model_that_only_likes_length_is_found_out() -> None:
    draw = random.Random(1)
    lengths = [(draw.randint(5, 50), draw.randint(5, 50)) for _ in range(300)]
    bias = measure_reward_model([pair(a / 10, b / 10, (a, b)) for a, b in lengths])["length_bias"]
    assert bias["reward_length_correlation"] == pytest.approx(1.0)
    assert bias["margin_length_correlation"] == pytest.approx(1.0)
    assert bias["accuracy"]["chosen_longer"]["value"] == 1.0 and bias["accuracy"]["chosen_shorter"]["value"] == 0.0
    fair = measure_reward_model([pair(1, 0, size) for size in lengths])["length_bias"]
    assert abs(fair["margin_length_correlation"] or 0) < 0.2
    assert fair["accuracy"]["chosen_shorter"]["value"] == 1.0
    assert fair["longer_is_better"]["low"] < 0.5 < fair["longer_is_better"]["high"]


def test_shares_have_intervals_ties_do_not_count_and_sources_stand_apart() -> None:
    told = measure_reward_model([pair(1, 0), pair(0, 0), pair(2, 1, source="b"), pair(0, 1, source="b")])
    assert told["accuracy"]["value"] == 0.5 and told["accuracy"]["low"] < 0.5 < told["accuracy"]["high"]
    assert {name: row["num_problems"] for name, row in told["by_source"].items()} == {"a": 2, "b": 2}
    assert told["length_bias"]["accuracy"]["matched"]["num_problems"] == 4
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_what_cannot_be_measured_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no pair is held out"):
        measure_reward_model([])
    with pytest.raises(TrainingError, match="p: the reward is not finite"):
        measure_reward_model([pair(math.nan, 0)])
    assert reward_scale([pair(3, 1), pair(3, 1)]) == (2.0, pytest.approx(2 / math.sqrt(3)))
    assert reward_scale([pair(2, 2)]) == (2.0, 1e-6)


def feed(guard: RewardGuard, rows: list[tuple[float, float | None, float | None]], start: int = 0) -> None:
    for step, (reward, judged, kl) in enumerate(rows, start):
        guard.observe(step, reward, judged=judged, kl=kl)


def test_the_guard_stops_where_the_kl_budget_is_spent() -> None:
    guard = RewardGuard(GuardConfig(kl_budget=4.0, window=2))
    feed(guard, [(0, None, 3.0), (0, None, 5.0)])
    assert not guard.stopped, "the mean is at the budget"
    feed(guard, [(0, None, 3.5)], start=2)
    assert "4.25 nats" in guard.stopped and guard.trips == [{"step": 3, "reason": guard.stopped}]


def test_the_guard_stops_where_the_judge_falls_while_the_reward_rises() -> None:
    rising = [(0.1 * i, 1 - 0.05 * abs(i - 4), None) for i in range(12)]
    guard = RewardGuard(GuardConfig(judge=True, window=2, tolerance=0.1))
    feed(guard, rising)
    assert "judge fell" in guard.stopped
    # A judge that falls together with the reward, and one that stays within the tolerance, are no hacking.
    for rows in ([(-0.1 * i, -0.1 * i, None) for i in range(9)], [(i, 0.04 * (i % 2), None) for i in range(9)]):
        calm = RewardGuard(GuardConfig(judge=True, window=2, tolerance=0.1))
        feed(calm, rows)
        assert not calm.trips


def test_lowering_halves_the_rate_once_for_each_excess() -> None:
    guard = RewardGuard(GuardConfig(kl_budget=1.0, window=3, action="lower"))
    feed(guard, [(0, None, 2.0)] * 7)
    assert not guard.stopped and guard.rate == 0.25 and [trip["step"] for trip in guard.trips] == [3, 6]


def test_a_resumed_guard_decides_as_an_unbroken_one() -> None:
    rows = [(0.1 * i, 1 - 0.05 * abs(i - 4), 0.5 * i) for i in range(12)]
    config = GuardConfig(kl_budget=3.0, judge=True, window=3, action="lower")
    whole = RewardGuard(config)
    feed(whole, rows)
    for cut in range(1, 12):
        first, second = RewardGuard(config), RewardGuard(config)
        feed(first, rows[:cut])
        second.load_state(json.loads(json.dumps(first.state())))
        feed(second, rows[cut:], start=cut)
        assert second.state() == whole.state()
    assert whole.trips
