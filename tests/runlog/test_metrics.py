"""Rows of numbers: flushed, cut at a step, and whole again after a kill."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tafkir.errors import RunDirError
from tafkir.protocols import MetricSink
from tafkir.runlog.metrics import JsonlWriter, read_jsonl


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(path)]


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    sink: MetricSink = JsonlWriter(path)
    sink.write(1, {"train/loss": 0.1, "router/load/0": [0.5, 0.5]})  # type: ignore[dict-item]
    assert path.read_text() == '{"step": 1, "train/loss": 0.1, "router/load/0": [0.5, 0.5]}\n'


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "m.jsonl") as writer:
        writer.write(1, {"a": math.nan, "b": [1.0, math.inf]})
    assert list(read_jsonl(tmp_path / "m.jsonl")) == [{"step": 1, "a": None, "b": [1.0, None]}]


def test_truncate_drops_later_rows_and_writing_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with JsonlWriter(path) as writer:
        for step in (5, 10, 15, 20):
            writer.write(step, {})
        writer.truncate_to(10)
        assert steps(path) == [5, 10]
        writer.write(15, {})
    assert steps(path) == [5, 10, 15]
    with JsonlWriter(path) as writer:
        writer.truncate_to(0)
    assert path.read_bytes() == b""


def test_a_half_written_last_line_is_cut_on_opening(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "trai')
    assert steps(path) == [1]
    with JsonlWriter(path) as writer:
        writer.write(2, {})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"step": 1}\nx\n{"step": 3}\n', "m.jsonl:2: not valid JSON"), (b"[1]\n", "m.jsonl:1: not a JSON object")],
)
def test_a_damaged_file_names_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(content)
    with pytest.raises(RunDirError, match=message):
        list(read_jsonl(path))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no such file"):
        list(read_jsonl(tmp_path / "m.jsonl"))
