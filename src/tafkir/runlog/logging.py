"""The `tafkir` logger: rich on a terminal, plain elsewhere, JSON lines in the run directory, rank 0 only."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tafkir.errors import TafkirError
from tafkir.runlog.atomic import guard_disk

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "is_main_rank",
    "is_terminal",
    "log_to",
    "setup_logging",
    "stderr_console",
]

_ROOT = "tafkir"


def is_terminal() -> bool:
    """Whether messages go to a person's terminal."""
    return sys.stderr.isatty()


def is_main_rank() -> bool:
    """Whether this process is the one that speaks for a distributed run."""
    return os.environ.get("RANK", "0") == "0"


@cache
def stderr_console() -> Console:
    """The one console that log lines and live progress share, so that neither overwrites the other."""
    from rich.console import Console

    return Console(stderr=True)


def setup_logging(level: int = logging.INFO) -> None:
    """Send the package's messages to stderr. Calling it again replaces the handler."""
    logger = logging.getLogger(_ROOT)
    for handler in [h for h in logger.handlers if not isinstance(h, _JsonlHandler)]:
        logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    if is_main_rank():
        logger.addHandler(_terminal_handler() if is_terminal() else _plain_handler())
    else:
        logger.addHandler(logging.NullHandler())


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append every message to `path` as JSON lines as well, and at the end why the work failed, if it did.

    Raises:
        RunDirError: the place is not writable, or the disk is full.
    """
    if not is_main_rank():
        yield
        return
    with guard_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _JsonlHandler(path)
    logger = logging.getLogger(_ROOT)
    logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        handler.record_failure(error)
        raise
    finally:
        logger.removeHandler(handler)
        with guard_disk(path):
            handler.close()


def _plain_handler() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    return handler


def _terminal_handler() -> logging.Handler:
    from rich.highlighter import NullHighlighter
    from rich.logging import RichHandler

    return RichHandler(
        console=stderr_console(), show_path=False, log_time_format="%H:%M:%S", highlighter=NullHighlighter()
    )


class _JsonlHandler(logging.FileHandler):
    """One JSON object a message."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.path = path

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the name is logging's
        """A log that cannot be written ends the run with one line, as any other file of the run does."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        with guard_disk(self.path):
            raise error

    def record_failure(self, error: BaseException) -> None:
        """Write why a run ended; to the file only, because the command line says it on stderr itself."""
        expected = isinstance(error, TafkirError | KeyboardInterrupt)
        trace = None if expected else (type(error), error, error.__traceback__)
        message = str(error) or type(error).__name__
        self.handle(logging.LogRecord(_ROOT, logging.ERROR, "", 0, message, None, trace))

    def format(self, record: logging.LogRecord) -> str:
        row = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            row["traceback"] = logging.Formatter().formatException(record.exc_info)
        return json.dumps(row, ensure_ascii=False)
