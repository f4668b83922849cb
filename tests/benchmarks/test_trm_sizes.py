"""Larger mazes: the same weights, without a trace of the size they were made for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.trm_sizes import main
from tafkir.checkpoint.trm import save_trm
from tafkir.data.puzzles.maze import maze_format
from tafkir.errors import DataError
from tafkir.models.trm import build_trm
from tafkir.recipe.trm import TrmModelConfig

NETWORK = TrmModelConfig(
    mixer="neighbours", hidden_size=8, intermediate_multiple=8, prefix_length=0, num_recursions=1, num_latent_steps=1
)


def test_a_model_on_larger_mazes(tmp_path: Path) -> None:
    small, large = (build_trm(NETWORK.for_puzzles(6, side * side), 0).eval() for side in (7, 9))
    tokens = torch.randint(1, 6, (2, 81), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (model(model.start(2), tokens).logits for model in (small.resized(9, 9), large))
    assert torch.equal(ours, theirs)
    with pytest.raises(DataError, match="made for grids of one size"):
        build_trm(NETWORK.model_copy(update={"mixer": "mlp"}).for_puzzles(6, 49), 0).resized(9, 9)

    save_trm(tmp_path / "seven", small, maze_format(7, 7))
    how = ["--sides", "7", "9", "--steps", "1", "2", "--count", "3", "--out", str(tmp_path / "out.json")]
    main([str(tmp_path / "seven"), *how])
    for row in json.loads((tmp_path / "out.json").read_text())["rows"]:
        assert row["exact"]["2"]["num_problems"] == 3 and row["mean_moves"] >= 2 * row["side"]
