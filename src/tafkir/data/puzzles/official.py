"""Datasets that the builders of the official TRM and HRM code have written: numpy arrays, read as they lie.

A folder holds `train/` and `test/`, each with `dataset.json` and arrays `all__<name>.npy`: `inputs`, `labels`,
`puzzle_identifiers`, `puzzle_indices` (puzzle p has the examples from the p-th index up to the next one) and
`group_indices` (group g has the puzzles from the g-th index up to the next one: forms of one puzzle).

Shapes: N examples, L cells.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tafkir.data.puzzles.canvas import arc_format
from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.maze import maze_format
from tafkir.data.puzzles.parts import PuzzleSet, PuzzleSets, Samples, SampleStream
from tafkir.data.puzzles.sudoku import Box, sudoku_format
from tafkir.errors import DataError
from tafkir.recipe.puzzles import OfficialPuzzles
from tafkir.recipe.seeds import derive_seed

__all__ = ["OfficialSets", "OfficialStream", "read_official"]

_FIX = "build the folder anew with the official code, or take the puzzles from their JSON or CSV files"
_SPLIT_FILES = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")

_Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class _Split:
    """One of the two halves: examples [N, L], mapped from disk, and whose they are."""

    inputs: Cells
    labels: Cells
    puzzle_ids: _Indices
    puzzles: _Indices
    groups: _Indices
    num_ids: int
    vocab_size: int

    def example_ids(self, examples: _Indices) -> _Indices:
        """Rows of the table of puzzle vectors of some examples."""
        return self.puzzle_ids[np.searchsorted(self.puzzles, examples, side="right") - 1]

    def take(self, examples: _Indices) -> PuzzleSet:
        return PuzzleSet(self.inputs[examples], self.labels[examples], self.example_ids(examples))


@dataclass(frozen=True, slots=True)
class OfficialSets(PuzzleSets):
    """A builder's folder; `split` is its training half, of which the first `num_groups` groups are trained on."""

    split: _Split
    num_groups: int
    names: tuple[str, ...] | None

    @property
    def identifiers(self) -> list[str] | None:
        return None if self.names is None else list(self.names)

    @property
    def num_puzzle_ids(self) -> int:
        return self.split.num_ids

    def stream(self, *, augment: bool, seed: int) -> SampleStream:
        return OfficialStream(self.split, self.num_groups, seed=seed)


