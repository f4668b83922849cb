"""The section of the mismatch laboratory: what survived, shares of float32, charts, and what a half-done lab shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tafkir.report.collect import RunRecord, collect
from tafkir.report.findings import headline
from tafkir.report.markdown import render_markdown
from tafkir.report.mismatch_lab import (
    MISMATCH_HEAD,
    mismatch_figures,
    mismatch_groups,
    mismatch_matrix,
    mismatch_rows,
)
from tafkir.report.render import render_html
from tafkir.runlog.metrics import JsonlWriter
from tafkir.runlog.rundir import RunDir, StageDir

RECIPE = 'name = "lab"\nthreads = 1\n[lab]\nmethod = "mismatch"\n[report]\n'
STEPS = 20
# Reward at the end, and the step at which it collapses.
ENDS = {
    "float32-grpo-own": (0.8, None),
    "float32-icepop-own": (0.8, None),
    "nvfp4-grpo-own": (0.2, 12),
    "nvfp4-icepop-own": (0.76, None),
    "nvfp4-icepop-replay": (0.8, None),
}


def rows_of(name: str, seed: int) -> list[dict[str, Any]]:
    end, lost = ENDS[name]
    exact = name.startswith("float32")
    rows = []
    for step in range(1, STEPS + 1):
        row: dict[str, Any] = {"step": step, "rollout/reward_mean": 0.5 if step <= 10 else end + 0.02 * seed - 0.01}
        if step != 5:  # a step that taught nothing
            row |= {
                "train/grad_norm": 40.0 if lost == step else 1.0,
                "mismatch/abs_logprob_diff_mean": 0.0 if exact else 0.06,
                "mismatch/abs_logprob_diff_max": 0.0 if exact else 2.5,
                "mismatch/masked_fraction": 0.002 if "icepop" in name and not exact else 0.0,
            }
            if not exact:
                row["mismatch/expert_agreement"] = 1.0 if "replay" in name else 0.9
        rows.append(row)
    return rows


def make_lab(path: Path) -> RunDir:
    run = RunDir.create(path)
    run.recipe_path.write_text(RECIPE)
    run.env_path.write_text("{}")
    stage = run.stage("lab")
    for name, (_, lost) in ENDS.items():
        for seed in (0, 1):
            own = StageDir(stage.path / "variants" / f"{name}-seed{seed}", "lab")
            own.make()
            with JsonlWriter(own.metrics_path) as writer:
                for row in rows_of(name, seed):
                    writer.append(row)
            diverged = "the gradient norm is inf" if lost and seed else None
            reward = ENDS[name][0] + 0.02 * seed - 0.01
            result = {"survived": lost or STEPS, "diverged": diverged, "heldout_reward": reward}
            own.write_result({"steps": STEPS, "cpu_s": 2.0, **result})
    stage.write_result({"finished": True, "steps": 200, "tokens": 1000, "wall_s": 30.0, "cpu_s": 36.0})
    return run


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return collect(make_lab(tmp_path / "lab"))


def test_the_table_says_what_survived_and_what_it_reached(record: RunRecord) -> None:
    rows = {row[0].replace("\n", ", "): row[1:] for row in mismatch_rows(record.mismatch_variants)}
    assert list(rows) == [
        "float32, GRPO",
        "float32, IcePop [0.5, 5]",
        "NVFP4 weights, GRPO",
        "NVFP4 weights, IcePop [0.5, 5]",
        "NVFP4 weights, experts replayed, IcePop [0.5, 5]",
    ]
    assert all(len(row) == len(MISMATCH_HEAD) - 1 for row in rows.values())
    collapsed = rows["NVFP4 weights, GRPO"]
    assert collapsed[:4] == ["12, 12\n1 diverged", "0.200\n± 0.014", "25.0\u202f%", "40"]
    assert collapsed[4:] == ["0.0600", "2.5", "0.00 ‰", "90.0\u202f%"]
    assert rows["NVFP4 weights, IcePop [0.5, 5]"][:3] == ["2 of 2 to the end", "0.760\n± 0.014", "95.0\u202f%"]
    assert rows["NVFP4 weights, IcePop [0.5, 5]"][6] == "2.00 ‰"
    assert rows["NVFP4 weights, experts replayed, IcePop [0.5, 5]"][-1] == "100.0\u202f%"
    assert rows["float32, GRPO"][2] == "100.0\u202f%" and rows["float32, GRPO"][-1] == "–"


def test_a_small_table_says_what_each_loss_makes_of_each_kind_of_rollouts(record: RunRecord) -> None:
    head, rows = mismatch_matrix(record.mismatch_variants)
    assert head == ["Rollouts", "GRPO", "IcePop [0.5, 5]"]
    assert rows[1:] == [
        ["NVFP4 weights", "25.0\u202f%\n2 of 2 collapsed", "95.0\u202f%"],
        ["NVFP4 weights\nexperts replayed", "", "100.0\u202f%"],
    ]
    assert [title for title, _ in mismatch_groups(record.mismatch_variants)] == [
        "float32",
        "NVFP4 weights",
        "NVFP4 weights, experts replayed",
    ]


def test_four_charts_for_each_kind_of_rollouts(record: RunRecord) -> None:
    figures = {figure.name: figure for figure in mismatch_figures(record.mismatch_variants)}
    panels = ["reward", "grad-norm", "max-difference", "masked"]
    groups = ["float32-own", "nvfp4-own", "nvfp4-replay"]
    # A logarithmic axis has no place for differences of zero.
    drawn = [f"{p}-{g}" for g in groups for p in panels if f"{p}-{g}" != "max-difference-float32-own"]
    assert list(figures) == drawn
    assert all(figure.chart.startswith("<svg") for figure in figures.values())
    lines = {line.name: line for line in figures["reward-nvfp4-own"].lines}
    assert list(lines) == ["GRPO", "IcePop [0.5, 5]"]
    # The mean over repeats at every step.
    assert [value for _, value in lines["GRPO"].points][-1] == pytest.approx(0.2)
    assert [step for step, _ in figures["masked-nvfp4-own"].lines[0].points] == [s for s in range(1, 21) if s != 5]


def test_the_pages_say_what_was_found(record: RunRecord) -> None:
    head = headline(record)
    assert head.sentence == (
        "Trained on rollouts with NVFP4 weights, a model reaches 95.0\u202f% with IcePop [0.5, 5] and 25.0\u202f% with "
        "GRPO of the reward after float32 rollouts."
    )
    assert "GRPO 2 of 2, IcePop [0.5, 5] 0 of 4" in head.beside[0] and "NVFP4 weights" in head.beside[1]
    page = render_html(record)
    assert "The laboratory of mismatch" in page and page.count("<svg") >= 11
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page
    text = render_markdown(record)
    assert "## The laboratory of mismatch" in text and "NVFP4 weights: reward" in text
    assert "laboratory of residuals" not in page + text


def test_a_half_done_lab_is_shown(tmp_path: Path) -> None:
    run = make_lab(tmp_path / "lab")
    stage = run.stage("lab")
    stage.result_path.unlink()
    for name in ("nvfp4-icepop-own-seed0", "nvfp4-icepop-own-seed1"):
        (stage.path / "variants" / name / "result.json").unlink()
    record = collect(run)
    rows = {row[0]: row[1] for row in mismatch_rows(record.mismatch_variants)}
    assert rows["NVFP4 weights\nIcePop [0.5, 5]"] == "not finished"
    assert "not finished" in headline(record).sentence
    assert render_html(record) and render_markdown(record)
