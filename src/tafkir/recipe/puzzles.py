"""Which puzzles a recipe trains on, told apart by `kind`. Imports without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from tafkir.recipe.tables import Positive, Table

__all__ = [
    "BUNDLED_TASKS",
    "ArcPuzzles",
    "GridPuzzles",
    "MazePuzzles",
    "OfficialPuzzles",
    "PuzzleTable",
    "Puzzles",
    "SudokuPuzzles",
]

BUNDLED_TASKS: Mapping[str, tuple[str, int]] = {
    "mini-arc": ("mini-arc/tasks.jsonl.gz", 149),
    "1d-arc": ("1d-arc/tasks.jsonl.gz", 901),
    "concept-arc": ("concept-arc/tasks.jsonl.gz", 160),
    "arc-agi-1/training": ("arc-agi-1/training.jsonl.gz", 400),
    "arc-agi-1/evaluation": ("arc-agi-1/evaluation.jsonl.gz", 400),
}
"""ARC-like tasks that ship with the package: their file below `tafkir/datasets/arc`, and how many they are."""

_MAX_SIDE = 16
_KIND = "Sudoku, mazes, grids of one's own without known rules, ARC tasks, or a dataset that the official code built."
_TASKS = "a set that ships with the package, a folder of JSON files, a JSON file of tasks by id, or JSON lines"
_PATH = "JSON, CSV or text file of puzzles of one's own; not set, they are made from the seed."


class PuzzleTable(Table):
    """How many puzzles there are, and whether training ones are varied.

    Puzzles of a file are shared out by what they look like: a tenth chooses the checkpoint, a fifth is measured on.
    """

    num_train: Positive = Field(1000, description="Training puzzles; of a file, at most.")
    num_validation: Positive = Field(200, description="Puzzles that choose the checkpoint; of a file, at most.")
    num_test: Positive = Field(500, description="Puzzles that are only measured on; of a file, at most.")
    augment: bool = Field(True, description="Show every training puzzle in a random symmetric form each time.")

    @property
    def num_cells(self) -> int | None:
        """Cells of a grid; None where only the file knows."""
        return None

    @property
    def paths(self) -> tuple[str, ...]:
        """The file, where there is one."""
        path: str | None = getattr(self, "path", None)
        return () if path is None else (path,)


class SudokuPuzzles(PuzzleTable):
    """Sudoku of any band shape: minimal puzzles from a seed with a few more givens, or a file of puzzles."""

    kind: Literal["sudoku"] = Field("sudoku", description=_KIND)
    path: str | None = Field(None, description=_PATH)
    box_rows: int = Field(2, ge=1, le=_MAX_SIDE, description="Rows of a box.")
    box_columns: int = Field(2, ge=1, le=_MAX_SIDE, description="Columns of a box; the side is rows x columns.")
    min_extra_givens: int = Field(0, ge=0, description="At least this many givens more than a minimal puzzle has.")
    max_extra_givens: int = Field(
        3, ge=0, description="Up to this many givens more than a minimal puzzle has, each number equally often."
    )

    @model_validator(mode="after")
    def _check_side(self) -> Self:
        if not 2 <= self.box_rows * self.box_columns <= _MAX_SIDE:
            raise ValueError(f"box_rows x box_columns must be 2 to {_MAX_SIDE}")
        if self.min_extra_givens > self.max_extra_givens:
            raise ValueError("min_extra_givens is larger than max_extra_givens")
        return self

    @property
    def num_cells(self) -> int:
        return (self.box_rows * self.box_columns) ** 2


class MazePuzzles(PuzzleTable):
    """Mazes with one shortest way; the answer is the grid with that way marked."""

    kind: Literal["maze"] = Field("maze", description=_KIND)
    path: str | None = Field(None, description=_PATH)
    rows: int = Field(11, ge=3, description="Height, walls included; odd where mazes are made.")
    columns: int = Field(11, ge=3, description="Width, walls included; odd where mazes are made.")
    min_path: int = Field(10, ge=1, description="Least number of moves from S to G in mazes that are made.")

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if self.path is None and not (self.rows % 2 and self.columns % 2):
            raise ValueError("rows and columns of mazes that are made must be odd")
        longest = (self.rows // 2) * (self.columns // 2) * 2 - 2
        if self.path is None and self.min_path > longest:
            raise ValueError(f"min_path is larger than {longest}, the longest way through all cells")
        return self

    @property
    def num_cells(self) -> int:
        return self.rows * self.columns


class GridPuzzles(PuzzleTable):
    """Any puzzles of one's own: input and output grids of one size, in a JSON or CSV file."""

    kind: Literal["grids"] = Field("grids", description=_KIND)
    path: str = Field(description="JSON list of {input, output} grids, or CSV with columns input and output.")
    turns: bool = Field(False, description="Turned and mirrored grids are the same puzzle.")
    exchangeable: str = Field(
        "", description="Symbols that may trade places throughout a puzzle, such as 123456789; empty for none."
    )


