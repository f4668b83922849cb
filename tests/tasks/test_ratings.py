"""Ratings against worked examples, closed forms and games that known strengths played."""

from __future__ import annotations

import math
from random import Random

import pytest

from tafkir.errors import DataError
from tafkir.tasks.ratings import (
    Game,
    Glicko,
    contest_points,
    contest_rating,
    elo_ratings,
    expected_rank,
    percentile,
    rate_glicko,
    solved_rating,
)


def test_glicko_2_gives_the_numbers_of_its_authors_example() -> None:
    opponents = [(Glicko(1400, 30), 1.0), (Glicko(1550, 100), 0.0), (Glicko(1700, 300), 0.0)]
    after = rate_glicko(Glicko(1500, 200, 0.06), opponents)
    assert after.rating == pytest.approx(1464.06, abs=0.01)
    assert after.deviation == pytest.approx(151.52, abs=0.01)
    assert after.volatility == pytest.approx(0.05999, abs=0.00001)
    idle = rate_glicko(Glicko(1500, 200, 0.06), [])
    assert idle.rating == 1500 and idle.deviation == pytest.approx(200.2714, abs=1e-3)


def test_elo_is_the_closed_form_for_two_and_finds_known_strengths() -> None:
    games = [Game("a", "b", 1.0)] * 3 + [Game("b", "a", 1.0)] + [Game("a", "b", 0.5)] * 2
    ratings = elo_ratings(games, anchor="b")
    assert ratings["a"] - ratings["b"] == pytest.approx(400 * math.log10((4 + 0.5) / (2 + 0.5)))
    assert ratings["b"] == 1000
    true = {"p": 900.0, "q": 1000.0, "r": 1100.0}
    rng = Random(0)
    drawn = []
    for _ in range(6000):
        first, second = rng.sample(sorted(true), 2)
        chance = 1 / (1 + 10 ** ((true[second] - true[first]) / 400))
        drawn.append(Game(first, second, float(rng.random() < chance)))
    assert elo_ratings(drawn) == pytest.approx(true, abs=20)


def test_a_contest_rating_is_the_one_whose_rank_was_expected() -> None:
    field = [800.0 + 7 * n for n in range(300)]
    for rank in (1.5, 20.0, 150.0, 290.0):
        assert expected_rank(contest_rating(rank, field), field) == pytest.approx(rank, abs=1e-6)
    assert contest_rating(1.5, [1500.0]) == pytest.approx(1500)
    with pytest.raises(DataError, match="rank 9 in a field of 2"):
        contest_rating(9, [1.0, 2.0])


def test_points_fall_with_tries_that_failed() -> None:
    tries = {"A": [True], "B": [False, False, True], "C": [False, False]}
    assert contest_points({"A": 500, "B": 1000, "C": 1500}, tries) == (1400, 0)
    assert contest_points({"A": None, "B": None, "D": None}, tries) == (2, 20)


def test_the_rating_of_what_was_solved_is_the_most_likely() -> None:
    rating, error = solved_rating([(1500, True), (1500, False)])
    assert rating == pytest.approx(1500) and error == pytest.approx(400 / math.log(10) / math.sqrt(0.5))
    easy, hard = [(900.0 + 10 * n, n < 60) for n in range(100)], [(1900.0 + 10 * n, n < 60) for n in range(100)]
    assert solved_rating(hard)[0] - solved_rating(easy)[0] == pytest.approx(1000)
    assert 1500 < solved_rating([(1500, True)] * 10)[0] < 2500, "all solved is finite"
    with pytest.raises(DataError, match="no rated problem"):
        solved_rating([])


def test_percentiles_are_those_of_the_distribution() -> None:
    assert percentile(-1000) == 0 and percentile(5000) == 100
    assert 45 < percentile(1150) < 75 and 98 < percentile(2400) < 100
    assert [percentile(r) for r in (800, 1200, 1600, 2000)] == sorted(percentile(r) for r in (800, 1200, 1600, 2000))
