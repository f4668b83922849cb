"""Which puzzles a recipe trains on, told apart by `kind`. Imports without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from tafkir.recipe.tables import Positive, Table

__all__ = ["GridPuzzles", "MazePuzzles", "PuzzleCounts", "Puzzles", "SudokuPuzzles"]

_MAX_SIDE = 16


class PuzzleCounts(Table):
    """How many puzzles are made, and whether training ones are varied."""

    num_train: Positive = Field(1000, description="Training puzzles.")
    num_validation: Positive = Field(200, description="Puzzles that choose the checkpoint.")
    num_test: Positive = Field(500, description="Puzzles that are only measured on.")
    augment: bool = Field(True, description="Show every training puzzle in a random symmetric form each time.")


class SudokuPuzzles(PuzzleCounts):
    """Sudoku of any band shape: minimal puzzles from a seed, with a few more givens."""

    kind: Literal["sudoku"] = Field("sudoku", description="Sudoku, mazes, or grids of one's own.")
    box_rows: int = Field(2, ge=1, le=_MAX_SIDE, description="Rows of a box.")
    box_columns: int = Field(2, ge=1, le=_MAX_SIDE, description="Columns of a box; the side is rows x columns.")
    max_extra_givens: int = Field(
        3, ge=0, description="Up to this many givens more than a minimal puzzle has, each number alike often."
    )

    @model_validator(mode="after")
    def _check_side(self) -> Self:
        if not 2 <= self.side <= _MAX_SIDE:
            raise ValueError(f"box_rows x box_columns must be 2 to {_MAX_SIDE}")
        return self

    @property
    def side(self) -> int:
        """Rows, columns and digits."""
        return self.box_rows * self.box_columns


class MazePuzzles(PuzzleCounts):
    """Mazes with one way only; the answer is the grid with that way marked."""

    kind: Literal["maze"] = Field("maze", description="Sudoku, mazes, or grids of one's own.")
    rows: int = Field(11, ge=5, description="Height, walls included; odd.")
    columns: int = Field(11, ge=5, description="Width, walls included; odd.")
    min_path: int = Field(10, ge=1, description="Least number of moves from S to G.")

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if not (self.rows % 2 and self.columns % 2):
            raise ValueError("rows and columns of a maze must be odd")
        longest = (self.rows // 2) * (self.columns // 2) * 2 - 2
        if self.min_path > longest:
            raise ValueError(f"min_path is larger than {longest}, the longest way through all cells")
        return self


class GridPuzzles(Table):
    """Puzzles of one's own: a JSON or CSV file of input and output grids."""

    kind: Literal["grids"] = Field("grids", description="Sudoku, mazes, or grids of one's own.")
    path: str = Field(description="JSON list of {input, output} grids, or CSV with columns input and output.")
    validation_share: float = Field(0.1, gt=0, lt=0.5, description="Share that chooses the checkpoint.")
    test_share: float = Field(0.2, gt=0, lt=0.5, description="Share that is only measured on.")
    augment: bool = Field(False, description="Show every training puzzle in a random symmetric form each time.")
    turns: bool = Field(False, description="Turned and mirrored puzzles are right, too (square grids).")
    exchangeable: str = Field("", description="Symbols that may trade places throughout a puzzle, such as 123456789.")


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
