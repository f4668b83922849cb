"""Tables of recursive models come from finished runs alone, and a page without a place for them is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def collect(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/trm_ablations.py"), "--collect", "--runs-dir", str(tmp_path)]
    command += ["--out", str(tmp_path / "trm.json"), "--page", str(tmp_path / "page.md")]
    env = {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def finish(tmp_path: Path, name: str, exact: float) -> None:
    share = {"value": exact, "num_problems": 200}
    folder = tmp_path / name / "stages" / "10-trm"
    folder.mkdir(parents=True)
    test = {"exact": share, "cells": 0.99, "halting": {"exact": share, "mean_steps": 1.5}, "by_step": [0.1, exact]}
    rest = {"steps": 600, "wall_s": 30.0, "cpu_s": 20.0, "parameters": 80770, "peak_rss_bytes": 1}
    (folder / "result.json").write_text(json.dumps({**rest, "flops_per_supervision_step": 1.0, "test": test}))


def test_finished_runs_become_a_table(tmp_path: Path) -> None:
    for seed, exact in ((0, 1.0), (2, 0.9)):
        finish(tmp_path, f"trm-sudoku4-{seed}", exact)
    page = tmp_path / "page.md"
    page.write_text("before <!-- measured: written by benchmarks/trm_ablations.py -->old<!-- end --> after")
    done = collect(tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "trm.json").read_text())["rows"]
    assert row["seeds"] == [0, 2] and row["exact_median"] == 0.95 and row["exact_pooled"]["num_problems"] == 400
    text = page.read_text()
    assert "| `trm-sudoku4` | 95.0 % (92.4 to 96.7) | 100.0, 90.0 | 600 | 20 | 30 | 80,770 |" in text
    assert "old" not in text and text.startswith("before") and text.endswith("after")


def test_a_page_without_a_place(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("nothing here")
    done = collect(tmp_path)
    assert done.returncode != 0 and "has no place for the table" in done.stderr
