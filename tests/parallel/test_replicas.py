"""The recursive model under torchrun: rows of the batch shared out, the same losses, and states for any number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tafkir.errors import RecipeError
from tafkir.recipe.load import load_recipe
from tafkir.recipe.parallel import ParallelSizes, check_parallel
from tests.parallel.ranks import run_ranks
from tests.parallel.test_trajectory import assert_same_rows
from tests.parallel.trm_jobs import train_recursively


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert_same_rows(found["rows"], wanted["rows"])
    assert found["drawn"] == wanted["drawn"]
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(
            found["weights"][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = train_recursively(tmp_path_factory.mktemp("alone"), {})
    halted = [row["train/halted"] for row in found["rows"]]
    assert 0 < halted[0] < 7 and len(set(halted)) > 1, "puzzles halt at different steps"
    return found


@pytest.mark.parametrize(
    "table",
    [{}, pytest.param({"micro_batches": 2}, marks=pytest.mark.slow)],
    ids=["whole", "micro-batches"],
)
def test_two_processes_follow_the_trajectory_of_one(
    table: dict[str, Any], alone: dict[str, Any], tmp_path: Path
) -> None:
    first, second = run_ranks(2, train_recursively, tmp_path, table)
    assert_same(first, alone)
    assert (first["held"], second["held"], second["rows"]) == (3, 4, None)
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items()), "copies agree"


@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)],
)
def test_another_number_of_processes_goes_on(before: int, after: int, alone: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(before, train_recursively, tmp_path, {}, stop=5)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000004.safetensors"]
    assert_same(run_ranks(after, train_recursively, tmp_path, {})[0], alone)


@pytest.mark.parametrize(
    ("sizes", "where"),
    [
        ({"expert": 2}, "parallel.expert_parallel"),
        ({"tensor": 2}, "parallel.tensor_parallel"),
        ({"data": 65}, "trm.batch_size"),
    ],
)
def test_what_cannot_be_shared_out(sizes: dict[str, int], where: str) -> None:
    with pytest.raises(RecipeError, match=where):
        check_parallel(load_recipe(["trm-sudoku4"]).recipe, ParallelSizes(**sizes))
    check_parallel(load_recipe(["trm-sudoku4"]).recipe, ParallelSizes(data=64))
