"""Which puzzles a recipe trains on, told apart by `kind`. Imports without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from tafkir.recipe.tables import Positive, Table

__all__ = ["GridPuzzles", "MazePuzzles", "PuzzleTable", "Puzzles", "SudokuPuzzles"]

_MAX_SIDE = 16
_KIND = "Sudoku, mazes, or grids of one's own without known rules."
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


class SudokuPuzzles(PuzzleTable):
    """Sudoku of any band shape: minimal puzzles from a seed with a few more givens, or a file of puzzles."""

    kind: Literal["sudoku"] = Field("sudoku", description=_KIND)
    path: str | None = Field(None, description=_PATH)
    box_rows: int = Field(2, ge=1, le=_MAX_SIDE, description="Rows of a box.")
    box_columns: int = Field(2, ge=1, le=_MAX_SIDE, description="Columns of a box; the side is rows x columns.")
    max_extra_givens: int = Field(
        3, ge=0, description="Up to this many givens more than a minimal puzzle has, each number equally often."
    )

    @model_validator(mode="after")
    def _check_side(self) -> Self:
        if not 2 <= self.box_rows * self.box_columns <= _MAX_SIDE:
            raise ValueError(f"box_rows x box_columns must be 2 to {_MAX_SIDE}")
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


def _kind(value: Any) -> str:
    """A table without a `kind` is a Sudoku's."""
    return str(value.get("kind", "sudoku") if isinstance(value, Mapping) else getattr(value, "kind", "sudoku"))


Puzzles = Annotated[
    Annotated[SudokuPuzzles, Tag("sudoku")]
    | Annotated[MazePuzzles, Tag("maze")]
    | Annotated[GridPuzzles, Tag("grids")],
    Discriminator(_kind),
]
"""What `[trm.puzzles]` may hold, told apart by `kind`."""
