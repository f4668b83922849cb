"""ARC grids on a canvas of fixed size, and other forms of a task: turned, mirrored, with other colours.

Tokens, the end marks around a grid, numbers of the turns and names of the forms are those of the official TRM code
(SamsungSAILMontreal/TinyRecursiveModels at e7b6871, `dataset/build_arc_dataset.py`), so that its files fit ours.

Shapes: a grid is [R, C], colours 0 to 9; a canvas has L cells, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np

from tafkir.data.puzzles.arc import ArcGrid, ArcTask
from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.errors import DataError

__all__ = [
    "END",
    "Form",
    "TaskForm",
    "arc_format",
    "crop",
    "draw_forms",
    "kept_turns",
    "parse_form",
    "place",
    "turn",
    "turn_back",
]

END = 1
"""The token of the row below a grid and of the column beside it, where the canvas goes on."""

_FIRST_COLOUR = 2
_NUM_COLOURS = 10
_SEPARATOR = "|||"
# Draws for each form that is wanted, before a task is taken to have no more.
_RETRIES = 5

TaskForm = str
"""A task's id, and in a form of it the turn and the colours: `abc`, `abc|||t3|||0213456789`."""


def arc_format(rows: int, columns: int) -> PuzzleFormat:
    """Tokens: padding, the end mark `#`, and the colours 0 to 9."""
    return PuzzleFormat(kind="arc", rows=rows, columns=columns, symbols=("", "#", *"0123456789"))


def place(grid: ArcGrid, rows: int, columns: int, top: int = 0, left: int = 0) -> Cells:
    """A grid on a canvas [L], with end marks below and to the right as far as there is room.

    Raises:
        DataError: it does not fit.
    """
    height, width = grid.shape
    if top + height > rows or left + width > columns:
        raise DataError(
            f"the grid is {height} x {width}",
            expected=f"at most {rows - top} x {columns - left}, the size of the canvas",
            fix="set trm.puzzles.canvas larger, or take a model for larger grids",
        )
    canvas = np.zeros((rows, columns), dtype=np.uint8)
    canvas[top : top + height, left : left + width] = grid + _FIRST_COLOUR
    canvas[top + height : top + height + 1, left : left + width] = END
    canvas[top : top + height, left + width : left + width + 1] = END
    return canvas.reshape(-1)


def crop(canvas: Cells, rows: int, columns: int) -> ArcGrid:
    """The largest rectangle from the top left that holds colours only; [0, 0] where the first cell is none.

    Of equally large ones the flattest.
    """
    cells = canvas.reshape(rows, columns)
    # Leading colours of each row, and the fewest of them down to it: how wide a rectangle of so many rows can be.
    widths = np.minimum.accumulate(np.cumprod(cells >= _FIRST_COLOUR, axis=1).sum(1))
    areas = widths * np.arange(1, rows + 1)
    height = int(areas.argmax()) + 1
    if not areas[height - 1]:
        return np.zeros((0, 0), dtype=np.uint8)
    return cells[:height, : widths[height - 1]] - np.uint8(_FIRST_COLOUR)


def turn(grid: ArcGrid, number: int) -> ArcGrid:
    """One of the eight turns and mirror images, counted as in the official code; 0 is none."""
    if number < 4:
        return np.rot90(grid, number)
    return (np.fliplr(grid), np.flipud(grid), grid.T, np.fliplr(np.rot90(grid)))[number - 4]


def turn_back(grid: ArcGrid, number: int) -> ArcGrid:
    """The inverse of `turn`: a quarter turn is undone by three, everything else by itself."""
    return turn(grid, {1: 3, 3: 1}.get(number, number))


def kept_turns(rows: int, columns: int) -> tuple[int, ...]:
    """The turns after which every grid of a canvas still fits it: all of a square, else those that keep rows rows."""
    return tuple(range(8)) if rows == columns else (0, 2, 4, 5)


class Form(NamedTuple):
    """Another form of a task: colour c becomes `colours[c]`, then the grid is turned."""

    turn: int = 0
    colours: tuple[int, ...] = tuple(range(_NUM_COLOURS))

    def apply(self, grid: ArcGrid) -> ArcGrid:
        """A grid in this form."""
        return turn(np.array(self.colours, dtype=np.uint8)[grid], self.turn)

    def undo(self, grid: ArcGrid) -> ArcGrid:
        """A grid of this form as it is in the task."""
        return np.argsort(self.colours).astype(np.uint8)[turn_back(grid, self.turn)]

    def name(self, task_id: str) -> TaskForm:
        """How the official code calls a task in this form."""
        if self == Form():
            return task_id
        return f"{task_id}{_SEPARATOR}t{self.turn}{_SEPARATOR}{''.join(map(str, self.colours))}"


def parse_form(name: TaskForm) -> tuple[str, Form]:
    """The task's id and its form, from such a name.

    Raises:
        DataError: it is no such name.
    """
    if _SEPARATOR not in name:
        return name, Form()
    task_id, _, rest = name.partition(_SEPARATOR)
    number, _, colours = rest.partition(_SEPARATOR)
    if number not in {f"t{i}" for i in range(8)} or sorted(colours) != list("0123456789"):
        raise DataError(f"{name!r} names no form of a task", expected="such as 'abc|||t3|||0213456789'")
    return task_id, Form(int(number[1:]), tuple(map(int, colours)))


def draw_forms(
    random: Random, task: ArcTask, count: int, *, turns: Sequence[int] = range(8), recolour: bool = True
) -> list[Form]:
    """The task itself, and up to `count` other forms that look different in demonstrations or test inputs.

    Args:
        turns: which turns may be drawn.
        recolour: whether colours 1 to 9 trade places.
    """
    forms, seen = [Form()], {_look(task, Form())}
    for _ in range(_RETRIES * count):
        if len(forms) > count:
            break
        colours = (0, *random.sample(range(1, _NUM_COLOURS), _NUM_COLOURS - 1)) if recolour else Form().colours
        form = Form(random.choice(turns), colours)
        look = _look(task, form)
        if look not in seen:
            seen.add(look)
            forms.append(form)
    return forms


def _look(task: ArcTask, form: Form) -> bytes:
    """What a solver sees of a task in a form."""
    grids = [grid for pair in task.train for grid in (pair.input, pair.output) if grid is not None]
    grids += [pair.input for pair in task.test]
    return b"|".join(bytes(shown.shape) + shown.tobytes() for shown in map(form.apply, grids))
