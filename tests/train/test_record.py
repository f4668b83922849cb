"""Kept rollouts: every fact of the update stands at the token that it belongs to."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tafkir.records import Completion, Example, Verdict
from tafkir.runlog.rollouts import Keep, RolloutLog
from tafkir.train.record import Learned, record_rollouts
from tafkir.train.rollout import Rollout, RolloutGroup


def group(name: str, *completions: Completion) -> RolloutGroup:
    example = Example(name, "sums", "train", "كم؟", "3")
    verdict = Verdict("wrong", 0.25, "2", "3", "not equal")
    return RolloutGroup(example, (1, 2), tuple(Rollout(done, "ثلاثة", verdict) for done in completions))


def done(*logprobs: float, version: int = 4, versions: tuple[int, ...] = ()) -> Completion:
    tokens = tuple(range(10, 10 + len(logprobs)))
    return Completion("x", tokens, logprobs, "stop", version, token_versions=versions)


GROUPS = [
    group("a", done(-1.0, -2.0), done(-0.123456789, -math.inf, -0.5)),
    group("left out", done(-1.0), done(-2.0)),
    group("c", done(-3.0, -1.0, versions=(3, 4)), done(-0.25)),
]
ADVANTAGES = torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.7071067, -0.7071067]])


def test_facts_stand_at_their_tokens(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path)
    train = torch.tensor([-1.5, -2.5, -0.2, -9.0, math.nan, -3.5, -1.5, -0.75])
    masked = torch.tensor([False, True, False, True, True, False, False, True])
    record_rollouts(log, 7, GROUPS, Learned({}, ADVANTAGES, [0, 2], train, masked))
    rows = list(log.read(7))
    assert [(row["group"], row["completion"], row["id"]) for row in rows] == [
        (0, 0, "a"),
        (0, 1, "a"),
        (1, 0, "left out"),
        (1, 1, "left out"),
        (2, 0, "c"),
        (2, 1, "c"),
    ]
    assert [row["train_logprobs"] for row in rows] == [
        [-1.5, -2.5],
        [-0.2, -9.0, None],
        None,
        None,
        [-3.5, -1.5],
        [-0.75],
    ]
    assert [row["masked"] for row in rows] == [[1], [1, 2], [], [], [], [0]]
    assert rows[1]["logprobs"] == [-0.12346, None, -0.5]
    assert [row["advantage"] for row in rows] == [1.0, -1.0, 0.0, 0.0, 0.70711, -0.70711]
    assert rows[4]["versions"] == [[3, 1], [4, 1]] and rows[5]["versions"] == [[4, 1]]
    assert rows[0] | {"train_logprobs": 0, "masked": 0} == {
        "step": 7,
        "group": 0,
        "id": "a",
        "source": "sums",
        "question": "كم؟",
        "prompt_ids": [1, 2],
        "completion": 0,
        "outcome": "wrong",
        "reward": 0.25,
        "extracted": "2",
        "expected": "3",
        "reason": "not equal",
        "sandbox": "",
        "text": "ثلاثة",
        "finish_reason": "stop",
        "versions": [[4, 2]],
        "token_ids": [10, 11],
        "advantage": 1.0,
        "logprobs": [-1.0, -2.0],
        "train_logprobs": 0,
        "masked": 0,
    }


def test_a_step_that_learned_nothing_is_kept_too(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path)
    record_rollouts(log, 1, [*GROUPS, group("empty", done(), done())], Learned({}, torch.zeros(4, 2)))
    rows = list(log.read(1))
    assert len(rows) == 8 and all(row["train_logprobs"] is None and row["masked"] == [] for row in rows)
    assert rows[-1]["token_ids"] == rows[-1]["logprobs"] == []


@pytest.mark.parametrize("keep", [Keep(0), Keep(None, 0)])
def test_nothing_is_made_where_nothing_is_kept(tmp_path: Path, keep: Keep) -> None:
    record_rollouts(RolloutLog(tmp_path, keep), 1, GROUPS, Learned({}, ADVANTAGES))
    assert list(tmp_path.iterdir()) == []


def test_equal_rollouts_make_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        record_rollouts(RolloutLog(tmp_path / name), 1, GROUPS, Learned({}, ADVANTAGES))
    one, other = (next((tmp_path / name).iterdir()).read_bytes() for name in ("a", "b"))
    assert one == other
