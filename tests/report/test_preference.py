"""The page's part on preferences: what is there is shown with its interval, what is missing or damaged is a dash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tafkir.intervals import accuracy
from tafkir.report.collect import RunRecord, collect
from tafkir.report.markdown import render_markdown
from tafkir.report.preference import calibration_figure, guard_sentences, quality_rows, reliability_rows
from tafkir.report.render import render_html
from tafkir.runlog.rundir import RunDir

SHARE = accuracy([True] * 3 + [False]).to_dict()
HELDOUT = {
    "accuracy": SHARE,
    "calibration_error": SHARE,
    "reliability": [
        {"low": 0.5, "high": 0.6, "num_pairs": 8, "confidence": 0.55, "accuracy": SHARE},
        {"low": 0.9, "high": 1.0, "num_pairs": 4, "confidence": 0.95, "accuracy": SHARE},
    ],
    "length_bias": {
        "reward_length_correlation": -0.5,
        "margin_length_correlation": None,
        "longer_is_better": SHARE,
        "accuracy": {"chosen_longer": SHARE, "chosen_shorter": None, "matched": SHARE},
    },
}


def record(path: Path, reward: Any, rlhf: Any) -> RunRecord:
    run = RunDir.create(path)
    for kind, result in (("reward", reward), ("rlhf", rlhf)):
        stage = run.stage(kind)  # type: ignore[arg-type]
        stage.make()
        stage.result_path.write_text(json.dumps(result))
        stage.metrics_path.write_text('{"step": 1, "rlhf/reward": 0.5, "train/loss": 0.7}\n')
    return collect(run)


def test_measurements_stand_with_their_intervals_in_both_forms(tmp_path: Path) -> None:
    trip = {"step": 7, "reason": "the judge fell <b>"}
    found = record(tmp_path / "r", {"heldout": HELDOUT}, {"guard": {"stopped": "x", "trips": [trip]}})
    rows = quality_rows(found)
    assert rows[0][0] == "Accuracy" and "75.0" in rows[0][1] and rows[0][2] == "–"
    assert reliability_rows(found)[0][3] == "8"
    figure = calibration_figure(found)
    # Bins of a few pairs are left out; there is no judge.
    assert figure is not None and [line.name for line in figure.lines] == ["reward model", "calibrated"]
    assert figure.lines[0].points == [(pytest.approx(55.0), 0.75)]
    assert guard_sentences(found) == ["Step 7: the judge fell <b>.", "The guard ended the stage there."]
    page, text = render_html(found), render_markdown(found)
    for word in ("Calibration error", "chosen side shorter", "The guard ended the stage there."):
        assert word in page and word in text
    assert "fell <b>" not in page


@pytest.mark.parametrize("damaged", [{}, {"heldout": 3}, {"heldout": {"reliability": [1], "accuracy": "x"}}, None, []])
def test_damage_is_no_crash(damaged: Any, tmp_path: Path) -> None:
    found = record(tmp_path / "r", damaged, {"guard": {"trips": 5}})
    assert render_html(found) and render_markdown(found)
