"""One graded answer, and the JSON-lines files that hold them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tafkir.errors import DataError
from tafkir.records import FinishReason, Outcome
from tafkir.runlog.atomic import guard_disk, write_text
from tafkir.runlog.metrics import read_jsonl

__all__ = ["GREEDY", "EvalRecord", "append_records", "load_records", "write_records"]

GREEDY = 0
"""`repeat` of the greedy answer; sampled answers count from 1."""


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """One answer to one problem, with its verdict.

    `key` is a hash of everything that the answer depends on (weights, prompt tokens, sampling, seed), so that an
    answer that is already there is known again. `length` is an outcome of its own: the answer was cut off.
    """

    key: str
    example_id: str
    source: str
    repeat: int
    question: str
    text: str
    outcome: Outcome
    reward: float
    extracted: str | None
    expected: str
    reason: str
    tokens: int
    finish_reason: FinishReason

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


_FIELDS = tuple(field.name for field in fields(EvalRecord))


def load_records(path: Path) -> list[EvalRecord]:
    """Read a file of answers; a half-written last line is left out.

    Raises:
        RunDirError: the file is missing or a line is not JSON.
        DataError: a line lacks a field (names `file:line`).
    """
    return [_parse(row, f"{path}:{number}") for number, row in enumerate(read_jsonl(path), start=1)]


def _parse(row: dict[str, Any], where: str) -> EvalRecord:
    missing = [name for name in _FIELDS if name not in row]
    if missing:
        raise DataError(
            f"the answer lacks {', '.join(missing)}",
            where=where,
            expected="a row that `tafkir eval` wrote",
            fix="remove the file and evaluate again",
        )
    return EvalRecord(**{name: row[name] for name in _FIELDS})


def write_records(path: Path, records: Iterable[EvalRecord]) -> None:
    """Replace the file by these answers in one step."""
    write_text(path, _lines(records))


def append_records(path: Path, records: Sequence[EvalRecord]) -> None:
    """Add answers to the end of the file and flush them to disk."""
    with guard_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: one write call for the whole batch.
        with path.open("ab", buffering=0) as file:
            file.write(_lines(records).encode("utf-8"))
            os.fsync(file.fileno())


def _lines(records: Iterable[EvalRecord]) -> str:
    return "".join(json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)