def read_official(config: OfficialPuzzles) -> OfficialSets:
    """The puzzles of a builder's folder.

    Where puzzles have vectors of their own, as ARC tasks do, the first test examples choose the checkpoint; else the
    last groups of the training half, which are then not trained on.

    Raises:
        DataError: a file is missing, or contradicts another one.
    """
    folder = Path(config.path)
    train, test = _read_split(folder / "train"), _read_split(folder / "test")
    if train.inputs.shape[1] != test.inputs.shape[1] or train.vocab_size != test.vocab_size:
        raise DataError("train and test differ in their grids", where=str(folder), fix=_FIX)
    format = _format_of(train, str(folder / "train" / "dataset.json"))
    num_groups = len(train.groups) - 1
    if train.num_ids > 1:
        order = np.array(Random(0).sample(range(len(test.inputs)), len(test.inputs)))
        count = min(config.num_validation, len(order) // 2)
        validation, rest = test.take(order[:count]), test.take(order[count : count + config.num_test])
    else:
        num_groups -= min(config.num_validation, num_groups // 2)
        validation = train.take(train.puzzles[train.groups[num_groups:-1]])
        rest = test.take(np.arange(min(config.num_test, len(test.inputs))))
    shown = train.take(train.puzzles[train.groups[:num_groups]])
    names = _read_names(folder / "identifiers.json", train.num_ids) if format.kind == "arc" else None
    return OfficialSets(format, shown, validation, rest, None, train, num_groups, names)


def _read_split(folder: Path) -> _Split:
    where = folder / "dataset.json"
    try:
        metadata = json.loads(where.read_text(encoding="utf-8"))
        name = metadata["sets"][0]
        found = {key: np.load(folder / f"{name}__{key}.npy", mmap_mode="r") for key in _SPLIT_FILES}
        wanted = (int(metadata["seq_len"]), int(metadata["vocab_size"]), int(metadata["num_puzzle_identifiers"]))
    except FileNotFoundError as error:
        raise DataError("no such file", where=str(error.filename), fix=_FIX) from error
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"not as the dataset builders write it ({error!r})", where=str(where), fix=_FIX) from error
    inputs, labels = found["inputs"], found["labels"]
    ids, puzzles, groups = (np.asarray(found[key], dtype=np.int64) for key in _SPLIT_FILES[2:])
    fits = (
        inputs.ndim == 2
        and inputs.shape == labels.shape
        and inputs.shape[1] == wanted[0]
        and len(ids) == len(puzzles) - 1 == groups[-1]
        and puzzles[-1] == len(inputs)
        and (np.diff(puzzles) > 0).all()
        and (np.diff(groups) > 0).all()
        and 0 <= ids.min() <= ids.max() < wanted[2]
    )
    if not fits:
        raise DataError("the arrays do not fit each other and dataset.json", where=str(folder), fix=_FIX)
    return _Split(inputs, labels, ids, puzzles, groups, wanted[2], wanted[1])


def _read_names(path: Path, count: int) -> tuple[str, ...] | None:
    """The names of ARC forms by row, which answering needs; None where the folder lacks them."""
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read as JSON ({error})", where=str(path), fix=_FIX) from error
    if not isinstance(names, list) or len(names) != count:
        raise DataError("does not name every puzzle", where=str(path), expected=f"a list of {count} names", fix=_FIX)
    return tuple(map(str, names))


def _format_of(split: _Split, where: str) -> PuzzleFormat:
    """Told apart by the number of symbols: 6 of a maze, 12 of ARC, side + 2 of a Sudoku."""
    side = math.isqrt(split.inputs.shape[1])
    if side * side != split.inputs.shape[1]:
        raise DataError(f"{split.inputs.shape[1]} cells are no square", where=where, fix=_FIX)
    if split.vocab_size == side + 2:
        rows = max(rows for rows in range(1, math.isqrt(side) + 1) if side % rows == 0)
        return sudoku_format(Box(rows, side // rows))
    if split.vocab_size == 6:
        return maze_format(side, side)
    if split.vocab_size == 12:
        return arc_format(side, side)
    raise DataError(
        f"{split.vocab_size} symbols on {side} x {side} cells are no known kind of puzzle",
        where=where,
        expected="a Sudoku's (side + 2), a maze's (6) or ARC's (12)",
    )


class OfficialStream:
    """Training samples by number, drawn as the reference does: an epoch takes from every group one form, with all its
    examples. A sample depends on the seed and its number alone.
    """

    def __init__(self, split: _Split, num_groups: int, *, seed: int) -> None:
        self._split, self._num_groups, self._seed = split, num_groups, seed
        # Samples before each epoch: a form's number of examples may differ from that of another one.
        self._starts = [0]
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def take(self, first: int, size: int) -> Samples:
        """The samples from number `first` on."""
        examples = np.array([self._example(number) for number in range(first, first + size)])
        found = self._split.take(examples)
        assert found.puzzle_ids is not None
        return Samples(found.inputs, found.labels, found.puzzle_ids)

    def _example(self, number: int) -> int:
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        while epoch == len(self._starts) - 1 and number >= self._starts[-1] + len(self._order(epoch)):
            self._starts.append(self._starts[-1] + len(self._order(epoch)))
            epoch += 1
        return self._order(epoch)[number - self._starts[epoch]]

    def _shuffle(self, epoch: int) -> list[int]:
        random = Random(derive_seed(self._seed, "epoch", epoch))
        split, samples = self._split, []
        for group in random.sample(range(self._num_groups), self._num_groups):
            puzzle = random.randrange(int(split.groups[group]), int(split.groups[group + 1]))
            examples = range(int(split.puzzles[puzzle]), int(split.puzzles[puzzle + 1]))
            samples += random.sample(examples, len(examples))
        return samples
