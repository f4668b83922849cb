"""The schedule behind the idle share, by hand."""

from __future__ import annotations

import pytest

from benchmarks.joint_vs_two_stage import idle_share, summarise


def test_idle_share_by_hand() -> None:
    # Two slots: 4 | 1, 2, 1 -> both end at 4, nothing is idle; 8 beside 1, 1 -> slots end at 8 and 2: 6 of 16 idle.
    assert idle_share([4, 1, 2, 1], 2) == 0.0
    assert idle_share([8, 1, 1], 2) == pytest.approx(6 / 16)
    assert idle_share([3, 3, 3], 8) == 0.0


def test_a_long_tail_shows_in_every_number() -> None:
    even, tail = summarise([10] * 8, 8), summarise([10] * 7 + [80], 8)
    assert even["idle_share"] == 0 and tail["idle_share"] == pytest.approx(1 - 150 / 640)
    assert tail["max_over_mean"] > even["max_over_mean"] == 1 and tail["p95"] == 80
