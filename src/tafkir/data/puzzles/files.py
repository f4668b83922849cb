"""Puzzles of one's own: JSON, CSV or text files of grids, read with errors that say which puzzle is wrong."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tafkir.errors import DataError

__all__ = ["RawPuzzle", "read_puzzles"]

_INPUTS, _OUTPUTS = ("input", "question", "puzzle"), ("output", "answer", "solution")


@dataclass(frozen=True, slots=True)
class RawPuzzle:
    """One puzzle as it stands in a file: grids as rows of signs; `answer` is None where the file gives none."""

    where: str
    question: tuple[str, ...]
    answer: tuple[str, ...] | None


def read_puzzles(path: Path | str, *, limit: int | None = None, seed: int = 0) -> list[RawPuzzle]:
    """The puzzles of a file, in its order.

    `.json`: a list of objects with `input` and, where the rules do not give it, `output`; a grid is a list of rows,
    each a list of signs or a string, or one string. `.csv`: a header with the columns input (or question) and output
    (or answer), grids as strings. Anything else: one grid a line.

    Args:
        limit: of a file with more puzzles than this, so many are drawn, each equally likely.
        seed: of that draw.

    Raises:
        DataError: the file is missing, empty or malformed; the message names `file:number`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), fix="check the path in [trm.puzzles]") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as UTF-8 text ({error})", where=str(path)) from error
    readers = {".json": _from_json, ".csv": _from_csv}
    puzzles = _draw(readers.get(path.suffix.lower(), _from_lines)(text, str(path)), limit, Random(seed))
    if not puzzles:
        raise DataError("the file holds no puzzle", where=str(path))
    return puzzles


def _draw(puzzles: Iterator[RawPuzzle], limit: int | None, random: Random) -> list[RawPuzzle]:
    """All of them, or a sample of `limit` in their order, without ever holding more (algorithm R of Vitter 1985)."""
    kept: list[tuple[int, RawPuzzle]] = []
    for number, puzzle in enumerate(puzzles):
        if limit is None or number < limit:
            kept.append((number, puzzle))
        elif (place := random.randrange(number + 1)) < limit:
            kept[place] = number, puzzle
    return [puzzle for _, puzzle in sorted(kept, key=lambda item: item[0])]


def _from_json(text: str, where: str) -> Iterator[RawPuzzle]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError("not valid JSON", where=f"{where}:{error.lineno}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise DataError(f"not valid JSON ({error})", where=where) from error
    if not isinstance(rows, list):
        raise DataError("not a list of puzzles", where=where, expected='[{"input": [...], "output": [...]}, ...]')
    for number, row in enumerate(rows, start=1):
        place = f"{where}: puzzle {number}"
        if not isinstance(row, dict):
            raise DataError("not an object", where=place, expected='{"input": [...], "output": [...]}')
        question = _pick(row, _INPUTS)
        if question is None:
            raise DataError("there is no input", where=place, expected="a grid under 'input'")
        answer = _pick(row, _OUTPUTS)
        yield RawPuzzle(place, _rows(question, place), None if answer is None else _rows(answer, place))


def _from_csv(text: str, where: str) -> Iterator[RawPuzzle]:
    table = csv.DictReader(io.StringIO(text))
    if not any(name in _INPUTS for name in table.fieldnames or ()):
        found = ", ".join(table.fieldnames or ())
        raise DataError(f"the header is {found!r}", where=f"{where}:1", expected="columns input and output")
    for row in table:
        place = f"{where}:{table.line_num}"
        question, answer = _pick(row, _INPUTS), _pick(row, _OUTPUTS)
        if not question:
            raise DataError("there is no input", where=place)
        yield RawPuzzle(place, _rows(question, place), _rows(answer, place) if answer else None)


def _from_lines(text: str, where: str) -> Iterator[RawPuzzle]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.startswith("//"):
            yield RawPuzzle(f"{where}:{number}", (line.strip("\r\n"),), None)


def _pick(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _rows(grid: Any, where: str) -> tuple[str, ...]:
    """Rows of signs; numbers below ten and single characters are signs."""
    if isinstance(grid, str):
        return tuple(grid.splitlines())
    if not isinstance(grid, list) or not grid:
        raise DataError("the grid is no list of rows", where=where, expected="such as [[1, 0], [0, 1]]")
    rows = tuple(row if isinstance(row, str) else "".join(_signs(row, where)) for row in grid)
    if len({len(row) for row in rows}) > 1:
        lengths = ", ".join(str(len(row)) for row in rows)
        raise DataError(f"rows have different lengths: {lengths}", where=where)
    return rows


def _signs(row: Any, where: str) -> Iterator[str]:
    if not isinstance(row, list):
        raise DataError("the grid is no list of rows", where=where, expected="such as [[1, 0], [0, 1]]")
    for cell in row:
        sign = str(cell)
        if isinstance(cell, bool) or not isinstance(cell, int | str) or len(sign) != 1:
            raise DataError(f"unknown symbol {cell!r}", where=where, expected="a digit 0 to 9 or one character")
        yield sign
