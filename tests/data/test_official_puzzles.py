"""Folders of the official dataset builders: groups, puzzles and examples as their sampler sees them, and bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tafkir.data.puzzles.official import read_official
from tafkir.data.puzzles.sets import build_puzzles
from tafkir.errors import DataError
from tafkir.recipe.fingerprint import fingerprint_stages
from tafkir.recipe.load import load_recipe
from tafkir.recipe.puzzles import OfficialPuzzles

Groups = list[list[list[int]]]
"""Groups of puzzles of examples; an example is told by the number in all its cells."""


def write_half(folder: Path, groups: Groups, cells: int, vocab: int, ids: list[int] | None = None) -> None:
    """As `build_sudoku_dataset.py` and `build_arc_dataset.py` write one half."""
    folder.mkdir(parents=True)
    puzzles = [puzzle for group in groups for puzzle in group]
    examples = [example for puzzle in puzzles for example in puzzle]
    arrays = {
        "inputs": np.repeat(np.array(examples, dtype=np.uint8)[:, None], cells, axis=1),
        "labels": np.repeat(np.array(examples, dtype=np.uint8)[:, None], cells, axis=1) + 1,
        "puzzle_identifiers": np.array(ids or [0] * len(puzzles), dtype=np.int32),
        "puzzle_indices": np.cumsum([0, *map(len, puzzles)]).astype(np.int32),
        "group_indices": np.cumsum([0, *map(len, groups)]).astype(np.int32),
    }
    for name, array in arrays.items():
        np.save(folder / f"all__{name}.npy", array)
    metadata = {
        "seq_len": cells,
        "vocab_size": vocab,
        "pad_id": 0,
        "ignore_label_id": 0,
        "blank_identifier_id": 0,
        "num_puzzle_identifiers": max(ids, default=0) + 1 if ids else 1,
        "total_groups": len(groups),
        "mean_puzzle_examples": len(examples) / len(puzzles),
        "total_puzzles": len(puzzles),
        "sets": ["all"],
    }
    (folder / "dataset.json").write_text(json.dumps(metadata))


@pytest.fixture
def sudoku(tmp_path: Path) -> Path:
    """Five groups of a 4x4 Sudoku, three forms each, an example a form; the test half has one form."""
    write_half(tmp_path / "train", [[[10 * g + f] for f in range(3)] for g in range(5)], 16, 6)
    write_half(tmp_path / "test", [[[200]], [[201]], [[202]]], 16, 6)
    return tmp_path


def test_an_epoch_takes_one_form_of_every_group(sudoku: Path) -> None:
    sets = build_puzzles(OfficialPuzzles(path=str(sudoku), num_validation=2, num_test=2), 0)
    assert sets.format.box == (2, 2) and sets.num_puzzle_ids == 1
    assert sets.validation.inputs[:, 0].tolist() == [30, 40], "the last groups, which training never shows"
    assert sets.test.inputs[:, 0].tolist() == [200, 201]
    stream = sets.stream(augment=False, seed=1)
    epochs = [stream.take(3 * epoch, 3) for epoch in range(40)]
    seen = [sorted(epoch.inputs[:, 0] // 10) for epoch in epochs]
    assert seen == [[0, 1, 2]] * 40
    assert {int(cell) for epoch in epochs for cell in epoch.inputs[:, 0] % 10} == {0, 1, 2}
    assert all((epoch.labels == epoch.inputs + 1).all() for epoch in epochs)
    late = sets.stream(augment=False, seed=1).take(50, 7)
    assert (late.inputs == stream.take(50, 7).inputs).all(), "a sample depends on its number alone"


def test_puzzles_with_vectors_of_their_own(tmp_path: Path) -> None:
    """ARC: forms with several examples, of different numbers; ids 1 to 4; the test half has the same ids."""
    write_half(tmp_path / "train", [[[1, 2, 3], [4, 5, 6]], [[7, 8], [9, 10]]], 16, 12, [1, 2, 3, 4])
    write_half(tmp_path / "test", [[[101], [102]], [[103], [104]]], 16, 12, [1, 2, 3, 4])
    names = ["<blank>", "a", "a|||t1|||0123456789", "b", "b|||t0|||0213456789"]
    (tmp_path / "identifiers.json").write_text(json.dumps(names))
    sets = read_official(OfficialPuzzles(path=str(tmp_path), num_validation=1, num_test=2))
    assert sets.identifiers == names
    assert sets.format.kind == "arc" and sets.num_puzzle_ids == 5
    assert len(sets.validation) == 1 and len(sets.test) == 2
    for part in (sets.validation, sets.test):
        assert part.puzzle_ids is not None
        assert (part.inputs[:, 0] - 100 == part.puzzle_ids).all()
    owner = {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2, 7: 3, 8: 3, 9: 4, 10: 4}
    samples = sets.stream(augment=False, seed=0).take(0, 50)
    assert [owner[int(row[0])] for row in samples.inputs] == samples.puzzle_ids.tolist()
    for epoch in range(10):
        shown = samples.puzzle_ids[5 * epoch : 5 * epoch + 5].tolist()
        assert sorted(shown) in ([1, 1, 1, 3, 3], [1, 1, 1, 4, 4], [2, 2, 2, 3, 3], [2, 2, 2, 4, 4])


def test_a_published_maze(tmp_path: Path) -> None:
    for half in ("train", "test"):
        write_half(tmp_path / half, [[[1]], [[2]]], 25, 6)
    sets = read_official(OfficialPuzzles(path=str(tmp_path), num_validation=1))
    assert sets.format.kind == "maze" and (sets.format.rows, sets.format.columns) == (5, 5)


def test_folders_that_are_none(sudoku: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def message(path: Path) -> str:
        with pytest.raises(DataError) as caught:
            read_official(OfficialPuzzles(path=str(path)))
        return str(caught.value)

    empty = tmp_path_factory.mktemp("empty")
    assert "train/dataset.json: no such file" in message(empty)
    np.save(sudoku / "test" / "all__labels.npy", np.zeros((3, 15), dtype=np.uint8))
    assert "test: the arrays do not fit each other and dataset.json" in message(sudoku)
    (sudoku / "test" / "all__labels.npy").unlink()
    assert "all__labels.npy: no such file" in message(sudoku)
    (sudoku / "train" / "dataset.json").write_text("{}")
    assert "not as the dataset builders write it (KeyError('sets'))" in message(sudoku)
    for vocab, cells, words in (
        (7, 16, "7 symbols on 4 x 4 cells are no known kind"),
        (6, 15, "15 cells are no square"),
    ):
        folder = tmp_path_factory.mktemp("odd")
        for half in ("train", "test"):
            write_half(folder / half, [[[1]], [[2]]], cells, vocab)
        assert words in message(folder)


def test_a_recipe_with_such_a_folder(sudoku: Path, tmp_path: Path) -> None:
    """What lies in the folder is part of the fingerprint."""
    (tmp_path / "own.toml").write_text(f'name = "own"\n[trm]\n[trm.puzzles]\nkind = "official"\npath = "{sudoku}"\n')
    recipe = load_recipe([str(tmp_path / "own.toml")]).recipe
    assert recipe.trm is not None and recipe.trm.puzzles.num_cells is None
    before = fingerprint_stages(recipe, None)["trm"]
    (sudoku / "train" / "dataset.json").write_text("{}")
    assert fingerprint_stages(recipe, None)["trm"] != before
