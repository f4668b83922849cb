"""The pictures and the JSON of docs/mhc-lab.md come from a run directory alone, and say what the run measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from tests.conftest import ROOT
from tests.report.test_lab import make_lab

RECIPE = """\
name = "lab"
[model]
hidden_size = 16
[model.residual]
num_streams = 4
[lab]
depths = [2, 8]
steps = 20
batch_sequences = 4
sequence_length = 16
learning_rate = 1e-3
"""


def test_a_run_becomes_a_table_a_json_and_two_pictures(tmp_path: Path) -> None:
    run = make_lab(tmp_path / "lab")
    run.recipe_path.write_text(RECIPE)
    command = [sys.executable, str(ROOT / "benchmarks/mhc_lab.py"), str(run.path), "--out", str(tmp_path / "x.json")]
    done = subprocess.run(
        [*command, "--figures", str(tmp_path)],
        env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| HC, 8 layers | 3.570 ± 0.693 | −0.030 ± 0.014 | 9.5 | 1.30 | 8.16 peak 16.31 |" in done.stdout
    (told,) = json.loads((tmp_path / "x.json").read_text())["runs"]
    assert told["tokens_per_step"] == 64 and told["cpu_s"] == 36.0
    assert [(row["layers"], row["kind"]) for row in told["rows"]] == [
        (depth, kind) for depth in (2, 8) for kind in ("plain", "hc", "mhc")
    ]
    deepest = told["rows"][4]
    assert abs(deepest["heldout_gap_to_plain"] + 0.03) < 1e-9 and deepest["grad_norm_peak"] == 9.5
    for name in ("gains", "loss"):
        picture = ElementTree.parse(tmp_path / f"mhc-lab-{name}.svg").getroot()
        assert len(picture.findall("{http://www.w3.org/2000/svg}svg")) == (4 if name == "gains" else 6)
