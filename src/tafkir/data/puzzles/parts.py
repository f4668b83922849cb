"""Puzzles by part, and the stream of training samples.

Shapes: N puzzles, L cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, NamedTuple, Protocol

import numpy as np

from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.symmetry import DrawSymmetry
from tafkir.recipe.seeds import derive_seed

__all__ = ["Pair", "PuzzleIds", "PuzzleSet", "PuzzleSets", "PuzzleStream", "SampleStream", "Samples"]

Pair = tuple[Cells, Cells]
"""Tokens of a question and of its answer, [L] each."""

PuzzleIds = np.ndarray[Any, np.dtype[np.int64]]
"""Rows of the table of puzzle vectors."""


class Samples(NamedTuple):
    """Training samples: questions and answers [n, L], and rows [n] of the table of puzzle vectors."""

    inputs: Cells
    labels: Cells
    puzzle_ids: PuzzleIds


class SampleStream(Protocol):
    """Training samples by number; a sample depends on its number alone."""

    def take(self, first: int, size: int) -> Samples: ...


@dataclass(frozen=True, slots=True)
class PuzzleSet:
    """Puzzles of one part: tokens [N, L] of questions and answers; PAD in an answer is a cell without a label.

    `puzzle_ids` [N] are rows of the table of puzzle vectors; None where all puzzles have row 0.
    """

    inputs: Cells
    labels: Cells
    puzzle_ids: PuzzleIds | None = None

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, slots=True)
class PuzzleSets:
    """All puzzles of a recipe, and how a puzzle is shown in another form."""

    format: PuzzleFormat
    train: PuzzleSet
    validation: PuzzleSet
    test: PuzzleSet
    draw_symmetry: DrawSymmetry | None

    @property
    def num_puzzle_ids(self) -> int:
        """Rows that the table of puzzle vectors needs."""
        return 1

    @property
    def identifiers(self) -> list[str] | None:
        """The name of each row of the table of puzzle vectors, where rows have names."""
        return None

    def counts(self) -> dict[str, int]:
        """Puzzles by part."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}

    def stream(self, *, augment: bool, seed: int) -> SampleStream:
        """Training samples by number, in the order and the forms that the seed says."""
        return PuzzleStream(self, augment=augment, seed=seed)


class PuzzleStream:
    """Training samples by number: whole epochs in shuffled order, each puzzle in a fresh form.

    A sample depends on the seed and its number alone, so a resumed run goes on with the samples it would have had.
    """

    def __init__(self, puzzles: PuzzleSets, *, augment: bool, seed: int) -> None:
        self._set, self._draw = puzzles.train, puzzles.draw_symmetry if augment else None
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def take(self, first: int, size: int) -> Samples:
        """The samples from number `first` on; a set by rules is one puzzle, so all have the puzzle vector 0."""
        inputs, labels = zip(*self._samples(first, size), strict=True)
        return Samples(np.stack(inputs), np.stack(labels), np.zeros(size, dtype=np.int64))

    def _samples(self, first: int, size: int) -> Iterator[Pair]:
        for number in range(first, first + size):
            epoch, place = divmod(number, len(self._set))
            index = self._order(epoch)[place]
            pair = self._set.inputs[index], self._set.labels[index]
            if self._draw is None:
                yield pair
                continue
            form = self._draw(Random(derive_seed(self._seed, "form", number)))
            yield form.apply(pair[0]), form.apply(pair[1])

    def _shuffle(self, epoch: int) -> list[int]:
        order = list(range(len(self._set)))
        Random(derive_seed(self._seed, "epoch", epoch)).shuffle(order)
        return order
