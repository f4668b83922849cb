"""The report of a recursive model: its finding, its table, its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tafkir.report.collect import collect
from tafkir.report.findings import headline, key_facts
from tafkir.report.markdown import render_markdown
from tafkir.report.render import render_html
from tafkir.report.trm import trm_beside, trm_figures, trm_rows, trm_sentence
from tafkir.runlog.rundir import RunDir


def estimate(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "num_problems": 200, "method": "wilson"}


RESULT = {
    "steps": 30,
    "tokens": 480,
    "wall_s": 12.0,
    "parameters": 278_274,
    "test": {
        "puzzles": 200,
        "exact": estimate(0.985, 0.957, 0.995),
        "cells": 0.998,
        "by_step": [0.4, 0.9, 0.985],
        "halting": {
            "threshold": 0.0,
            "exact": estimate(0.97, 0.936, 0.986),
            "mean_steps": 1.75,
            "histogram": [80, 90, 30],
            "never": 4,
        },
    },
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    directory = RunDir.create(tmp_path / "solver")
    directory.recipe_path.write_text('name = "solver"\n[trm]\nsteps = 30\n', encoding="utf-8")
    stage = directory.stage("trm")
    stage.make()
    stage.write_result({"stage": "trm", "finished": True, **RESULT})
    rows = [
        {"step": i, "train/token_loss": 2 / i, "train/cells": 0.3, "validation/exact": i / 40} for i in range(1, 31)
    ]
    (stage.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (stage.path / "timings.jsonl").write_text("", encoding="utf-8")
    return directory


def plain(text: str) -> str:
    """Figures with plain spaces before their units."""
    return " ".join(text.split())


def test_what_is_said() -> None:
    assert plain(trm_sentence(RESULT)) == (
        "The recursive model solves 98.5 % of 200 unseen puzzles, every cell right (95 % interval 95.7 % to 99.5 %)."
    )
    early, steps = map(plain, trm_beside(RESULT))
    assert "needs 1.8 of 3 supervision steps and solves 97.0 %" in early
    assert steps == "After the first step 40.0 % are solved, after the last one 98.5 %."
    everywhere, halted = ([plain(cell) for cell in row] for row in trm_rows(RESULT))
    assert everywhere[1:] == ["98.5 %", "95.7 % to 99.5 %", "3", "200"] and "99.8 % of the cells" in everywhere[0]
    assert halted[3] == "1.8" and "4 never halt" in halted[0]
    sure = {**RESULT, "test": {**RESULT["test"], "surest": estimate(0.99, 0.964, 0.997)}}
    assert [plain(cell) for cell in trm_rows(sure)[1]][1:] == ["99.0 %", "96.4 % to 99.7 %", "3", "200"]
    points = {figure.name: figure.lines[0].points for figure in trm_figures(RESULT)}
    assert points["exact-by-step"] == [(1.0, 0.4), (2.0, 0.9), (3.0, 0.985)]
    assert points["halting-depth"] == [(1.0, 0.4), (2.0, 0.45), (3.0, 0.15)]


def test_nothing_measured_nothing_said() -> None:
    assert trm_sentence({}) == "" and trm_beside({}) == [] and trm_rows({}) == [] and trm_figures({"test": {}}) == []


def test_the_page_and_its_markdown(run: RunDir) -> None:
    record = collect(run)
    assert headline(record).sentence == trm_sentence(RESULT)
    assert ("Parameters", "278k") in [(fact.label, fact.value) for fact in key_facts(record)]
    page, text = render_html(record), render_markdown(record)
    for shown in ("The recursive model", "Solved by supervision step", "Where puzzles halt", "Right answers"):
        assert shown in page and shown in text
    assert page.count("<svg") >= 4
    assert "cannot be drawn" not in text


def test_a_stage_that_is_not_finished(run: RunDir) -> None:
    run.stage("trm").result_path.unlink()
    record = collect(run)
    assert "not finished" in headline(record).sentence
    assert "The recursive model" in render_html(record)


def test_tasks_whose_forms_vote() -> None:
    """Two attempts lead, beside what needs no learning."""
    share = {"low": 0.1, "high": 0.3, "num_problems": 109, "method": "wilson"}
    arc = {
        "tasks": 109,
        "forms": 8,
        "pass_at": {"1": {"value": 0.15, **share}, "2": {"value": 0.2, **share}, "5": {"value": 0.25, **share}},
        "baselines": {"copy": {"1": {"value": 0.02, **share}}, "rules": {"2": {"value": 0.12, **share}}},
    }
    result = {**RESULT, "arc": arc}
    assert plain(trm_sentence(result)) == (
        "The recursive model solves 20.0 % of 109 tasks in two attempts (95 % interval 10.0 % to 30.0 %); simple rules "
        "solve 12.0 %."
    )
    assert "without a vote of 8 forms" in plain(trm_beside(result)[0]) and len(trm_beside(result)) == 3
    rows = [[plain(cell) for cell in row] for row in trm_rows(result)]
    assert len(rows) == 7 and rows[5:] == [[plain(cell) for cell in row] for row in trm_rows(RESULT)]
    assert [row[0] for row in rows[:3]] == [
        f"{n} 8 forms of each task vote" for n in ("1 attempt", "2 attempts", "5 attempts")
    ]
    assert [row[1] for row in rows[:5]] == ["15.0 %", "20.0 %", "25.0 %", "12.0 %", "2.0 %"]
