"""Numbers of a run as JSON lines, one row a step.

`metrics.jsonl` holds only what is a function of the recipe, so that equal runs have equal files; what depends on the
clock or the machine goes to `timings.jsonl`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tafkir.errors import RunDirError
from tafkir.runlog.atomic import guard_disk, write_bytes

__all__ = ["JsonlWriter", "Metric", "read_jsonl"]

Metric = float | Sequence[float]

_WITHOUT_THE_LINE = "remove this line, then run the same command again"


class JsonlWriter:
    """Appends rows to a JSON-lines file and flushes each one; a `MetricSink`.

    A half-written last line, as a kill leaves it, is cut off on opening.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` for appending, its directory made if need be.

        Raises:
            RunDirError: the place is not writable.
        """
        self.path = path
        with guard_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                _cut_partial_line(path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Metric]) -> None:
        """Append `{"step": step, **values}`; a number that is not finite is written as null."""
        self.append({"step": step, **{name: _finite(value) for name, value in values.items()}})

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one row and flush it.

        Raises:
            RunDirError: the disk is full.
        """
        with guard_disk(self.path):
            self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()

    def truncate_to(self, step: int) -> None:
        """Drop the rows after `step`: a stage that resumes from `step` writes them anew."""
        self._file.close()
        kept = [row for row in read_jsonl(self.path) if row.get("step", 0) <= step]
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in kept]
        write_bytes(self.path, "".join(lines).encode("utf-8"))
        with guard_disk(self.path):
            self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        with guard_disk(self.path):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file that `JsonlWriter` wrote; a half-written last line is left out.

    Raises:
        RunDirError: the file is missing, or a line in it is not a JSON object (names `file:line`).
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise RunDirError("no such file", where=str(path)) from error
    whole, _, _ = content.rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunDirError("not valid JSON", where=f"{path}:{number}", fix=_WITHOUT_THE_LINE) from error
        if not isinstance(row, dict):
            raise RunDirError("not a JSON object", where=f"{path}:{number}", fix=_WITHOUT_THE_LINE)
        yield row


def _finite(value: Metric) -> Metric | list[float | None] | None:
    if isinstance(value, (int, float)):
        return value if math.isfinite(value) else None
    return [item if math.isfinite(item) else None for item in value]


def _cut_partial_line(path: Path) -> None:
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end != len(content):
        os.truncate(path, end)
