"""Kept rollouts: whole files, equal bytes, limits that hold, and nothing twice after a kill."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from tafkir.errors import RunDirError
from tafkir.runlog.rollouts import Keep, RolloutLog


def rows_of(step: int, count: int = 2) -> list[str]:
    return [json.dumps({"step": step, "completion": i, "text": "٣ تفاح"}, ensure_ascii=False) for i in range(count)]


@pytest.mark.parametrize(
    ("text", "keep"),
    [("all", Keep()), ("none", Keep(0)), ("50 steps", Keep(50)), ("256 MB", Keep(None, 256_000_000))],
)
def test_what_a_recipe_says(text: str, keep: Keep) -> None:
    assert Keep.parse(text) == keep


@pytest.mark.parametrize("text", ["256", "256MB", "-1 steps", "1 TB", "1.5 GB", ""])
def test_what_it_may_not_say(text: str) -> None:
    with pytest.raises(ValueError, match="256 MB"):
        Keep.parse(text)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "rollouts")
    assert log.steps() == []
    log.write(3, rows_of(3))
    log.write(12, rows_of(12, 1))
    assert log.steps() == [3, 12]
    assert [row["completion"] for row in log.read(3)] == [0, 1]
    assert next(log.read(12))["text"] == "٣ تفاح"
    with gzip.open(tmp_path / "rollouts" / "step-00000012.jsonl.gz", "rt", encoding="utf-8") as file:
        assert json.loads(file.read())["step"] == 12


def test_the_newest_steps_stay(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, Keep(steps=2))
    for step in range(1, 6):
        log.write(step, rows_of(step))
    assert log.steps() == [4, 5]


def test_bytes_are_limited_but_the_newest_step_stays(tmp_path: Path) -> None:
    noise = [json.dumps({"x": os.urandom(600).hex()}) for _ in range(1)]
    one = RolloutLog(tmp_path / "one")
    one.write(1, noise)
    size = next((tmp_path / "one").iterdir()).stat().st_size
    log = RolloutLog(tmp_path / "two", Keep(num_bytes=size * 5 // 2))
    for step in range(1, 6):
        log.write(step, [json.dumps({"x": os.urandom(600).hex()})])
    assert log.steps() == [4, 5]
    log = RolloutLog(tmp_path / "two", Keep(num_bytes=1))
    log.write(6, noise)
    assert log.steps() == [6]


def test_nothing_is_written_where_nothing_is_kept(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "rollouts", Keep.parse("none"))
    log.write(1, rows_of(1))
    assert not log.is_on and not (tmp_path / "rollouts").exists()
    assert not RolloutLog(tmp_path, Keep.parse("0 MB")).is_on


def test_steps_done_again_leave_what_an_unbroken_run_leaves(tmp_path: Path) -> None:
    keep = Keep(steps=3)
    unbroken, killed = RolloutLog(tmp_path / "a", keep), RolloutLog(tmp_path / "b", keep)
    for step in range(1, 9):
        unbroken.write(step, rows_of(step))
    for step in (*range(1, 7), *range(4, 9)):  # killed after step 6, resumed from step 3
        killed.write(step, rows_of(step))
    assert [path.name for path in sorted((tmp_path / "a").iterdir())] == [
        path.name for path in sorted((tmp_path / "b").iterdir())
    ]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path)
    with pytest.raises(RunDirError, match="no rollouts of step 7"):
        list(log.read(7))
    log.write(7, rows_of(7))
    path = tmp_path / "step-00000007.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RunDirError, match="step-00000007"):
        list(log.read(7))
