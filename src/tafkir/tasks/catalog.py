"""Every task that `tafkir eval` knows by name, and the user's own: one list, and one way to load each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

from tafkir.errors import DataError
from tafkir.records import Example, Message, Split, Verdict
from tafkir.tasks.published import own
from tafkir.tasks.published.base import Conversation, EvalTask, TaskCard, TaskEntry, TaskSampling

__all__ = [
    "EvalTask",
    "QuestionOnly",
    "TaskCard",
    "TaskSampling",
    "as_asked",
    "grade_recorded",
    "list_tasks",
    "load_task",
]

_QUESTION_ONLY = "-question-only"

FAMILIES = ("math", "choice", "instructions", "grids", "perplexity", "code", "contests", "scicode", "judged")
"""Modules of `tafkir.tasks.published`; each has `TASKS`, a tuple of `TaskEntry`."""


def _entries(family: str) -> Sequence[TaskEntry]:
    entries: Sequence[TaskEntry] = import_module(f"tafkir.tasks.published.{family}").TASKS
    return entries


@cache
def _table() -> Mapping[str, TaskEntry]:
    entries = [entry for family in FAMILIES for entry in _entries(family)]
    table = {entry.card.name: entry for entry in entries}
    assert len(table) == len(entries), "two tasks have one name"
    return table


def _find(name: str) -> TaskEntry | None:
    """The entry of a name; no further family is imported than the first that has it."""
    return next((entry for family in FAMILIES for entry in _entries(family) if entry.card.name == name), None)


def list_tasks() -> list[TaskCard]:
    """The cards of all published tasks, by family; reads no data."""
    return [entry.card for entry in _table().values()]


def load_task(name: str, data: Path | None = None) -> EvalTask:
    """A task by its name, or one of the user's own.

    Args:
        name: as `list_tasks` has it; or `path/to/task.py`, or `path/to/items.jsonl:SCORER`.
        data: a file or folder with the data set, for what the package does not have, or instead of what it has.

    Raises:
        DataError: the name is unknown (says the nearest); the data is missing (says how to get it) or has other columns
            (says which).
    """
    if name.endswith(".py"):
        return own.load_python(name)
    path, colon, scorer = name.rpartition(":")
    if colon and path:
        return own.load_items(path, scorer)
    entry = _find(name)
    if entry is None:
        near = difflib.get_close_matches(name, _table(), 1)
        raise DataError(
            f"no task is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            where="--tasks",
            expected="a name from `tafkir eval --list`, a Python file with a task, or items.jsonl:SCORER",
        )
    return entry.build(entry.card, data)


class QuestionOnly:
    """A task whose prompt is the question alone, for models that never saw the published instruction.

    A version of its own keeps its results apart from the published task's.

    Raises:
        DataError: the task is no plain question (a conversation, perplexity, a judge's).
    """

    def __init__(self, task: EvalTask) -> None:
        if isinstance(task, Conversation) or task.card.metric not in ("accuracy", "pass@1"):
            raise DataError("its prompt is more than a question", where=task.name, fix="leave --question-only out")
        self._task = task
        self.card = replace(task.card, version=task.card.version + _QUESTION_ONLY)

    @property
    def name(self) -> str:
        return self._task.name

    def examples(self, split: Split) -> Sequence[Example]:
        return self._task.examples(split)

    def prompt(self, example: Example) -> list[Message]:
        return [Message("user", example.question)]

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        return self._task.grade(example, text, finished=finished)


def as_asked(task: EvalTask, version: str) -> EvalTask:
    """The task as it was when an answer of this version was asked for."""
    return QuestionOnly(task) if version.endswith(_QUESTION_ONLY) else task


def grade_recorded(task: EvalTask, example: Example, text: str, *, finished: bool) -> Verdict:
    """The task's verdict; a scorer that raises, one's own above all, is an outcome "error" that says so."""
    try:
        return task.grade(example, text, finished=finished)
    except Exception as error:
        why = f"the scorer raised {type(error).__name__}: {error}"
        return Verdict("error", 0.0, None, example.answer, why)
