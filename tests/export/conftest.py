"""Small recursive models, trained on nothing, with weights small enough that rounding does not grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tafkir.checkpoint.trm import TrmCheckpoint, load_trm, save_trm
from tafkir.data.puzzles.format import PuzzleFormat
from tafkir.data.puzzles.maze import maze_format
from tafkir.data.puzzles.sudoku import Box, sudoku_format
from tafkir.models.trm import build_trm
from tafkir.recipe.trm import TrmModelConfig

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_attention_heads": 2, "intermediate_multiple": 8, "prefix_length": 0,
    "num_recursions": 2, "num_latent_steps": 1, "max_supervision_steps": 3,
}  # fmt: skip

VARIANTS: dict[str, tuple[PuzzleFormat, dict[str, Any]]] = {
    "attention": (maze_format(5, 5), {"mixer": "attention"}),
    "mlp": (sudoku_format(Box(2, 2)), {"mixer": "mlp", "position_encoding": "none"}),
    "prefix": (
        sudoku_format(Box(2, 2)),
        {"mixer": "mlp", "position_encoding": "learned", "prefix_length": 3, "puzzle_embedding_size": 20},
    ),
    "two networks": (sudoku_format(Box(2, 2)), {"separate_networks": True, "gradient": "one_step", "prefix_length": 1}),
    "neighbours": (maze_format(5, 7), {"mixer": "neighbours"}),
    "one latent": (maze_format(5, 5), {"latents": "z"}),
}


def small_checkpoint(folder: Path, name: str = "mlp", num_puzzle_ids: int = 1, **lineage: Any) -> TrmCheckpoint:
    """One of the variants, saved and loaded again."""
    format, keys = VARIANTS[name]
    shape = TrmModelConfig(**SMALL | keys).for_puzzles(
        format.vocab_size, format.num_cells, num_puzzle_ids, grid_columns=format.columns
    )
    model = build_trm(shape, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
        # Fresh, the halting head says the same of everything.
        model.q_head.weight.copy_(torch.linspace(-1, 1, model.q_head.weight.numel()).view_as(model.q_head.weight))
        if model.puzzle_table is not None:
            model.puzzle_table.weight.copy_(torch.arange(num_puzzle_ids).unsqueeze(1) - 0.5)
    save_trm(folder / name, model, format, extra=lineage)
    return load_trm(folder / name)


@pytest.fixture
def solver(tmp_path: Path) -> TrmCheckpoint:
    """A solver of 4x4 Sudoku that has learned nothing."""
    return small_checkpoint(tmp_path)
