"""Symmetries of puzzles: other forms of the same puzzle, by moving cells and exchanging symbols.

Shapes: L cells, V symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from tafkir.data.puzzles.format import Cells

__all__ = ["DrawSymmetry", "Symmetry", "dihedral_moves", "draw_exchange", "identity"]

_Moves = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Symmetry:
    """Cell i of the new form is cell `moves[i]` of the old one, with symbol s shown as `symbols[s]`."""

    moves: _Moves
    symbols: Cells

    def apply(self, cells: Cells) -> Cells:
        """The new form of grids [..., L]."""
        return self.symbols[cells[..., self.moves]]

    def undo(self, cells: Cells) -> Cells:
        """The old form of what is given in the new one."""
        return np.argsort(self.symbols).astype(np.uint8)[cells][..., np.argsort(self.moves)]


DrawSymmetry = Callable[[Random], Symmetry]


def identity(num_cells: int, vocab_size: int) -> Symmetry:
    """Nothing changes."""
    return Symmetry(np.arange(num_cells), np.arange(vocab_size, dtype=np.uint8))


def dihedral_moves(rows: int, columns: int) -> list[_Moves]:
    """The turns and mirror images that keep a grid's size: eight of a square, four of other rectangles."""
    grid = np.arange(rows * columns).reshape(rows, columns)
    turned = [grid, grid[::-1], grid[:, ::-1], grid[::-1, ::-1]]
    if rows == columns:
        turned += [form.T for form in turned]
    return [form.flatten() for form in turned]


def draw_exchange(random: Random, vocab_size: int, tokens: Sequence[int]) -> Cells:
    """A table in which the given tokens trade places at random."""
    table = np.arange(vocab_size, dtype=np.uint8)
    table[list(tokens)] = random.sample(list(tokens), len(tokens))
    return table
