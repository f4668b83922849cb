"""Advantages and overlong shaping against the vectors that other frameworks publish, and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from tafkir.recipe.rl import AdvantageKind
from tafkir.train.advantages import advantages, overlong_penalty, zero_variance_groups

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])


def test_grpo_and_dr_grpo() -> None:
    want = (REWARDS[0] - 0.5) / (REWARDS[0].std() + 1e-6)
    got = advantages("grpo", REWARDS)
    torch.testing.assert_close(got[0], want)
    assert got[1].tolist() == [0.0] * 4
    assert zero_variance_groups(REWARDS).tolist() == [False, True]
    assert advantages("dr_grpo", REWARDS)[0].tolist() == [0.5, -0.5, -0.5, 0.5]


def test_rloo_is_the_reward_less_the_mean_of_the_others() -> None:
    rewards = torch.tensor([[0.5, 2.0, -1.0], [3.0, 3.0, 0.0]])
    want = [[0.5 - 0.5, 2.0 - -0.25, -1.0 - 1.25], [3.0 - 1.5, 3.0 - 1.5, 0.0 - 3.0]]
    torch.testing.assert_close(advantages("rloo", rewards), torch.tensor(want))


def test_leave_one_out_divides_by_the_deviation_of_the_others() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0]])
    others = [[0.0, 0.0, 3.0], [1.0, 0.0, 3.0], [1.0, 0.0, 3.0], [1.0, 0.0, 0.0]]
    want = []
    for own, rest in zip(rewards[0].tolist(), others, strict=True):
        mean = sum(rest) / 3
        want.append((own - mean) / (math.sqrt(sum((x - mean) ** 2 for x in rest) / 3) + 1e-6))
    torch.testing.assert_close(advantages("leave_one_out", rewards)[0], torch.tensor(want), atol=1e-5, rtol=1e-5)
    # One odd reward: the others are equal, and dividing by their deviation would blow it up.
    odd = advantages("leave_one_out", torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(odd, torch.tensor([[1.0, -1.0, -1.0]]), atol=1e-5, rtol=0)
    assert advantages("leave_one_out", torch.tensor([[1.0, 0.0]])).tolist() == [[1.0, -1.0]]


def test_reinforce_plus_plus_normalises_over_the_step() -> None:
    got = advantages("reinforce++", REWARDS)
    torch.testing.assert_close(got, (REWARDS - 0.75) / (REWARDS.std() + 1e-6))
    assert got.sum().item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "leave_one_out", "reinforce++"])
def test_equal_rewards_give_zeros(kind: AdvantageKind) -> None:
    assert advantages(kind, torch.full((3, 7), 0.7)).abs().max().item() < 1e-5


def test_overlong_penalty_is_the_soft_punishment_of_dapo() -> None:
    """DAPO, equation 13, at L_max = 20,480 and L_cache = 4,096."""
    lengths = torch.tensor([[1000, 16384, 18432, 20480]])
    got = overlong_penalty(lengths, max_tokens=20480, buffer_tokens=4096, penalty=1.0)
    assert got.tolist() == [[0.0, 0.0, -0.5, -1.0]]
    assert overlong_penalty(lengths, max_tokens=20480, buffer_tokens=4096, penalty=0.2)[0, 2] == pytest.approx(-0.1)
    assert overlong_penalty(lengths, max_tokens=20480, buffer_tokens=0, penalty=1.0).tolist() == [[0.0] * 4]
