"""The efficiency card of a run's stages, in its report and in the Arabic page."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from tafkir.cli.main import app
from tafkir.recipe.hf_config import config_to_hf
from tafkir.recipe.presets import load_preset
from tafkir.report.collect import collect
from tafkir.report.run_card import run_card
from tafkir.report.stage import write_report
from tafkir.runlog.rundir import RunDir


def test_a_run_shows_what_the_answers_of_its_stages_cost(finished_run: RunDir) -> None:
    config = load_preset("qwen3-0.6b")
    folder = finished_run.stage("rlvr").checkpoint_dir
    folder.mkdir(parents=True, exist_ok=True)
    # what engines read of a quantized checkpoint says nothing of its shape
    (folder / "config.json").write_text(json.dumps(config_to_hf(config) | {"quantization_config": {}}))
    (folder / "model.safetensors").write_bytes(b"0" * 1000)
    record = collect(finished_run)
    found = run_card(finished_run, record.evaluation, record.recipe)
    assert found
    rows = {row["name"]: row for row in found["cards"][0]["rows"]}
    scores = record.evaluation["stages"]["rlvr"]["all"]
    assert rows["rlvr"]["accuracy"] == scores["greedy"] and rows["rlvr"]["tokens"] == scores["mean_tokens"]
    assert (rows["rlvr"]["parameters"], rows["rlvr"]["bytes"]) == (config.num_parameters(), 1000)
    # two a parameter and token, and attention over what was written before
    assert rows["rlvr"]["flops"] == pytest.approx(2 * config.num_parameters() * rows["rlvr"]["tokens"], rel=0.3)
    assert rows["sft"]["flops"] is None and rows["rlvr"]["best"] and not rows["sft"]["best"]
    write_report(finished_run)
    page = finished_run.report_html.read_text(encoding="utf-8")
    order = [page.index(f'<section id="{name}"') for name in ("accuracy", "differences", "card", "chains")]
    assert order == sorted(order) and "without its prompt" in page
    done = CliRunner().invoke(app, ["report", str(finished_run.path), "--language", "ar"])
    assert done.exit_code == 0, done.output
    arabic = (finished_run.path / "report.ar.html").read_text(encoding="utf-8")
    assert '<html lang="ar" dir="rtl">' in arabic and "كلفة الإجابات" in arabic and "ما الذي بقي" in arabic
    assert "<script" not in arabic and not re.search(r'(src|href)="(?!#|data:)', arabic)


def test_the_solver_stands_beside_the_stages(finished_run: RunDir) -> None:
    stage = finished_run.stage("trm")
    stage.make()
    exact = {"value": 0.9, "low": 0.8, "high": 0.95, "num_problems": 50, "method": "wilson"}
    stage.write_result({"test": {"exact": exact}, "parameters": 80_770, "flops_per_supervision_step": 1e6})
    puzzles = {"kind": "sudoku", "box_rows": 2, "box_columns": 2}
    recipe = {"trm": {"model": {"max_supervision_steps": 8}, "puzzles": puzzles}}
    found = run_card(finished_run, {}, recipe)
    assert found
    (card,) = found["cards"]
    assert card["task"] == "sudoku 4x4" and card["rows"][0]["accuracy"] == exact
    assert card["rows"][0]["flops"] == 8e6 and card["rows"][0]["parameters"] == 80_770
    record = collect(finished_run)
    both = run_card(finished_run, record.evaluation, recipe)
    assert both and [each["task"] for each in both["cards"]] == ["word_problems", "sudoku 4x4"]
