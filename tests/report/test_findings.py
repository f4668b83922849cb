"""The headline and the tables say what the numbers say, good or bad."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tafkir.report.charts import signed_points
from tafkir.report.collect import collect
from tafkir.report.findings import (
    contamination_sentences,
    cost_rows,
    format_bytes,
    format_seconds,
    headline,
    key_facts,
)
from tafkir.runlog.rundir import RunDir

MakeRun = Callable[..., RunDir]


@pytest.mark.parametrize(
    ("gain", "verb", "tone"), [(0.12, "raised", "better"), (-0.12, "lowered", "worse"), (0.0, "did not", "same")]
)
def test_the_headline_is_honest(make_run: MakeRun, gain: float, verb: str, tone: str) -> None:
    record = collect(make_run(gain=gain))
    head = headline(record)
    assert head.tone == tone
    assert f"RLVR {verb}" in head.sentence
    row = next(row for row in record.evaluation["differences"] if (row["source"], row["metric"]) == ("all", "average"))
    assert f"({signed_points(row['value'])} points, 95 % interval {signed_points(row['low'])} to" in head.sentence


def test_a_run_with_one_scored_stage_says_how_good_it_is(make_run: MakeRun) -> None:
    head = headline(collect(make_run(stages=("pretrain", "sft"))))
    assert re.match(r"SFT answers \d+\.\d\u202f% of the held-out problems \(95 % interval ", head.sentence)


def test_a_run_that_is_not_finished_says_so(make_run: MakeRun) -> None:
    head = headline(collect(make_run(evaluate=False)))
    assert head.sentence == "This run is not finished: 3 of 4 stages are."


def test_a_recipe_without_evaluation_reports_its_loss(make_run: MakeRun) -> None:
    run = make_run(stages=("pretrain",), evaluate=False)
    text = run.recipe_path.read_text()
    run.recipe_path.write_text(text[: text.index("[sft]")])
    head = headline(collect(run))
    assert re.fullmatch(
        r"Pre-training brought down the validation loss: \d\.\d+ at first, \d\.\d+ at the end\.", head.sentence
    )
    assert "no evaluation" in head.beside[0]


@pytest.mark.parametrize(("bar", "words"), [(0.05, "is above"), (0.425, "cannot be told apart"), (0.9, "is below")])
def test_the_baseline_comparison_is_honest(finished_run: RunDir, bar: float, words: str) -> None:
    record = collect(finished_run)
    for by_source in record.evaluation["baselines"].values():
        by_source["all"]["value"] = bar
    assert any(f"RLVR {words}" in sentence for sentence in headline(record).beside)


def test_key_facts_add_up(finished_run: RunDir) -> None:
    facts = {fact.label: fact for fact in key_facts(collect(finished_run))}
    assert facts["Wall time"].value == format_seconds(171.2 + 132.9 + 204.6 + 88.0)
    assert facts["Peak memory"].value == "1.29 GB"
    assert facts["Parameters"].value.endswith("M")


def test_cost_rows_give_tokens_per_second(finished_run: RunDir) -> None:
    rows = {row[0]: row for row in cost_rows(collect(finished_run))}
    assert rows["RLVR"][3:5] == ["1,060,000", "3 min 25 s"]
    assert rows["RLVR"][6] == f"{round(1_060_000 / 204.6):,}"


def test_a_leak_is_not_hidden() -> None:
    check = {"ngram": 13, "num_train": 10, "num_heldout": 5, "removed": 0, "remaining": 3}
    assert "still finds 3 overlaps" in contamination_sentences(check)[0]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.84, "0.8 s"), (59.7, "60 s"), (903, "15 min 3 s"), (9000, "2 h 30 min"), (None, "–")]
)
def test_durations_read_well(seconds: float | None, words: str) -> None:
    assert format_seconds(seconds) == words


def test_sizes_read_well() -> None:
    assert [format_bytes(v) for v in (None, 12, 4_200, 1_288_490_188)] == ["–", "12 B", "4.2 kB", "1.29 GB"]
