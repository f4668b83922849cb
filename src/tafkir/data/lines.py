"""JSON-lines files, plain or gzipped: numbered lines, and errors that say `file:line`."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tafkir.errors import DataError

__all__ = ["BadRowError", "numbered_lines", "parse_row"]


class BadRowError(ValueError):
    """The row is malformed: what was expected instead."""


def numbered_lines(path: Path | Any, where: str, *, expected: str, fix: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a plain or gzipped (`.gz`) UTF-8 file, blank ones left out.

    Args:
        path: a path, or a resource of the package.
        where: what errors call the file.
        expected: said where the file does not exist.
        fix: what to do then.

    Raises:
        DataError: the file is missing, unreadable, damaged or not UTF-8.
    """
    try:
        raw = path.read_bytes()
        if where.endswith(".gz"):
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError("the data file does not exist", where=where, expected=expected, fix=fix) from None
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError("the file is not UTF-8", where=f"{where}:{line}", fix="convert it to UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"the gzip file is truncated or damaged ({error})", where=where, fix="copy it again") from None
    except OSError as error:
        raise DataError(f"the data file cannot be read ({error.strerror})", where=where) from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def parse_row(line: str) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        BadRowError: it is none.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRowError(f"valid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise BadRowError("JSON that is not nested so deeply") from None
    except ValueError as error:
        raise BadRowError(f"valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadRowError("a JSON object")
    return row
