"""A user's own task: a Python file with a task in it, or a file of items with the name of a scorer."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tafkir.errors import DataError
from tafkir.records import Example, Outcome
from tafkir.tasks.answers import Extraction, extract_text, normalize
from tafkir.tasks.published.base import EvalTask, PublishedTask, Rule, TaskCard, TaskSampling, read_rows
from tafkir.tasks.published.choice import ChoiceRule, ask_choice, choice_example
from tafkir.tasks.published.math import MathRule, NumberRule

__all__ = ["SCORERS", "load_items", "load_python"]

_TASK_FILE = "a variable `task` with card, name, examples, prompt and grade (tafkir.tasks.catalog.EvalTask)"


class _ExactRule:
    """The same text, but for case, spaces and the script of digits; in a box, else all that follows the thought."""

    def extract(self, example: Example, text: str, *, finished: bool) -> Extraction:
        return extract_text(text, finished=finished)

    def check(self, example: Example, answer: str) -> tuple[Outcome, str]:
        same = _plain(answer) == _plain(example.answer)
        return ("correct", "") if same else ("wrong", "not the expected text")


def _plain(text: str) -> str:
    return " ".join(normalize(text).casefold().split()).strip(" .")


SCORERS: Mapping[str, Callable[[], Rule]] = {
    "number": NumberRule,
    "math": MathRule,
    "choice": ChoiceRule,
    "exact": _ExactRule,
}
"""The scorers that `items.jsonl:SCORER` may name."""


def load_items(path: str, scorer: str) -> EvalTask:
    """A task of the rows of a file with `question` and `answer`, and `options` for the scorer `choice`.

    Optional: `id`, `prompt` (instead of the question as it is), `subject`, `difficulty`, `language` ("ar" for Arabic
    letters). All rows are test examples; the version is a hash of the file.

    Raises:
        DataError: there is no such scorer or file, or a row is not what it should be.
    """
    if scorer not in SCORERS:
        raise DataError(f"no scorer is called {scorer!r}", where=f"{path}:{scorer}", expected=", ".join(SCORERS))
    file = Path(path)
    columns = ("question", "answer", "options") if scorer == "choice" else ("question", "answer")
    rows = read_rows(file, columns)
    name, version = f"{file.name.partition('.')[0]}:{scorer}", hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    sampling = TaskSampling(0.0, 1.0, 4096, 1)
    card = TaskCard(name, version, path, "accuracy", "", len(rows), "the user's", path, True, "", sampling)

    def read() -> Iterator[Example]:
        for number, (place, row) in enumerate(rows):
            yield _example(card, place, str(row.get("id", number)), row)

    def ask(example: Example) -> str:
        return str(example.extra["prompt"]) if "prompt" in example.extra else _ask(example)

    return PublishedTask(card, read, ask, SCORERS[scorer]())


def _ask(example: Example) -> str:
    return ask_choice(example) if "options" in example.extra else example.question


def _example(card: TaskCard, place: str, id: str, row: Mapping[str, Any]) -> Example:
    subject, difficulty = str(row.get("subject", "")), str(row.get("difficulty", ""))
    extra = {"prompt": row["prompt"]} if row.get("prompt") else {}
    if card.name.endswith(":choice"):
        made = choice_example(card, place, id, row, language=str(row.get("language", "en")), subject=subject)
        return Example(id, card.name, "test", made.question, made.answer, {**made.extra, **extra}, subject, difficulty)
    return Example(id, card.name, "test", str(row["question"]), str(row["answer"]), extra, subject, difficulty)


def load_python(path: str) -> EvalTask:
    """The variable `task` of a Python file, which is run as a module.

    Raises:
        DataError: the file is missing, does not run, or has no task.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError("there is no such task file", where=path, expected="a Python file with " + _TASK_FILE)
    name = f"tafkir_task_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f"{path}:{lines[-1]}" if lines else path
        raise DataError(f"the task file does not run: {type(error).__name__}: {error}", where=where) from error
    task: Any = getattr(module, "task", None)
    missing = [part for part in ("card", "name", "examples", "prompt", "grade") if not hasattr(task, part)]
    if missing:
        what = "the file has no variable `task`" if task is None else f"its task has no {', '.join(missing)}"
        raise DataError(what, where=path, expected=_TASK_FILE)
    if not isinstance(task.card, TaskCard):
        raise DataError("its card is no TaskCard", where=path, expected="tafkir.tasks.catalog.TaskCard(...)")
    found: EvalTask = task
    return found
