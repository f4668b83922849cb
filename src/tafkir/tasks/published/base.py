"""What every published task is made of: its card, its rows, its prompt and its rule."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from tafkir.data.lines import BadRowError, numbered_lines, parse_row
from tafkir.errors import DataError
from tafkir.protocols import Task
from tafkir.records import Example, Message, Outcome, Split, Verdict
from tafkir.tasks.answers import Extraction

__all__ = [
    "TURN",
    "Conversation",
    "EvalTask",
    "PublishedTask",
    "ReadTask",
    "Rule",
    "TaskCard",
    "TaskEntry",
    "TaskSampling",
    "bad_row",
    "entry",
    "find_file",
    "read_rows",
    "verdict",
]


@dataclass(frozen=True, slots=True)
class TaskSampling:
    """How the published evaluation samples: `samples` answers a question, of at most `max_tokens` tokens each."""

    temperature: float
    top_p: float
    max_tokens: int
    samples: int


@dataclass(frozen=True, slots=True)
class TaskCard:
    """What is known of a task without reading its data.

    Attributes:
        name: what the command line calls it.
        version: changes with prompt, extraction, rule or data; results of two versions do not compare.
        metric: "accuracy", "pass@k", "judge", "perplexity", or "steps": an item is right where all of its steps are,
            and the share of steps stands beside that.
        language: an ISO 639 code, or "multi".
        num_items: how many examples the split `test` has; None where the user's data decides.
        source: where prompt, sampling and rule come from.
        shipped: the data is in the package.
        how_to_get: for data that is not: what to download, and what to pass as `--data`.
    """

    name: str
    version: str
    title: str
    metric: str
    language: str
    num_items: int | None
    license: str
    source: str
    shipped: bool
    how_to_get: str
    sampling: TaskSampling


class EvalTask(Task, Protocol):
    """A task with a card."""

    @property
    def card(self) -> TaskCard: ...


TURN: Final = "\n\x1e\n"
"""Stands between the answers of a conversation, which is graded as one text."""


@runtime_checkable
class Conversation(EvalTask, Protocol):
    """A task that goes on after the first answer.

    `ends_when_cut` says whether an answer that the token limit cut off is the last one.
    """

    ends_when_cut: bool

    def next_prompt(self, example: Example, answers: Sequence[str]) -> list[Message] | None:
        """All that the model reads after these answers; None at the end."""
        ...


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """A row of a family's table.

    Attributes:
        build: from the user's data (a file or a folder; None for what the package has) to the task. May raise
            DataError.
    """

    card: TaskCard
    build: Callable[[TaskCard, Path | None], EvalTask]


def entry(
    name: str,
    title: str,
    items: int | None,
    build: Callable[[TaskCard, Path | None], EvalTask],
    *,
    sampling: TaskSampling,
    license: str,
    source: str,
    metric: str = "accuracy",
    language: str = "en",
    how_to_get: str = "",
    version: str = "1",
) -> TaskEntry:
    """A row of a family's table; data that `how_to_get` says nothing of is shipped."""
    shipped = not how_to_get
    card = TaskCard(name, version, title, metric, language, items, license, source, shipped, how_to_get, sampling)
    return TaskEntry(card, build)


class Rule(Protocol):
    """The scoring rule of a family: where the answer stands, and whether it is right."""

    def extract(self, example: Example, text: str, *, finished: bool) -> Extraction:
        """The answer in an assistant turn, after its chain of thought."""
        ...

    def check(self, example: Example, answer: str) -> tuple[Outcome, str]:
        """The outcome, and the reason where it is not "correct"."""
        ...


