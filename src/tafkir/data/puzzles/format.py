"""Grids as tokens: which symbols a kind of puzzle has, how large it is, and how it is read from text and shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from tafkir.errors import DataError

__all__ = ["PAD", "Cells", "PuzzleFormat"]

PAD = 0
"""The token of what lies outside a grid."""

Cells = np.ndarray[Any, np.dtype[np.uint8]]
"""Tokens of one grid [L], or of several [N, L], row by row."""

_FRAMES = str.maketrans("", "", "|+-─│┼")
_BLANKS = str.maketrans("0_*?", "....")


class PuzzleFormat(BaseModel):
    """Size and symbols of a kind of puzzle; stands in the checkpoint of what solves it.

    `symbols[t]` is the sign, one character, of token t; token 0 is the padding. `blank` is the sign of an empty cell
    where that is `.`, as in a Sudoku, whose boxes have `box` rows and columns. Of grids without known rules, `turns`
    says that turned and mirrored ones are the same puzzle, and `exchangeable` which tokens may trade places.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    symbols: tuple[str, ...] = Field(min_length=2)
    blank: Literal["."] | None = None
    box: tuple[int, int] | None = None
    turns: bool = False
    exchangeable: tuple[int, ...] = ()

    @property
    def num_cells(self) -> int:
        return self.rows * self.columns

    @property
    def vocab_size(self) -> int:
        """Tokens, the padding among them."""
        return len(self.symbols)

    def encode(self, cells: Sequence[str], where: str | None = None) -> Cells:
        """Tokens of the signs of a whole grid, row by row.

        Raises:
            DataError: the number of cells is another, or a sign is no symbol of this kind.
        """
        if len(cells) != self.num_cells:
            raise DataError(
                f"the grid has {len(cells)} cells",
                where=where,
                expected=f"{self.rows} x {self.columns} = {self.num_cells}",
            )
        tokens = {sign: token for token, sign in enumerate(self.symbols) if token != PAD}
        for place, sign in enumerate(cells):
            if sign not in tokens:
                row, column = divmod(place, self.columns)
                raise DataError(
                    f"unknown symbol {sign!r} in row {row + 1}, column {column + 1}",
                    where=where,
                    expected=f"one of {''.join(tokens)!r}",
                )
        return np.array([tokens[sign] for sign in cells], dtype=np.uint8)

    def read(self, text: str, where: str | None = None) -> Cells:
        """Tokens of a grid in text: rows on lines, or all cells on one.

        In a Sudoku `0`, `.`, `_`, `*` and `?` are blanks; spaces and frames of `|`, `-` and `+` are passed over. In a
        maze spaces are ways, and those at the end of a line may be missing.

        Raises:
            DataError: as `encode`.
        """
        return self.encode(self.signs(text), where)

    def signs(self, text: str) -> str:
        """The signs of a grid in text, row by row, however many; see `read`."""
        lines = [line for line in text.replace("\r", "").split("\n") if line]
        if self.kind == "maze" and len(lines) > 1:
            lines = [line.ljust(self.columns) for line in lines]
        cells = "".join(lines)
        if self.blank is None:
            return cells
        return "".join(cells.translate(_FRAMES).split()).translate(_BLANKS).upper()

    def show(self, tokens: Cells) -> str:
        """Rows of signs on lines; the padding is a space."""
        signs = [self.symbols[token] if token != PAD else " " for token in tokens.tolist()]
        return "\n".join("".join(signs[r * self.columns : (r + 1) * self.columns]) for r in range(self.rows))
