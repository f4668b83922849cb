"""What the planner recommends holds: its scripts run, and its layouts shard into the bytes that it said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tafkir.runlog.rundir import RunDir
from tests.conftest import Cli
from tests.e2e.conftest import rows_of_sums, write_jsonl
from tests.parallel.test_torchrun import RECIPE


@pytest.mark.slow
def test_a_planned_script_trains_on_two_processes(tmp_path: Path, here: Cli, cli_env: dict[str, str]) -> None:
    recipe = tmp_path / "many.toml"
    sums = write_jsonl(tmp_path / "sums.jsonl", rows_of_sums())
    recipe.write_text(RECIPE.partition("[trm]")[0].format(sums=str(sums)), encoding="utf-8")
    sizes = ("--tokens", "1e6", "--sequence", "128", "--batch-tokens", "4096")
    planned = here("plan", str(recipe), "--hardware", "cpu:2", "--train", *sizes, "--emit", "torchrun")
    assert planned.returncode == 0, planned.stderr
    assert "--nproc-per-node=2" in planned.stdout and "parallel.device=cpu" in planned.stdout
    env = {**cli_env, "PATH": f"{Path(sys.executable).parent}:{cli_env['PATH']}"}
    command = ["bash", "-c", planned.stdout, "train", "--set", "pretrain.steps=3", "--name", "planned"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    stage = RunDir(tmp_path / "runs" / "planned").stage("pretrain")
    assert (stage.read_result() or {})["steps"] == 3
