"""What stands in docs/rlhf.md and docs/tasks.md comes from run directories alone, with intervals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tafkir.runlog.metrics import JsonlWriter
from tafkir.runlog.rundir import RunDir
from tests.conftest import ROOT
from tests.report.conftest import make_run
from tests.report.test_preference import HELDOUT


def with_preferences(run: RunDir) -> None:
    """A reward model, its judge, and RLHF that the guard stopped at its seventh step."""
    for kind, rows in (("reward", []), ("rlhf", [{"rlhf/reward": i / 10, "rlhf/kl": 0.5 * i} for i in range(1, 8)])):
        stage = run.stage(kind)  # type: ignore[arg-type]
        stage.make()
        with JsonlWriter(stage.metrics_path) as writer:
            for step, row in enumerate(rows, start=1):
                writer.append({"step": step, **row})
    run.stage("reward").write_result({"heldout": HELDOUT, "judge": {"heldout": HELDOUT}, "cpu_s": 12.0})
    trip = {"step": 7, "reason": "the KL towards the first policy is 11, over the budget"}
    run.stage("rlhf").write_result({"guard": {"stopped": "x", "trips": [trip]}, "cpu_s": 3.0})


def test_runs_become_sections_of_two_pages(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with_preferences(run)
    for page in ("rlhf.md", "tasks.md"):
        (tmp_path / page).write_text("# Page\n\nWords.\n")
    command = [sys.executable, str(ROOT / "benchmarks/rl_recipes.py"), "--rlhf", str(run.path), "--docs", str(tmp_path)]
    command += ["--puzzles", str(run.path), "--out", str(tmp_path / "x.json")]
    for _ in range(2):  # the second time there are marks, and what stands between them is replaced
        done = subprocess.run(
            command, env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "x.json").read_text())
    assert set(told) == {"benchmark", "rlhf", "puzzles"}
    assert told["rlhf"]["curves"]["rlhf: rlhf/reward"] == {"first": 0.3, "last": 0.5, "max": 0.7, "steps": 7}
    page = (tmp_path / "rlhf.md").read_text()
    assert page.startswith("# Page\n\nWords.\n\n## Measured\n\n<!-- measured") and page.count("## Measured") == 1
    assert "| accuracy on held-out pairs | 75.0 % (" in page
    assert "The guard: step 7: the KL towards the first policy is 11, over the budget." in page
    assert "| KL towards the first policy (nats a completion) | 1.5 | 2.5 | 3.5 |" in page
    difference = next(r for r in told["puzzles"]["differences"] if r["source"] == "all")
    assert f"{100 * difference['value']:+.1f} (" in (tmp_path / "tasks.md").read_text()
