"""Puzzles on grids: ARC-AGI-1 and -2, Sudoku-Extreme, Maze-Hard, and the puzzles of the bundled recipes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from tafkir.data.puzzles.arc import ArcGrid, read_tasks
from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.maze import maze_format
from tafkir.data.puzzles.parts import PuzzleSet, PuzzleSets
from tafkir.data.puzzles.sudoku import Box, sudoku_format
from tafkir.recipe.bundled import find_recipe
from tafkir.records import Example, Message, Outcome, Split, Verdict
from tafkir.tasks.answers import Extraction, extract_text
from tafkir.tasks.arc_task import ArcSetTask
from tafkir.tasks.published.base import (
    PublishedTask,
    TaskCard,
    TaskEntry,
    TaskSampling,
    bad_row,
    entry,
    find_file,
    read_rows,
)
from tafkir.tasks.puzzle_sets import PuzzleSetTask, load_puzzle_task, puzzle_task_names
from tafkir.tasks.puzzles.grids import GRIDS

__all__ = ["TASKS", "ArcRule"]

# ---- ARC-AGI -------------------------------------------------------------------------------------------------------

_ROWS = re.compile(r"\]\s*,?\s*\[")
_MATRIX = re.compile(r"\[\s*\[[\d,\s\[\]]*\]\s*\]")
_BLOCK = re.compile(r"```\w*\n(.*?)```", re.DOTALL)


class ArcRule:
    """The whole output grid, as JSON or as rows of digits; in a box, else the last matrix or fenced block.

    The rule of the ARC Prize: two attempts a test input, of which one must be exact (pass@2).
    """

    def extract(self, example: Example, text: str, *, finished: bool) -> Extraction:
        found = extract_text(text, finished=finished)
        if found.source != "text" or found.text is None:
            return found
        grids = _MATRIX.findall(found.text) or _BLOCK.findall(found.text)
        return Extraction(grids[-1], "text") if grids else found

    def check(self, example: Example, answer: str) -> tuple[Outcome, str]:
        return GRIDS.check(example.extra, _ROWS.sub("\n", answer))


def _json(grid: ArcGrid) -> str:
    return "\n".join(str(row) for row in grid.tolist())


def _ask_arc(example: Example) -> str:
    return (
        "Find the rule that turns each input grid into its output grid, and apply it to the test input. "
        "Colours are digits; each row is a JSON list.\n\n"
        f"{example.question}\n\nWrite the output grid for the test input as a JSON list of rows in \\boxed{{}}."
    )


def _arc(card: TaskCard, data: Path | None) -> PublishedTask:
    """One example a test input; `extra["task"]` names the task that it belongs to."""
    if data is None and not card.shipped:
        find_file(card, data, ())  # says how to get it
    source = "arc-agi-1/evaluation" if data is None else str(data)

    def read() -> Iterator[Example]:
        for task in read_tasks(source):
            shown = [
                f"Example {number}\nInput:\n{_json(pair.input)}\nOutput:\n{_json(pair.output)}"
                for number, pair in enumerate(task.train, start=1)
                if pair.output is not None
            ]
            for number, pair in enumerate(task.test):
                if pair.output is None:
                    raise bad_row(task.where, "test inputs with their outputs (a _solutions.json beside the file)")
                question = "\n\n".join([*shown, f"Test input:\n{_json(pair.input)}"])
                extra = {"task": task.id, "number": number, "output": pair.output.tolist()}
                size = f"{pair.output.size // 100}00+ cells" if pair.output.size >= 100 else "under 100 cells"
                id = f"{card.name}-{task.id}-{number}"
                yield Example(id, task.id, "test", question, _json(pair.output), extra, "", size)

    return PublishedTask(card, read, _ask_arc, ArcRule())


# ---- Sudoku and mazes ----------------------------------------------------------------------------------------------


class _Carded:
    """A task of the recipes with a card; what was cut off and is not right is "length"."""

    def __init__(self, card: TaskCard, task: PuzzleSetTask | ArcSetTask, marks: Sequence[tuple[str, str]] = ()) -> None:
        self.card, self._task, self._marks = card, task, marks

    @property
    def name(self) -> str:
        return self.card.name

    @cached_property
    def _test(self) -> Sequence[Example]:
        examples = self._task.examples("test")
        marks = self._marks or [("", "")] * len(examples)
        return [replace(e, subject=s, difficulty=d) for e, (s, d) in zip(examples, marks, strict=True)]

    def examples(self, split: Split) -> Sequence[Example]:
        return self._test if split == "test" else self._task.examples(split)

    def prompt(self, example: Example) -> list[Message]:
        return self._task.prompt(example)

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        verdict = self._task.grade(example, text, finished=finished)
        return verdict if finished or verdict.correct else replace(verdict, outcome="length")


def _file(card: TaskCard, data: Path | None) -> _Carded:
    """A table with `question` and `answer`, one grid a field, as Sudoku-Extreme and Maze-Hard have it."""
    format = maze_format(30, 30) if card.name == "maze-hard" else sudoku_format(Box(3, 3))
    path = find_file(card, data, ["test.csv*", "*valid.csv*", "*.csv*"])
    rows = read_rows(path, ("question", "answer"))
    questions = np.stack([format.read(row["question"], place) for place, row in rows])
    answers = np.stack([format.read(row["answer"], place) for place, row in rows])
    nothing = _empty(format)
    sets = PuzzleSets(format, nothing, nothing, PuzzleSet(questions, answers), None)
    marks = [(str(row.get("source", "")), _hardness(row.get("rating") or row.get("guesses"))) for _, row in rows]
    return _Carded(card, PuzzleSetTask(card.name, sets), marks)


def _empty(format: PuzzleFormat) -> PuzzleSet:
    none: Cells = np.zeros((0, format.num_cells), dtype=np.uint8)
    return PuzzleSet(none, none)


def _hardness(rating: str | None) -> str:
    """A rating (backtracks or guesses) by powers of ten."""
    if rating is None or not rating.isdecimal():
        return ""
    return "0" if int(rating) == 0 else f"{10 ** (len(rating) - 1)}+"


def _recipe(card: TaskCard, data: Path | None) -> _Carded:
    return _Carded(card, load_puzzle_task(card.name))


# ---- the table -----------------------------------------------------------------------------------------------------

_ARC_SAMPLING = TaskSampling(0.6, 0.95, 32_768, 2)
_ONE = TaskSampling(0.0, 1.0, 32_768, 1)

TASKS: Sequence[TaskEntry] = (
    entry(
        "arc-agi-1",
        "ARC-AGI-1: the 400 public evaluation tasks (419 test inputs), exact grids, two attempts",
        419,
        _arc,
        metric="pass@2",
        sampling=_ARC_SAMPLING,
        license="Apache-2.0",
        source="arXiv 1911.01547; rule: ARC Prize; grids as JSON rows",
    ),
    entry(
        "arc-agi-2",
        "ARC-AGI-2: the 120 public evaluation tasks, exact grids, two attempts",
        None,
        _arc,
        metric="pass@2",
        sampling=_ARC_SAMPLING,
        license="Apache-2.0",
        source="arXiv 2505.11831; rule: ARC Prize; grids as JSON rows",
        how_to_get="git clone github.com/arcprize/ARC-AGI-2 and pass its folder data/evaluation as --data",
    ),
    entry(
        "sudoku-extreme",
        "Sudoku-Extreme: 9x9 puzzles of the hierarchical reasoning papers",
        None,
        _file,
        sampling=_ONE,
        license="see the data set card",
        source="arXiv 2506.21734, 2510.04871; any answer that keeps the rules",
        language="zxx",
        how_to_get="download test.csv of huggingface.co/datasets/sapientinc/sudoku-extreme and pass it as --data",
    ),
    entry(
        "maze-hard",
        "Maze-Hard: 30x30 mazes of the hierarchical reasoning papers",
        1000,
        _file,
        sampling=_ONE,
        license="see the data set card",
        source="arXiv 2506.21734, 2510.04871; any shortest way is right",
        language="zxx",
        how_to_get="download test.csv of huggingface.co/datasets/sapientinc/maze-30x30-hard-1k and pass it as --data",
    ),
    *(
        entry(
            name,
            f"puzzles of the recipe trm-{name}, the part for tests",
            None,
            _recipe,
            sampling=_ONE,
            license="Apache-2.0",
            source=find_recipe(f"trm-{name}").name,
            language="zxx",
        )
        for name in puzzle_task_names()
    ),
)