class ReadTask:
    """What every published task has: a card, and examples that are read when they are first asked for.

    Args:
        card: what is known of it.
        read: gives the examples; called once.
    """

    def __init__(self, card: TaskCard, read: Callable[[], Iterable[Example]]) -> None:
        self._card, self._read = card, read

    @property
    def name(self) -> str:
        return self._card.name

    @property
    def card(self) -> TaskCard:
        return self._card

    @cached_property
    def _examples(self) -> Sequence[Example]:
        return tuple(self._read())

    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of one part, in the order of the data set; most benchmarks have `test` alone."""
        return [example for example in self._examples if example.split == split]


class PublishedTask(ReadTask):
    """Rows of a data set with a published prompt and rule.

    Args:
        card: what is known of it.
        read: gives the examples; called once, when they are first asked for.
        ask: the prompt of an example.
        rule: extracts and judges.
    """

    def __init__(
        self, card: TaskCard, read: Callable[[], Iterable[Example]], ask: Callable[[Example], str], rule: Rule
    ) -> None:
        super().__init__(card, read)
        self._ask, self._rule = ask, rule

    def prompt(self, example: Example) -> list[Message]:
        """One user turn."""
        return [Message("user", self._ask(example))]

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        """Reward 1 for a correct answer, else 0.

        Only what follows the last `</think>` counts. A text that the length limit cut off is "correct" where the right
        answer stands there already, and "length" in every other case, never "wrong".
        """
        found = self._rule.extract(example, text, finished=finished)
        if found.text is None:
            return verdict(example, "no_answer" if finished else "length", None, found.reason)
        outcome, reason = self._rule.check(example, found.text)
        if not finished and outcome != "correct":
            outcome, reason = "length", f"cut off: {reason}"
        return verdict(example, outcome, found.text[:1000], reason)


def verdict(example: Example, outcome: Outcome, extracted: str | None, reason: str = "") -> Verdict:
    """A verdict whose reward is 1 for "correct" and 0 for anything else; a timeout is a failure of the grader."""
    failure = "time" if outcome == "timeout" else ""
    return Verdict(outcome, 1.0 if outcome == "correct" else 0.0, extracted, example.answer, reason, failure)


# ---- reading -----------------------------------------------------------------------------------------------------


def find_file(card: TaskCard, data: Path | None, names: Sequence[str], *, shipped: str = "") -> Any:
    """The file of a data set: the one given, the first of `names` in the folder given, or the package's own.

    Args:
        names: file names or glob patterns to look for in a folder.
        shipped: path below `tafkir/datasets`, for data that is in the package.

    Raises:
        DataError: nothing is given and nothing is shipped (says how to get it), or nothing of the kind is there.
    """
    if data is None:
        if shipped:
            return files("tafkir").joinpath("datasets", *shipped.split("/"))
        raise DataError(f"the data of {card.name} is not in the package", where=card.name, fix=card.how_to_get)
    if data.is_file():
        return data
    if not data.is_dir():
        raise DataError("there is no such file or folder", where=str(data), fix=card.how_to_get or "correct the path")
    for name in names:
        found = sorted(data.glob(name))
        if found:
            return found[0]
    raise DataError(
        f"the folder holds no data of {card.name}",
        where=str(data),
        expected=" or ".join(names),
        fix=card.how_to_get or "pass the file itself",
    )


def read_rows(path: Any, columns: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    """The rows of a `.jsonl`, `.csv` (either also `.gz`), `.json` (a list) or `.parquet` file, and where each stands.

    Args:
        path: a path, or a resource of the package.
        columns: what every row must have; "problem|question" is either of the two, and `problem` in what comes back.

    Raises:
        DataError: the file is missing, damaged or empty, or a row lacks a column (named, with those that are there).
    """
    where, name = str(path), path.name
    rows: list[tuple[str, Mapping[str, Any]]]
    if name.endswith((".csv", ".csv.gz")):
        lines = numbered_lines(path, where, expected="a CSV file", fix="correct the path")
        table = csv.DictReader(io.StringIO("\n".join(line for _, line in lines)))
        rows = [(f"{where}:{number}", row) for number, row in enumerate(table, start=2)]
    elif name.endswith(".parquet"):
        rows = [(f"{where}:{number}", row) for number, row in enumerate(_read_parquet(path))]
    elif name.endswith(".json"):
        try:
            listed = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"not valid JSON ({error})", where=where) from None
        rows = [(f"{where}:{number}", row) for number, row in enumerate(listed if isinstance(listed, list) else [])]
    else:
        rows = []
        for number, line in numbered_lines(path, where, expected="a file of JSON lines", fix="correct the path"):
            try:
                rows.append((f"{where}:{number}", parse_row(line)))
            except BadRowError as error:
                raise bad_row(f"{where}:{number}", str(error)) from None
    if not rows:
        raise DataError("the file has no rows", where=where, expected=f"rows with {', '.join(columns)}")
    return [(place, _with_columns(place, row, columns)) for place, row in rows]


def _with_columns(place: str, row: Any, columns: Sequence[str]) -> Mapping[str, Any]:
    has = dict(row) if isinstance(row, Mapping) else {}
    missing = []
    for column in columns:
        names = column.split("|")
        found = next((name for name in names if has.get(name) is not None), None)
        if found is None:
            missing.append(" or ".join(names))
        else:
            has[names[0]] = has[found]
    if missing:
        lacks = f"the row lacks {', '.join(missing)}; it has {', '.join(map(str, has)) or 'no columns'}"
        raise DataError(lacks, where=place, fix="rename the columns")
    return has


def bad_row(where: str, expected: str) -> DataError:
    """The error for a row that is not what it should be."""
    return DataError("the row cannot be used", where=where, expected=expected)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            "Parquet files need pyarrow", where=str(path), fix="pip install 'tafkir[eval]', or convert it to JSON lines"
        ) from None
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows
