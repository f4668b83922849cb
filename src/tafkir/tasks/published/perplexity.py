"""Perplexity of plain text: what a model thinks of Shakespeare, of Arabic documentation, or of the user's own file.

Nothing is sampled. Whoever runs such a task scores `example.question`, token by token, and reports
exp(-sum of log-probabilities / tokens) and, as tokenizers differ, bits per UTF-8 byte.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from tafkir.errors import DataError, GradingError
from tafkir.records import Example, Message, Split, Verdict
from tafkir.tasks.published.base import TaskCard, TaskEntry, TaskSampling, entry, find_file, read_rows

__all__ = ["TASKS", "WINDOW", "TextTask"]

WINDOW = 2000
"""Characters of one example; a longer line is an example of its own."""


class TextTask:
    """Windows of whole lines of a text; there is nothing to ask and nothing to grade."""

    def __init__(self, card: TaskCard, documents: Sequence[tuple[str, str]]) -> None:
        self.card, self._documents = card, documents

    @property
    def name(self) -> str:
        return self.card.name

    @cached_property
    def _examples(self) -> Sequence[Example]:
        return [
            Example(f"{self.name}-{source}-{number}", source, "test", text, "")
            for source, document in self._documents
            for number, text in enumerate(_windows(document))
        ]

    def examples(self, split: Split) -> Sequence[Example]:
        return self._examples if split == "test" else []

    def prompt(self, example: Example) -> list[Message]:
        """None: the text itself is scored, without a chat template."""
        return []

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        raise GradingError("perplexity is measured on the text itself, there is no answer to grade", where=self.name)


def _windows(document: str) -> list[str]:
    windows, current = [], ""
    for line in document.splitlines(keepends=True):
        if current and len(current) + len(line) > WINDOW:
            windows.append(current)
            current = ""
        current += line
    return [window for window in [*windows, current] if window.strip()]


def _shakespeare(card: TaskCard, data: Path | None) -> TextTask:
    """The last tenth, which is what nanoGPT and others keep for validation."""
    path = data or files("tafkir") / "datasets" / "tinyshakespeare" / "input.txt.gz"
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    return TextTask(card, [("tinyshakespeare", text[int(0.9 * len(text)) :])])


def _arabic(card: TaskCard, data: Path | None) -> TextTask:
    path = find_file(card, data, ["*.jsonl*"], shipped="react_docs_ar/pages.jsonl.gz")
    return TextTask(card, [(str(row["file"]), row["text"]) for _, row in read_rows(path, ("file", "text"))])


def _file(card: TaskCard, data: Path | None) -> TextTask:
    path = find_file(card, data, ["*.txt"])
    try:
        return TextTask(card, [(path.stem, path.read_text("utf-8"))])
    except UnicodeDecodeError:
        raise DataError("the file is not UTF-8", where=str(path), fix="convert it to UTF-8") from None


_SCORED = TaskSampling(0.0, 1.0, 0, 1)

TASKS: Sequence[TaskEntry] = (
    entry(
        "perplexity-shakespeare",
        "Perplexity of the last tenth of Tiny Shakespeare",
        None,
        _shakespeare,
        metric="perplexity",
        sampling=_SCORED,
        license="public domain",
        source="github.com/karpathy/char-rnn",
    ),
    entry(
        "perplexity-ar",
        "Perplexity of React's documentation in Arabic",
        None,
        _arabic,
        metric="perplexity",
        sampling=_SCORED,
        license="CC BY 4.0",
        source="github.com/reactjs/ar.react.dev",
        language="ar",
    ),
    entry(
        "perplexity",
        "Perplexity of a text of one's own",
        None,
        _file,
        metric="perplexity",
        sampling=_SCORED,
        license="the user's",
        source="the user's text",
        language="",
        how_to_get="pass a UTF-8 text file as --data",
    ),
)
