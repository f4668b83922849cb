"""Bands of givens: each is as easy as it says, and FLOPs of training are those of the shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.trm_bands import main
from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.runlog.rundir import RunDir

SHORT = (
    "threads=1",
    "report=",
    "trm.steps=2",
    "trm.batch_size=4",
    "trm.warmup_steps=1",
    "trm.validate_every=0",
    "trm.model.hidden_size=8",
    "trm.puzzles.num_train=20",
    "trm.puzzles.num_validation=2",
    "trm.puzzles.num_test=4",
)


def test_a_run_by_bands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = resolve_recipe(load_recipe(["trm-sudoku4"], list(SHORT)))
    run = RunDir(tmp_path / "run")
    run_recipe(loaded, run, select_stages(loaded.recipe))
    main([str(run.path), "--bands", "0-0", "8-9", "--count", "6", "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    hard, easy = found["rows"]
    assert 4 <= hard["mean_givens"] <= 6 and 12 <= easy["mean_givens"] <= 15
    assert hard["exact"]["num_problems"] == easy["exact"]["num_problems"] == 6
    config = loaded.recipe.trm
    assert config is not None
    shape = config.model.for_puzzles(6, 16)
    assert found["train_flops"] == 2 * 4 * shape.flops_per_supervision_step(train=True)
    assert "| 8 to 9 |" in capsys.readouterr().out
