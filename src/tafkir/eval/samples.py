"""One sample of one item by one model: the append-only results file of `tafkir eval`, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tafkir.errors import DataError
from tafkir.records import Outcome
from tafkir.runlog.metrics import JsonlWriter, read_jsonl

__all__ = ["FAILURES", "SAMPLES_NAME", "Sample", "append_sample", "load_samples", "samples_file"]

SAMPLES_NAME = "samples.jsonl"
FAILURES: frozenset[str] = frozenset({"error", "timeout", "unjudged"})
"""Outcomes that say nothing of the answer: counted and shown, never scored as zero, asked for again by the next run."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer with its verdict; a line of the results file.

    Attributes:
        key: `<hash>-v<task version>`. The hash is of all that the answer depends on: what the model read, the
            sampling and its seed, the model's fingerprint, item and repeat.
        model: name under which scores are shown; `fingerprint` says what it really is.
        item: id of the item within the task, by which models are paired.
        source, subject, difficulty: groups that scores are split by; empty where the task knows none.
        repeat: 0, 1, ... of the same item.
        text: what is graded: the answer after the thinking.
        reasoning: the thinking, wherever the model put it; empty where there is none.
        outcome: `length` is a cut-off answer, `error` a request or a grader that failed, `timeout` one that was late.
        reward: 0 to 1; says nothing where the outcome is one of `FAILURES`.
        tokens: of the completion, the thinking among them; 0 where the endpoint does not say.
        finish_reason: "stop", "length", or what else the endpoint says; "error" where there is no answer,
            "turn" where the conversation goes on.
        sandbox: the tier that its program ran in; empty where none ran.
        prompt_tokens: that the model read, over all turns; 0 where the endpoint does not say, and in older files.
        latency_s: from asking to the whole answer, waiting in the engine's queue among it.
    """

    key: str
    model: str
    task: str
    task_version: str
    item: str
    source: str
    subject: str
    difficulty: str
    repeat: int
    seed: int
    question: str
    text: str
    reasoning: str
    outcome: Outcome
    reward: float
    extracted: str | None
    expected: str
    reason: str
    tokens: int
    finish_reason: Literal["stop", "length", "error"] | str
    latency_s: float
    fingerprint: str
    sandbox: str = ""
    prompt_tokens: int = 0

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"

    @property
    def failed(self) -> bool:
        """Nothing is known of the answer; see `FAILURES`."""
        return self.outcome in FAILURES

    @property
    def identity(self) -> str:
        """The key without the task's version: the same answer, however it is graded."""
        return self.key.rpartition("-v")[0]


_FIELDS = tuple(field.name for field in fields(Sample))
_LATER = ("sandbox", "prompt_tokens")
"""Fields that older files lack."""


def samples_file(place: Path) -> Path:
    """The results file that a person means: the file itself, or the one in a folder."""
    return place if place.suffix == ".jsonl" else place / SAMPLES_NAME


def load_samples(path: Path) -> list[Sample]:
    """Read a results file, or the one in a folder, in the order of first appearance.

    The last line of an answer counts: failures that were asked for again, and what was graded anew, replace it. A
    half-written last line is left out.

    Raises:
        RunDirError: the file is missing or a line is not JSON.
        DataError: a line lacks a field (names `file:line`).
    """
    path = samples_file(path)
    found: dict[str, Sample] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        sample = _parse(row, f"{path}:{number}")
        found[sample.identity] = sample
    return list(found.values())


def append_sample(writer: JsonlWriter, sample: Sample) -> None:
    """Add one line and hand it to the system, from which a kill of this process cannot take it back.

    Raises:
        RunDirError: the disk is full.
    """
    # All fields are plain, and `asdict` would copy each of them deeply.
    writer.append({name: getattr(sample, name) for name in _FIELDS})


def _parse(row: Mapping[str, Any], where: str) -> Sample:
    missing: Sequence[str] = [name for name in _FIELDS if name not in row and name not in _LATER]
    if missing:
        raise DataError(
            f"the sample lacks {', '.join(missing)}",
            where=where,
            expected="a line that `tafkir eval --tasks` wrote",
            fix="move the file away and evaluate again",
        )
    return Sample(**{name: row[name] for name in _FIELDS if name in row})
