"""All the problems of a recipe, by part: read, checked, cleaned of what must not be trained on, and counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from tafkir.data.contamination import ContaminationReport, remove_overlaps
from tafkir.data.sources import Problem, SourceReport, read_source
from tafkir.errors import DataError
from tafkir.recipe.schema import DataConfig
from tafkir.records import Split

__all__ = ["Corpus", "load_corpus"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Problems by part. `train` holds only what may be trained on; validation and test keep every row.

    `dropped` counts the training rows left out, by source and reason; rows removed for contamination are in
    `contamination.removed`.
    """

    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]
    test: tuple[Problem, ...]
    sources: tuple[SourceReport, ...]
    dropped: Mapping[str, Mapping[str, int]]
    contamination: ContaminationReport

    def part(self, split: Split) -> tuple[Problem, ...]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]

    def counts(self) -> dict[str, dict[str, int]]:
        """Problems per source and part."""
        table: dict[str, dict[str, int]] = {}
        for problem in (*self.train, *self.validation, *self.test):
            row = table.setdefault(problem.source, {"train": 0, "validation": 0, "test": 0})
            row[problem.split] += 1
        return table


def load_corpus(config: DataConfig) -> Corpus:
    """Read every source of the recipe, drop what training must not see, and prove that nothing leaks.

    Raises:
        DataError: a source is missing or malformed, ids repeat, or nothing is left to train on.
    """
    problems: list[Problem] = []
    reports: list[SourceReport] = []
    for source in config.sources:
        rows, report = read_source(source, on_bad_row=config.on_bad_row)
        problems += rows
        reports.append(report)
        if report.bad_rows:
            count, whole = len(report.bad_rows), report.rows + len(report.bad_rows)
            _logger.warning("%d of %d rows are malformed and left out; the first: %s", count, whole, report.bad_rows[0])
    repeated = [id for id, count in Counter(problem.id for problem in problems).items() if count > 1]
    if repeated:
        raise DataError(
            f"{len(repeated)} problem ids repeat",
            where=repeated[0],
            expected="one id for each problem over all sources",
            fix="rename the file or correct its 'id' fields",
        )
    dropped: dict[str, Counter[str]] = {}
    candidates = []
    for problem in problems:
        if problem.split != "train":
            continue
        reason = problem.flaw or ("too many steps" if len(problem.steps) > config.max_steps else "")
        if reason:
            dropped.setdefault(problem.source, Counter())[reason] += 1
        else:
            candidates.append(problem)
    validation = tuple(problem for problem in problems if problem.split == "validation")
    test = tuple(problem for problem in problems if problem.split == "test")
    train, contamination = remove_overlaps(candidates, validation + test)
    if not train:
        raise DataError(
            "no problem is left to train on",
            where=", ".join(config.sources),
            expected='rows whose equations recompute, in split "train"',
        )
    return Corpus(train, validation, test, tuple(reports), {k: dict(v) for k, v in dropped.items()}, contamination)
