"""What the comparisons with TRL count, and that they run: two of them at their smallest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from alternate import pair_ratios
from reverse_n import GOAL, WINDOW, Race, Reached


def test_ratios_are_those_of_the_pairs() -> None:
    assert pair_ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "pairs": [2, 3, 1]}
    with pytest.raises(ValueError):
        pair_ratios([1.0], [1.0, 2.0])


def test_the_race_ends_with_the_step_whose_window_is_at_the_goal() -> None:
    race = Race()
    race.start()
    for reward in [1.0] * (WINDOW - 1) + [0.0] + [1.0] * (WINDOW - 1):
        race.step_ended(reward)
    with pytest.raises(Reached):
        race.step_ended(GOAL)
    found = race.result(True)
    assert (found["reached"], found["steps"], found["first_reward"]) == (True, 2 * WINDOW, 1.0)
    assert found["cpu_s"] == pytest.approx(found["cpu_s_per_step"] * 2 * WINDOW)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "rows"),
    [
        ("preference_vs_trl", "--repeats 1 --pairs 16 --data made_up", "rows"),
        ("reverse_n", "--seeds 1 --steps 2 --rates 1e-3 --start 0.0", "runs"),
    ],
)
def test_it_runs(script: str, options: str, rows: str, cli_env: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the comparison needs the bench extra")
    out = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *options.split(), "--out", str(out)]
    done = subprocess.run(command, env=cli_env, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result
    assert len(result[rows]) == 3
