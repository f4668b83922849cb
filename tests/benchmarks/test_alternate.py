"""What the comparisons with TRL count, and that they run: each at its smallest."""

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


CHILD = """
import sys
from alternate import in_child, is_child, serve_child
if is_child():
    1 / ('"number": 0' not in sys.argv[2])
    serve_child(lambda number: {"half": 1 / number})
else:
    print(in_child(__file__, {"number": 2}))
    in_child(__file__, {"number": 0})
"""


def test_a_child_does_the_work_and_its_error_is_told(cli_env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(CHILD)
    env = cli_env | {"PYTHONPATH": f"{ROOT / 'benchmarks'}"}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "{'half': 0.5}\n"
    assert done.returncode == 1 and "failed:" in done.stderr and "ZeroDivisionError" in done.stderr


SCRIPTS = {
    "rl_vs_trl": "--sizes trial --repeats 1 --learning-steps 0 --backends eager --no-continuous-batching",
    "preference_vs_trl": "--repeats 1 --pairs 16 --data made_up",
    "reverse_n": "--seeds 1 --steps 2 --rates 1e-3 --start 0.0",
}


@pytest.mark.slow
def test_the_comparisons_run(cli_env: dict[str, str], tmp_path: Path) -> None:
    """At their smallest, two steps of each side."""
    pytest.importorskip("trl", reason="the comparison needs the dev extra")
    calls = [[name, *words.split(), "--out", str(tmp_path / name)] for name, words in SCRIPTS.items()]
    command = [sys.executable, str(Path(__file__).with_name("once.py")), json.dumps(calls)]
    env = cli_env | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    results = {name: json.loads((tmp_path / name).read_text()) for name in SCRIPTS}
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")] == list(results.values())
    assert len(results["preference_vs_trl"]["rows"]) == len(results["reverse_n"]["runs"]) == 3
    (row,) = results["rl_vs_trl"]["rows"]
    assert row["max_logit_difference"] < 1e-4
    assert set(row["sides"]) == {"ours", "ours+icepop", "trl"} and set(row["ratios"]) == {"ours", "ours+icepop"}
    assert all(side["samples_per_cpu_s"] > 0 and side["completion_tokens"] > 0 for side in row["sides"].values())
