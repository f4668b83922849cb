"""`make bench`: the page says what the results say, every command of the plan can be typed, and runs are kept apart."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from benchmarks_page import PAGE, pictures, render_page
from figures import Missing, Plan, find

PLAN = Plan.read()
DATA = {"rows": [{"a": "x, y", "n": [1, 3]}, {"a": "z", "n": [5], "only": 2}], "of": {"b": 4}}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("of/b", 4),
        ("of/b * 100", 400),
        ("rows[a=x, y]/n[1]", 3),
        ("rows[-1]/n[0] / 2", 2.5),
        ("max: rows[0]/n", 3),
        ("count: rows", 2),
        ("sum: rows/*/only", 2),
        ("sum: rows/*/nothing", 0),
        ("median: rows/*/n[0]", 3),
    ],
)
def test_paths(path: str, value: float) -> None:
    assert find(DATA, path) == value


@pytest.mark.parametrize("path", ["of/c", "rows[a=q]/n", "rows[5]", "of[0]", "max: rows/*/nothing"])
def test_paths_that_lead_nowhere(path: str) -> None:
    with pytest.raises(Missing):
        find(DATA, path)


def test_the_page_is_what_the_results_say() -> None:
    fix = "run: python benchmarks/run_all.py --write-page"
    stale = [step.name for step in PLAN.steps.values() if step.file.exists() and not step.is_stamped()]
    assert not stale, f"results without their day and commit: {stale}; {fix}"
    assert PAGE.read_text(encoding="utf-8") == render_page(PLAN), fix
    for path, text in pictures(PLAN).items():
        assert path.read_text(encoding="utf-8") == text, fix


def test_every_number_comes_from_a_results_file_and_what_falls_short_says_why() -> None:
    for figure in PLAN.figures:
        told = re.sub(r"\{[^}]*\}", "", figure.reached + figure.beside + figure.why)
        assert not re.search(r"(?<![\w@-])\d+\.?\d*(?=[\s,.;x)]|$)", told), f"{figure.id}: {told}"
        assert figure.state != "short" or figure.why, figure.id
    assert len({figure.id for figure in PLAN.figures}) == len(PLAN.figures)


def test_no_result_says_where_things_lie_on_a_machine() -> None:
    for path in (ROOT / "benchmarks" / "results").rglob("*.json"):
        found = re.search(r"[^\s\"=]*/(work|home|root|Users)/[^\s\"]*", path.read_text(encoding="utf-8"))
        assert not found, f"{path.name}: {found[0]}"


@pytest.mark.parametrize("name", PLAN.steps)
def test_commands_can_be_typed(name: str) -> None:
    step = PLAN.steps[name]
    if step.tests:
        assert all((ROOT / file).exists() for files in step.tests.values() for file in files.split())
        return
    script, *words = shlex.split(step.run)
    path = ROOT / f"{words[0].replace('.', '/')}.py" if script == "-m" else ROOT / script
    source = path.read_text(encoding="utf-8") + (ROOT / "benchmarks/alternate.py").read_text(encoding="utf-8")
    for option in (word for word in words if word.startswith("--")):
        looped = 'f"--{name}"' in source and f'"{option[2:]}"' in source
        assert f'"{option}"' in source or looped, option
    assert "{out}" in step.run or f"{Path(step.out).stem}" in source
    assert set(step.needs) <= set(PLAN.places)


SCRIPT = """
import json, pathlib, sys, time
out, what = sys.argv[1:3]
if what == "fails": raise SystemExit("no such luck")
if what == "hangs": time.sleep(60)
pathlib.Path(out).write_text(json.dumps({"v": 2.5, "argv": sys.argv, "python": sys.executable}))
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    steps = {"good": ("good {peer}", 1), "fails": ("fails", 1), "hangs": ("hangs", -0.49), "absent": ("x {other}", 1)}
    text = "[places]\npeer = 'a peer'\nother = 'another'\n"
    for name, (words, minutes) in steps.items():
        text += (
            f"[step.{name}]\nrun = '{tmp_path}/script.py {{out}} {words}'\nout = '{name}.json'\nminutes = {minutes}\n"
        )
    figure = "id = 'f'\nname = 'n'\nasked = 'a'\nstep = 'good'\nat = { v = 'v' }\nreached = '{v}'\nbounds = ['v >= 3']"
    (tmp_path / "plan.toml").write_text(
        f"{text}[[milestone]]\ntitle = 'm'\n[[milestone.figure]]\n{figure}\nwhy = 'w'\n"
    )
    (tmp_path / "results").mkdir()
    return tmp_path


def bench(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/run_all.py"), *options]
    command += ["--plan", str(folder / "plan.toml"), "--results", str(folder / "results")]
    env = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "TAFKIR_BENCH_PEER": "/elsewhere/peer"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_a_run_goes_on_after_failures_and_keeps_what_it_found(small: Path) -> None:
    done = bench(small)
    assert done.returncode == 1
    assert "FAILED: fails: exit code 1: no such luck" in done.stderr and "FAILED: hangs: ended after" in done.stderr
    assert "left out: absent: needs --with other=PATH (another)" in done.stdout
    found = (small / "results/good.json").read_text()
    assert "PEER" in found and "/elsewhere" not in found and sys.executable not in found
    assert json.loads(found)["argv"][1] == "benchmarks/results/good.json"
    stamp = json.loads((small / "results/bench/good.json").read_text())
    assert stamp["seconds"] >= 0 and len(stamp["load"]) == 2 and stamp["machine"]["cores_logical"] and stamp["commit"]
    assert sorted(path.name for path in (small / "results").iterdir()) == ["bench", "good.json"]

    (figure,) = Plan.read(small / "plan.toml", small / "results").figures
    assert figure.state == "short" and "**2.5**; short: w" in figure.row()
    again = bench(small, "--continue", "--only", "good")
    assert again.returncode == 0 and "left out: good: measured 20" in again.stdout


def test_what_cannot_be_run_is_refused(small: Path) -> None:
    assert "not in the plan" in bench(small, "--only", "nothing").stderr
    assert "expected NAME=PATH" in bench(small, "--with", "peer").stderr
    assert "no time left" in bench(small, "--minutes", "0.5", "--only", "good").stdout
