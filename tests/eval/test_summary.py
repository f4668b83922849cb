"""Scores and differences from answers, against counting by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tafkir.errors import DataError
from tafkir.eval.metrics import accuracy, mcnemar_exact
from tafkir.eval.records import EvalRecord
from tafkir.eval.summary import difference_table, problem_scores, score_table, sources_of


def _answers(source: str, greedy: str, sampled: list[str]) -> list[EvalRecord]:
    """One problem a character of `greedy`; `c` correct, `w` wrong, `l` cut off; `sampled` holds one string a repeat."""
    outcomes: dict[str, Any] = {"c": "correct", "w": "wrong", "l": "length"}
    return [
        EvalRecord("", f"{source}{i}", source, repeat, "", "", outcomes[column[i]], 0.0, None, "1", "", 10, "stop")
        for i in range(len(greedy))
        for repeat, column in enumerate([greedy, *sampled])
    ]


RECORDS = [*_answers("a", "ccww", ["cwwl", "ccww"]), *_answers("b", "cw", ["cw", "cl"])]


def test_sources_count_problems() -> None:
    assert sources_of(RECORDS) == {"a": 4, "b": 2}


def test_greedy_and_sampled_answers_are_kept_apart() -> None:
    assert problem_scores(RECORDS, "greedy", "b") == {"b0": [1.0], "b1": [0.0]}
    assert problem_scores(RECORDS, "average", "a") == {
        "a0": [1.0, 1.0],
        "a1": [0.0, 1.0],
        "a2": [0.0, 0.0],
        "a3": [0.0, 0.0],
    }


def test_scores_by_hand() -> None:
    table = score_table(RECORDS)
    assert list(table) == ["all", "a", "b"]
    assert table["all"]["average"]["value"] == pytest.approx(5 / 12)
    assert table["a"]["average"]["value"] == pytest.approx(3 / 8)
    assert table["all"]["bootstrap"]["value"] == pytest.approx(5 / 12)
    assert table["all"]["greedy"] == accuracy([True, True, False, False, True, False]).to_dict()
    assert table["a"]["pass_at"] == {"1": pytest.approx(3 / 8), "2": pytest.approx(2 / 4)}
    assert table["all"]["outcomes"]["sampled"] == {"correct": 5, "wrong": 5, "length": 2}
    assert table["all"]["mean_tokens"] == 10


def test_differences_by_hand() -> None:
    after = [*_answers("a", "cccw", ["cccl", "ccww"]), *_answers("b", "cw", ["cw", "cl"])]
    rows = {(row["metric"], row["source"]): row for row in difference_table(RECORDS, after, ("sft", "rlvr"))}
    assert set(rows) == {(m, s) for m in ("average", "greedy") for s in ("all", "a", "b")}
    greedy = rows["greedy", "a"]
    assert (greedy["before"], greedy["after"]) == ("sft", "rlvr")
    assert (greedy["value"], greedy["wins"], greedy["losses"]) == (0.25, 1, 0)
    assert greedy["p_value"] == mcnemar_exact(1, 0)
    assert rows["average", "a"]["value"] == pytest.approx(2 / 8)
    assert rows["average", "b"]["value"] == 0


def test_a_baseline_has_no_sampled_difference() -> None:
    baseline = [record for record in RECORDS if record.repeat == 0]
    assert {row["metric"] for row in difference_table(baseline, RECORDS, ("sum", "rlvr"))} == {"greedy"}


def test_other_problems_are_refused_with_the_names_of_both_sides() -> None:
    with pytest.raises(DataError, match=r"sft against rlvr: .* answered on one side only"):
        difference_table(RECORDS, RECORDS[3:], ("sft", "rlvr"))
