"""The numbers of ARC runs: of a finished one, of one that is still under way, and of tasks that it has never seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.trm_arc import main
from tafkir.checkpoint.trm import load_trm
from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.data.puzzles.arc import read_tasks
from tafkir.engine.arc import answer_tasks
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.runlog.rundir import RunDir
from tests.conftest import ROOT
from tests.data.test_arc import swap

SHORT = (
    "threads=1",
    "report=",
    "trm.steps=4",
    "trm.batch_size=8",
    "trm.warmup_steps=1",
    "trm.validate_every=2",
    "trm.save_every=2",
    "trm.select=last",
    "trm.model.hidden_size=16",
    "trm.model.puzzle_embedding_size=16",
    "trm.puzzles.num_validation=2",
)


def test_a_run_and_what_it_left_half_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.json").write_text(json.dumps({f"t{seed}": swap(seed) for seed in range(7)}))
    path = json.dumps(str(tmp_path / "own.json"))
    loaded = resolve_recipe(load_recipe(["trm-arc-mini"], [*SHORT, f"trm.puzzles.path={path}"]))
    run = RunDir(tmp_path / "run")
    result = run_recipe(loaded, run, select_stages(loaded.recipe))["trm"]
    submission = json.loads((run.stage("trm").path / "submission.json").read_text())
    assert result["arc"]["tasks"] == 5 == len(submission) and result["puzzles"]["puzzle_ids"] == 1 + 7 * 4
    solver = load_trm(run.stage("trm").checkpoint_dir)
    assert solver.identifiers is not None and solver.identifiers[1] == "t0"
    tasks = [task for task in read_tasks(str(tmp_path / "own.json")) if task.id in submission]
    answers = answer_tasks(solver, tasks)
    assert all(submission[t.id][0]["attempt_1"] == answers[t.id][0][0].grid.tolist() for t in tasks)
    out = tmp_path / "out.json"
    main([str(run.path), "--votes", "1", "4", "--out", str(out)])
    whole = json.loads(out.read_text())
    assert whole["rows"][1] == result["arc"] and whole["step"] == 4
    assert "| simple rules | 100.0 |" in capsys.readouterr().out
    shutil.rmtree(run.stage("trm").checkpoint_dir)
    main([str(run.path), "--votes", "4", "--out", str(out)])
    assert json.loads(out.read_text())["rows"][0] == result["arc"], "the last state holds the weights of the checkpoint"

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from benchmarks.trm_unseen_tasks import main as measure_unseen
    from benchmarks.trm_unseen_tasks import put_aside

    measure_unseen(["--run", str(run.path), "--steps", "2", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["trained_on"] == 7 and found["unseen"] > 1 and found["run"]["steps"] == 4
    rules, *ways = found["rows"]
    assert [row["steps"] for row in ways] == [0, 2, 2] and rules["pass_at_2"]["value"] > 0
    assert not any(ways[0]["over_mean_vectors"][key] for key in ("value", "low", "high"))
    seen, unseen = put_aside(tasks * 4)
    assert len(seen) == 18 and not unseen, "equal tasks on both sides leave nothing to score"
