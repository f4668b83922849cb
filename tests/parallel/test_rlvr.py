"""Reinforcement learning on many processes: the rollouts, the curve and the weights of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.ranks import run_ranks
from tests.parallel.rlvr_jobs import train
from tests.parallel.test_trajectory import assert_same_rows, assert_same_weights


def assert_same_run(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert_same_rows(found["rows"], wanted["rows"])
    assert_same_weights(found["weights"], wanted["weights"])
    for ours, theirs in zip(found["kept"], wanted["kept"], strict=True):
        assert [(row["id"], row["token_ids"]) for row in ours] == [(row["id"], row["token_ids"]) for row in theirs]


@pytest.mark.parametrize(
    ("world", "table"),
    [
        (2, {}),
        (4, {"reduction": "token_mean", "advantage": "reinforce++", "updates_per_rollout": 2, "micro_batches": 2}),
    ],
)
def test_any_number_of_processes_makes_the_same_run(world: int, table: dict[str, Any], tmp_path: Path) -> None:
    """Five problems a step, one of them dull at times: some processes have more micro-batches than others, or none."""
    alone = train(tmp_path / "alone", table)
    assert len(alone["rows"]) == 3 and alone["rows"][-1]["train/grad_norm"] > 0
    first, *others = run_ranks(world, train, tmp_path / "shared", table)
    assert_same_run(first, alone)
    assert all(other == {"rows": None, "kept": None, "weights": None} for other in others)
    lines = [(tmp_path / name / "mismatch.jsonl").read_text().count("\n") for name in ("alone", "shared")]
    assert lines[0] == lines[1] > 0


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    table = {"long_tail": {"staleness": 1}}
    alone = train(tmp_path / "alone", table)
    run_ranks(2, train, tmp_path / "stopped", table, stop=2)
    assert_same_run(train(tmp_path / "stopped", table), alone)
