"""Picture and JSON of the mismatch laboratory come from a run directory alone; what is not finished is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import ROOT
from tests.report.test_mismatch_page import make_lab

RECIPE = """\
name = "lab"
[model]
hidden_size = 16
[lab]
method = "mismatch"
steps = 20
learning_rate = 1e-3
"""


def test_a_run_becomes_a_table_a_json_and_pictures(tmp_path: Path) -> None:
    run = make_lab(tmp_path / "lab")
    run.recipe_path.write_text(RECIPE)
    (run.stage("lab").path / "variants/nvfp4-icepop-replay-seed1/result.json").unlink()
    page = tmp_path / "page.md"
    page.write_text("before <!-- measured: written by benchmarks/mismatch_lab.py -->old<!-- end --> after")
    command = [sys.executable, str(ROOT / "benchmarks/mismatch_lab.py"), str(run.path), "--figures", str(tmp_path)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "x.json"), "--docs", str(page)],
        env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| NVFP4 weights, GRPO | 12, 12, 1 diverged | 0.200, ± 0.014 |" in done.stdout
    (told,) = json.loads((tmp_path / "x.json").read_text())["runs"]
    assert (told["variants"], told["not_finished"], told["steps"]) == (9, 1, 20)
    rows = {(row["rollout"], row["loss"], row["replay"]): row for row in told["rows"]}
    grpo = rows["nvfp4", "grpo", False]
    assert grpo["survived"] == [12, 12] and len(grpo["diverged"]) == 1 and grpo["grad_norm_max"] == 40
    # Each repeat is held against the float32 rollouts of its own seed.
    assert grpo["share_of_float32"]["repeats"] == pytest.approx([0.19 / 0.79, 0.21 / 0.81])
    assert grpo["reward_in_training"][0] == pytest.approx({"best": 0.5, "last": 0.19})
    assert rows["nvfp4", "icepop", True]["repeats"] == 1
    picture = ElementTree.parse(tmp_path / "mismatch-lab-nvfp4.svg").getroot()
    assert len(picture.findall("{http://www.w3.org/2000/svg}svg")) == 4
    assert [path.name for path in tmp_path.glob("*.svg")] == ["mismatch-lab-nvfp4.svg"]
    text = page.read_text()
    assert text.startswith("before <!--") and text.endswith("<!-- end --> after") and "old" not in text
    assert "9 variants, 2 repeats at most, 0 CPU-minutes; 1 were not finished and are left out." in text
    assert "| NVFP4 weights | 25.0\u202f%, 2 of 2 collapsed | 95.0\u202f% |" in text
    # Student with one degree of freedom: 12.7 standard errors.
    best = "- NVFP4 weights, best first: **IcePop [0.5, 5] 95.0 % (94.2 to 95.8)**, GRPO 25.0 % ("
    assert best in text and "98 % of float32's reward is reached by none" in text
    assert "masks per mille of the tokens: 2.00 (NVFP4 weights)" in text
