"""The comparison with TRL runs: two steps of each side, on the smallest model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("trl", reason="the comparison needs the bench extra")


@pytest.mark.slow
def test_two_steps_of_each_side(cli_env: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "rl_vs_trl.py"), "--sizes", "trial", "--repeats", "1"]
    command += ["--learning-steps", "0", "--backends", "eager"]
    command += ["--no-continuous-batching", "--out", str(out)]
    done = subprocess.run(command, env=cli_env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result
    (row,) = result["rows"]
    assert row["max_logit_difference"] < 1e-4
    assert set(row["sides"]) == {"ours", "ours+icepop", "trl"}
    assert all(side["samples_per_cpu_s"] > 0 and side["completion_tokens"] > 0 for side in row["sides"].values())
    assert set(row["ratios"]) == {"ours", "ours+icepop"}