class ArcPuzzles(Table):
    """Tasks of ARC and its kin: each has a few demonstrations, and test inputs whose outputs are never trained on.

    Demonstrations of the tasks that are measured belong to training: a task is known by its puzzle vector.
    """

    kind: Literal["arc"] = Field("arc", description=_KIND)
    path: str = Field(description=f"Tasks that are measured: {_TASKS}.")
    train_paths: tuple[str, ...] = Field((), description=f"More tasks, trained on with all their pairs, each {_TASKS}.")
    num_validation: Positive = Field(40, description="Tasks whose test inputs choose the checkpoint.")
    num_test: Positive = Field(1000, description="Tasks that are only measured on, at most.")
    num_copies: int = Field(
        1000, ge=0, description="Other forms of each task, at most, each with a puzzle vector of its own."
    )
    dihedral: bool = Field(True, description="Forms are turned and mirrored, as far as the canvas keeps its size.")
    recolour: bool = Field(True, description="Forms have their colours 1 to 9 exchanged; 0 stays.")
    translate: bool = Field(True, description="Training pairs stand anywhere on the canvas, but one of each form.")
    canvas: tuple[Positive, Positive] | None = Field(
        None, description="Rows and columns that grids are laid on; not set, the fewest that hold every grid."
    )
    overlap: Literal["refuse", "exclude"] = Field(
        "refuse", description="Tasks of train_paths that share a pair with measured ones: an error, or left out."
    )
    num_votes: int = Field(0, ge=0, description="Forms of each test input that vote in measuring, at most; 0 is all.")

    @property
    def num_cells(self) -> int | None:
        """Cells of the canvas; None where only the tasks know."""
        return None if self.canvas is None else self.canvas[0] * self.canvas[1]

    @property
    def num_forms(self) -> int:
        """Forms of each task, at most: it and its copies."""
        return 1 + self.num_copies

    @property
    def num_voters(self) -> int:
        """Forms of a test input that vote, at most."""
        return min(self.num_votes or self.num_forms, self.num_forms)

    @property
    def expected_puzzle_ids(self) -> int:
        """Rows of the table of puzzle vectors, at most; a set that does not ship is taken to be all measured."""
        unknown = self.num_validation + self.num_test
        return 1 + self.num_forms * sum(BUNDLED_TASKS[p][1] if p in BUNDLED_TASKS else unknown for p in self.paths)

    @property
    def augment(self) -> bool:
        """Whether a training pair looks different each time."""
        return self.translate

    @property
    def paths(self) -> tuple[str, ...]:
        """All files and folders."""
        return (self.path, *self.train_paths)


class OfficialPuzzles(Table):
    """A folder that a dataset builder of the official TRM or HRM code has written: `train/`, `test/`, numpy arrays."""

    kind: Literal["official"] = Field("official", description=_KIND)
    path: str = Field(description="The builder's output folder, with train/dataset.json and test/dataset.json.")
    num_validation: Positive = Field(200, description="Examples that choose the checkpoint.")
    num_test: Positive = Field(2000, description="Test examples that are only measured on, at most.")

    @property
    def num_cells(self) -> int | None:
        """None: only the folder knows."""
        return None

    @property
    def augment(self) -> bool:
        """The arrays hold every form already."""
        return False

    @property
    def paths(self) -> tuple[str, ...]:
        """The folder."""
        return (self.path,)


def _kind(value: Any) -> str:
    """A table without a `kind` is a Sudoku's."""
    return str(value.get("kind", "sudoku") if isinstance(value, Mapping) else getattr(value, "kind", "sudoku"))


Puzzles = Annotated[
    Annotated[SudokuPuzzles, Tag("sudoku")]
    | Annotated[MazePuzzles, Tag("maze")]
    | Annotated[GridPuzzles, Tag("grids")]
    | Annotated[ArcPuzzles, Tag("arc")]
    | Annotated[OfficialPuzzles, Tag("official")],
    Discriminator(_kind),
]
"""What `[trm.puzzles]` may hold, told apart by `kind`."""
