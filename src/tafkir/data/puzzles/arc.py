"""ARC tasks: a few demonstrations of a rule on grids, and inputs to apply it to. Reads every usual layout of files.

Shapes: a grid is [R, C], colours 0 to 9.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from tafkir.data.lines import BadRowError, numbered_lines, parse_row
from tafkir.errors import DataError
from tafkir.recipe.puzzles import BUNDLED_TASKS

__all__ = ["ArcGrid", "ArcPair", "ArcTask", "parse_grid", "read_tasks"]

ArcGrid = np.ndarray[Any, np.dtype[np.uint8]]

_TASK = '{"train": [{"input": grid, "output": grid}, ...], "test": [{"input": grid}, ...]}'
_CHALLENGES, _SOLUTIONS = "_challenges.json", "_solutions.json"
_ELSEWHERE = "name a folder or file of ARC tasks, or one of " + ", ".join(BUNDLED_TASKS)


@dataclass(frozen=True, slots=True, eq=False)
class ArcPair:
    """An input with its output; None where the file keeps the output back."""

    input: ArcGrid
    output: ArcGrid | None


@dataclass(frozen=True, slots=True, eq=False)
class ArcTask:
    """A task: `train` are its demonstrations, which all have outputs; `where` is named in errors."""

    id: str
    train: tuple[ArcPair, ...]
    test: tuple[ArcPair, ...]
    where: str


def read_tasks(source: str) -> list[ArcTask]:
    """The tasks of a source, in the order of their files.

    Args:
        source: the name of a set that ships with the package (`BUNDLED_TASKS`); a folder of JSON files, one task each,
            named by it (ARC-AGI, ConceptARC, Mini-ARC, 1D-ARC); a JSON file of one task, of tasks by id (with outputs
            from the `_solutions.json` beside a `_challenges.json`), or of a list of tasks with an `id`; JSON lines of
            tasks with an `id`, plain or gzipped.

    Raises:
        DataError: there is no such thing, or something in it is no ARC task; the message names file and task.
    """
    tasks = list(_read(source))
    if not tasks:
        raise DataError("there is no task", where=source, fix=_ELSEWHERE)
    seen: dict[str, str] = {}
    for task in tasks:
        if task.id in seen:
            raise DataError(f"the task {task.id!r} is also in {seen[task.id]}", where=task.where, fix="remove one")
        seen[task.id] = task.where
    return tasks


def _read(source: str) -> Iterable[ArcTask]:
    if source in BUNDLED_TASKS:
        name, _ = BUNDLED_TASKS[source]
        return _from_lines(files("tafkir") / "datasets" / "arc" / name, name)
    path = Path(source)
    if path.is_dir():
        found = sorted(path.glob("*.json")) or sorted(path.rglob("*.json"))
        return (_task(_load(file), file.stem, str(file)) for file in found)
    if path.suffix == ".json":
        return _from_json(path)
    if source.endswith((".jsonl", ".jsonl.gz")):
        return _from_lines(path, source)
    raise DataError("no such folder of tasks", where=source, fix=_ELSEWHERE)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), fix=_ELSEWHERE) from None
    except json.JSONDecodeError as error:
        raise DataError("not valid JSON", where=f"{path}:{error.lineno}", expected=_TASK) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot be read as JSON ({error})", where=str(path)) from error


def _from_lines(path: Any, where: str) -> Iterator[ArcTask]:
    for number, line in numbered_lines(path, where, expected="JSON lines of ARC tasks", fix=_ELSEWHERE):
        place = f"{where}:{number}"
        try:
            row = parse_row(line)
        except BadRowError as error:
            raise DataError("no ARC task", where=place, expected=str(error)) from None
        yield _task(row, str(row.get("id", number)), place)


def _from_json(path: Path) -> Iterator[ArcTask]:
    content, where = _load(path), str(path)
    if isinstance(content, list):
        for number, row in enumerate(content, start=1):
            name = row.get("id", number) if isinstance(row, dict) else number
            yield _task(row, str(name), f"{where}: task {name}")
    elif isinstance(content, dict) and not {"train", "test"} & set(content):
        solutions = _solutions(path)
        for name, row in content.items():
            yield _task(row, name, f"{where}: task {name}", solutions.get(name))
    else:
        yield _task(content, path.stem, where)


def _solutions(path: Path) -> Mapping[str, Any]:
    """Outputs of test inputs by task, from the file that Kaggle keeps beside the challenges."""
    beside = path.with_name(path.name.replace(_CHALLENGES, _SOLUTIONS))
    if not path.name.endswith(_CHALLENGES) or not beside.is_file():
        return {}
    content = _load(beside)
    if not isinstance(content, dict):
        raise DataError("not an object of outputs by task", where=str(beside), expected='{"id": [grid, ...], ...}')
    return content


def _task(row: Any, name: str, where: str, solutions: Any = None) -> ArcTask:
    if not isinstance(row, dict) or not isinstance(row.get("train", []), list) or "test" not in row:
        raise DataError("this is no ARC task", where=where, expected=_TASK)
    demonstrations, tests = row.get("train"), row["test"]
    if not demonstrations:
        raise DataError("the task has no demonstrations", where=where, expected="at least one pair under 'train'")
    if not isinstance(tests, list) or not tests:
        raise DataError("the task has no test input", where=where, expected="at least one input under 'test'")
    train = tuple(_pair(pair, f"{where}: train {i}") for i, pair in enumerate(demonstrations, start=1))
    test = [_pair(pair, f"{where}: test {i}", needed=False) for i, pair in enumerate(tests, start=1)]
    if solutions is not None:
        if not isinstance(solutions, list) or len(solutions) != len(test):
            raise DataError(
                f"the solutions do not fit {len(test)} test inputs", where=where, expected="a grid for each"
            )
        given = [parse_grid(grid, f"{where}: solution {i}") for i, grid in enumerate(solutions, start=1)]
        test = [ArcPair(pair.input, grid) for pair, grid in zip(test, given, strict=True)]
    return ArcTask(name, train, tuple(test), where)


def _pair(row: Any, where: str, *, needed: bool = True) -> ArcPair:
    if not isinstance(row, dict) or "input" not in row:
        raise DataError("there is no input", where=where, expected='{"input": grid, "output": grid}')
    output = row.get("output")
    if output is None and needed:
        raise DataError("the demonstration has no output", where=where, expected='{"input": grid, "output": grid}')
    found = None if output is None else parse_grid(output, f"{where}: output")
    return ArcPair(parse_grid(row["input"], f"{where}: input"), found)


def parse_grid(rows: Any, where: str) -> ArcGrid:
    """A grid of JSON as an array [R, C].

    Raises:
        DataError: no list of rows of equal lengths, or with something else than 0 to 9 in it.
    """
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise DataError("this is no grid", where=where, expected="a list of rows such as [[1, 0], [0, 1]]")
    if len({len(row) for row in rows}) > 1:
        lengths = ", ".join(str(len(row)) for row in rows)
        raise DataError(f"rows have different lengths: {lengths}", where=where)
    for number, row in enumerate(rows, start=1):
        for cell in row:
            if isinstance(cell, bool) or not isinstance(cell, int) or not 0 <= cell <= 9:
                raise DataError(f"unknown symbol {cell!r} in row {number}", where=where, expected="integers 0 to 9")
    return np.array(rows, dtype=np.uint8)
