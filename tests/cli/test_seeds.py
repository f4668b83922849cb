"""`tafkir run --seeds`: one run for each seed, and what they have in common as median and spread."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median, stdev

import pytest

from tafkir.cli.run import run
from tafkir.cli.seeds import parse_seeds
from tafkir.errors import RecipeError
from tafkir.runlog.rundir import RunDir

TINY = (
    "threads=1", "report=", "trm.steps=2", "trm.batch_size=4", "trm.warmup_steps=1", "trm.log_every=1",
    "trm.validate_every=1", "trm.model.hidden_size=16", "trm.model.intermediate_multiple=8",
    "trm.model.max_supervision_steps=2", "trm.puzzles.num_train=6", "trm.puzzles.num_validation=2",
    "trm.puzzles.num_test=4",
)  # fmt: skip


def start(runs: Path, seeds: str, *, as_json: bool = False) -> None:
    given = {"only": None, "start": None, "dry_run": False, "name": None}
    run(["trm-sudoku4"], [*TINY], runs_dir=runs, as_json=as_json, seeds=seeds, **given)  # type: ignore[arg-type]


def test_seeds_run_apart_and_are_reported_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path, "0,3")
    shown = capsys.readouterr().out
    folder = tmp_path / "trm-sudoku4"
    stages = [RunDir(folder / f"seed-{seed}").stage("trm") for seed in (0, 3)]
    results = [json.loads((stage.path / "result.json").read_text()) for stage in stages]
    summary = json.loads((folder / "seeds.json").read_text())
    rows = {row["figure"]: row for row in summary["figures"]}
    cells = [result["test"]["cells"] for result in results]
    row = rows["test.cells"]
    assert row["values"] == cells and (row["median"], row["spread"]) == (median(cells), stdev(cells))
    assert rows["last train/loss"]["spread"] > 0, "seeds differ"
    assert rows["test.exact"]["kind"] == "score" and rows["wall_s"]["kind"] == "cost"
    assert {"low", "high"}.isdisjoint(name.rpartition(".")[2] for name in rows)
    assert "unseen puzzles solved" in shown and "seeds 0, 3" in shown
    page = (folder / "seeds.html").read_text()
    assert "seed 3" in page and "Unseen puzzles solved" in page and page.count("<svg") == 2, (
        "validation and loss, by seed"
    )
    # Another seed joins; the finished ones are not run again.
    before = (stages[0].path / "result.json").stat().st_mtime_ns
    start(tmp_path, "0,3,4", as_json=True)
    assert json.loads(capsys.readouterr().out)["seeds"] == [0, 3, 4]
    assert (stages[0].path / "result.json").stat().st_mtime_ns == before


def test_lists_of_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_seeds("0,1,2") == parse_seeds("0-2") == [0, 1, 2]
    for wrong in ("", "a", "1,1", "2-1", "-1"):
        with pytest.raises(RecipeError, match="no list of seeds"):
            parse_seeds(wrong)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="one process"):
        parse_seeds("0,1")
