"""Accuracy against test-time compute: what rules pick never falls, and one run is the same everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import trm_compute
from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.data.puzzles.format import Cells
from tafkir.data.puzzles.rules import solve_by_rules
from tafkir.data.puzzles.sudoku import Box, sudoku_format
from tafkir.models import search
from tafkir.models.solving import Solved
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.runlog.rundir import RunDir

SHORT = (
    "threads=1",
    "report=",
    "trm.steps=1",
    "trm.batch_size=4",
    "trm.warmup_steps=0",
    "trm.validate_every=0",
    "trm.model.hidden_size=8",
    "trm.model.intermediate_multiple=8",
    "trm.model.max_supervision_steps=2",
    "trm.puzzles.num_train=8",
    "trm.puzzles.num_validation=2",
    "trm.puzzles.num_test=24",
)


def fortunate(model: object, inputs: Cells, *, steps: int | None = None, **_: object) -> Solved:
    """Answers rightly for three puzzles of ten, and is confident in half of those alone."""
    format, random = sudoku_format(Box(2, 2)), np.random.default_rng(len(inputs))
    right = np.stack([solve_by_rules(format, cells) for cells in inputs])
    lucky = random.random(len(inputs)) < 0.3
    answers = np.where(lucky[:, None], right, 1).astype(np.uint8)
    q = np.where(lucky & (random.random(len(inputs)) < 0.5), 3.0, -1.0).astype(np.float32)
    return Solved(np.stack([answers] * (steps or 2)), np.stack([q] * (steps or 2)))


def test_curves_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = resolve_recipe(load_recipe(["trm-sudoku4"], SHORT))
    run_recipe(loaded, RunDir(tmp_path / "run"), select_stages(loaded.recipe))
    monkeypatch.setattr(search, "solve_puzzles", fortunate)
    monkeypatch.setattr(trm_compute, "solve_puzzles", fortunate)
    out, picture = tmp_path / "result.json", tmp_path / "picture.svg"
    asked = ["--runs", "8", "--noise", "0.5", "--out", str(out), "--picture", str(picture)]
    trm_compute.main([str(tmp_path / "run"), *asked])
    result = json.loads(out.read_text())
    rows = {(r["variant"], r["pick"], r["compute"]): r for r in result["rows"]}
    assert result["puzzles"] == 24 and {compute for *_, compute in rows} == {1, 2, 4, 8}
    assert rows["longer", "last", 8]["value"] == rows["longer", "rules", 1]["value"] > 0, "a longer run is no luckier"
    for variant in ("noise 0.5", "permuted"):
        shares = {pick: [rows[variant, pick, n]["value"] for n in (1, 2, 4, 8)] for pick in ("q", "vote", "rules")}
        assert len({values[0] for values in shares.values()}) == 1, "one run has nothing to pick from"
        assert shares["rules"] == sorted(shares["rules"]) and shares["rules"][3] > 0.8
        assert shares["q"] == sorted(shares["q"]) and shares["rules"][3] > shares["q"][3] > shares["vote"][3]
        assert rows[variant, "q", 8]["flops_per_puzzle"] == 8 * rows[variant, "q", 1]["flops_per_puzzle"]
    assert picture.read_text().count('class="title"') == 3
