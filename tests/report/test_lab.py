"""The laboratory's section: gaps between twins, means over repeats, and what a half-done lab shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tafkir.report.collect import RunRecord, collect
from tafkir.report.findings import headline
from tafkir.report.lab import lab_figures, lab_rows
from tafkir.report.markdown import render_markdown
from tafkir.report.render import render_html
from tafkir.runlog.metrics import JsonlWriter
from tafkir.runlog.rundir import RunDir, StageDir

RECIPE = 'name = "lab"\nthreads = 1\n[lab]\ndepths = [2, 8]\n[report]\n'
# How much better than plain, at the end, by repeat.
BETTER = {"plain": (0.0, 0.0), "hc": (0.02, 0.04), "mhc": (0.01, 0.03)}


def rows_of(kind: str, depth: int, seed: int) -> list[dict[str, Any]]:
    gain = {"plain": 1.0, "hc": 1.3**depth, "mhc": 1.01}[kind]
    rows = []
    for step in (5, 10, 15, 20):
        row: dict[str, Any] = {
            "step": step,
            "train/loss": 5 - step / 10 + seed - BETTER[kind][seed] * step / 20,
            "train/grad_norm": 9.5 if (kind, step) == ("hc", 10) else 0.5,
        }
        if step % 10 == 0:
            row["validation/loss"] = row["train/loss"] + 0.1
            if kind != "plain":
                profile = [gain ** (1 - i / (2 * depth)) for i in range(2 * depth)]
                peak = 2.0 if (kind, step) == ("hc", 10) else 1.0
                row |= {"gain/single": gain ** (1 / depth), "gain/composed": peak * gain, "gain/log_column": 0.25}
                row |= {f"gain/{n}_{w}": profile for n in ("single", "composed") for w in ("forward", "backward")}
        rows.append(row)
    return rows


def make_lab(path: Path) -> RunDir:
    run = RunDir.create(path)
    run.recipe_path.write_text(RECIPE)
    run.env_path.write_text("{}")
    stage = run.stage("lab")
    for kind in BETTER:
        for depth in (2, 8):
            for seed in (0, 1):
                own = StageDir(stage.path / "variants" / f"{kind}-{depth:03d}-seed{seed}", "lab")
                own.make()
                with JsonlWriter(own.metrics_path) as writer:
                    for row in rows_of(kind, depth, seed):
                        writer.append(row)
                own.write_result({"steps": 20, "cpu_s": 2.0 + 2 * seed, "diverged": None})
    stage.write_result({"finished": True, "steps": 240, "tokens": 1000, "wall_s": 30.0, "cpu_s": 36.0})
    return run


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return collect(make_lab(tmp_path / "lab"))


def test_the_table_compares_twins_and_averages_repeats(record: RunRecord) -> None:
    rows = {row[0].partition("\n")[0]: row[1:] for row in lab_rows(record.variants)}
    assert list(rows) == [f"{kind}, {depth} layers" for depth in (2, 8) for kind in ("plain", "HC", "mHC")]
    assert rows["plain, 8 layers"][:2] == ["3.600\n± 0.707", ""]
    assert rows["HC, 8 layers"][1] == "−0.030\n± 0.014" and rows["mHC, 8 layers"][1] == "−0.020\n± 0.014"
    assert rows["HC, 8 layers"][2:] == ["9.5", "1.30", "8.16\npeak 16.31", "0.25", "3 s"]
    assert rows["plain, 2 layers"][2:] == ["0.5", "–", "–", "–", "3 s"]


def test_every_figure_is_drawn(record: RunRecord) -> None:
    figures = {figure.name: figure for figure in lab_figures(record.variants)}
    per_depth = [f"{name}-{depth}" for depth in (2, 8) for name in ("gap", "grad-norm", "gain")]
    by_depth = ["gain-by-depth", "column-by-depth", "gap-by-depth"]
    assert list(figures) == [*by_depth, *per_depth, "single-by-sublayer", "composed-by-sublayer"]
    assert all(figure.chart.startswith("<svg") for figure in figures.values())
    hc = next(line for line in figures["gap-8"].lines if line.name == "HC")
    assert [step for step, _ in hc.points] == [5, 10, 15, 20]
    assert [gap for _, gap in hc.points] == pytest.approx([-0.03 * step / 20 for step in (5, 10, 15, 20)])
    assert [gain for _, gain in figures["gain-by-depth"].lines[0].points] == pytest.approx([2 * 1.3**2, 2 * 1.3**8])
    assert [len(line.points) for line in figures["composed-by-sublayer"].lines] == [16] * 4
    assert [line.name for line in figures["grad-norm-2"].lines] == ["plain", "HC", "mHC"]


def test_the_pages_say_what_was_found(record: RunRecord) -> None:
    head = headline(record)
    assert head.sentence == (
        "Across 8 layers the residual mappings amplify: hyper-connections up to 16.31 times, mHC up to 1.01 times."
    )
    assert "HC −0.030 ± 0.014, mHC −0.020 ± 0.014" in head.beside[0]
    page, text = render_html(record), render_markdown(record)
    assert 'id="lab"' in page and page.count("<figure") >= 11 and "Loss gap to plain, 8 layers" in page
    assert "## The laboratory of residuals" in text and "| HC, 8 layers |" in text


def test_a_half_done_lab_shows_what_is_there(tmp_path: Path) -> None:
    run = make_lab(tmp_path / "lab")
    variants = run.stage("lab").path / "variants"
    lost = {"steps": 10, "cpu_s": 1.0, "diverged": "lab step 11: the gradient norm is nan"}
    (variants / "hc-008-seed1" / "result.json").write_text(json.dumps(lost))
    for name in ("result.json", "metrics.jsonl"):
        (variants / "mhc-008-seed0" / name).unlink()
    (run.stage("lab").path / "result.json").unlink()
    record = collect(run)
    rows = {row[0] for row in lab_rows(record.variants)}
    assert {"HC, 8 layers\n1 of 2 diverged, after step 10", "mHC, 8 layers\n1 of 2 not finished"} <= rows
    assert "not finished" in headline(record).sentence
    assert 'id="lab"' in render_html(record) and "Stage lab is unfinished." in record.notes


def test_one_repeat_is_called_one(tmp_path: Path) -> None:
    run = make_lab(tmp_path / "lab")
    for folder in (run.stage("lab").path / "variants").glob("*-seed1"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert "one repeat of each variant, so small gaps prove nothing" in headline(collect(run)).beside[0]
