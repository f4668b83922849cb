"""What is kept of a score: the ratio's interval against its definition, and a measurement from answers to verdict."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import DataError, RecipeError
from tafkir.eval.metrics import mean_interval, paired_ratio
from tafkir.eval.retention import RetentionSettings, Side, build_problems, measure_retention, verdict_of
from tafkir.recipe.bundled import find_checkpoint
from tafkir.records import Completion, Request


def scores(seed: int, size: int, keep: float) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    generator = random.Random(seed)
    before, after = {}, {}
    for i in range(size):
        skill = generator.betavariate(1, 1.5)
        before[str(i)] = [float(generator.random() < skill) for _ in range(4)]
        after[str(i)] = [float(generator.random() < skill * keep) for _ in range(4)]
    return before, after


def test_the_interval_holds_the_ratios_that_a_paired_test_would_not_refuse() -> None:
    before, after = scores(0, 120, 0.9)
    found = paired_ratio(before, after)
    assert found is not None and found.low < found.value < found.high
    for ratio, inside in ((found.low + 1e-6, True), (found.low - 1e-6, False), (found.high + 1e-6, False)):
        gaps = [sum(after[i]) / 4 - ratio * sum(before[i]) / 4 for i in before]
        interval = mean_interval(gaps)
        assert (interval.low <= 0 <= interval.high) is inside


def test_the_interval_covers_what_is_really_kept() -> None:
    """19 of 20 draws; with 400 of them between 92.5 and 97.5 %."""
    held = 0
    for seed in range(400):
        found = paired_ratio(*scores(seed, 60, 0.95))
        assert found is not None
        held += found.low <= 0.95 <= found.high
    assert 0.925 <= held / 400 <= 0.985


def test_the_edges_of_a_ratio() -> None:
    zero, one = {"a": [0.0], "b": [0.0]}, {"a": [1.0], "b": [0.0]}
    assert paired_ratio(zero, one) is None
    same = paired_ratio(one, one)
    assert same is not None and same.value == 1 and same.low < 1 < same.high
    few = paired_ratio({"a": [1.0], "b": [0.0], "c": [0.0]}, {"a": [0.0], "b": [1.0], "c": [1.0]})
    assert few is not None and few.low == 0 and math.isinf(few.high)
    with pytest.raises(DataError, match="one side only"):
        paired_ratio(one, {"a": [1.0]})


def test_a_verdict_needs_the_whole_interval() -> None:
    assert verdict_of({"value": 0.99, "low": 0.985}, 0.98) == "kept"
    assert verdict_of({"value": 0.99, "low": 0.95}, 0.98) == "not shown"
    assert verdict_of({"value": 0.97, "low": 0.95}, 0.98) == "below"
    assert verdict_of(None, 0.98) == "not shown"


class Answering:
    """Answers the box of whatever it is told to know; otherwise with two wrong tokens more."""

    def __init__(self, tokenizer: Tokenizer, known: dict[str, str]) -> None:
        self.tokenizer, self.known, self.asked = tokenizer, known, 0

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        for request in requests:
            self.asked += 1
            prompt = self.tokenizer.decode(list(request.prompt_ids))
            answer = next((a for question, a in self.known.items() if question in prompt), "-1 7")
            ids = [*self.tokenizer.encode(f"\\boxed{{{answer}}}"), self.tokenizer.turn_end_id]
            yield Completion(request.id, tuple(ids), (0.0,) * len(ids), "stop")


def test_from_answers_to_a_verdict_and_again_from_the_files(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(find_checkpoint("base-tiny"))
    rows = [
        {"id": str(i), "question": f"What is {i} and {i}?", "answer": str(2 * i), "split": "test"} for i in range(9)
    ]
    problems = tmp_path / "mine.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {str(row["question"]): str(row["answer"]) for row in rows}
    completers = [Answering(tokenizer, dict(list(known.items())[:count])) for count in (8, 6)]
    sides = [Side(name, name, lambda c=c: c) for name, c in zip(("before", "after"), completers, strict=True)]  # type: ignore[misc]
    settings = RetentionSettings(samples=1)

    def measure() -> dict[str, Any]:
        return measure_retention(str(problems), (sides[0], sides[1]), tokenizer, settings, tmp_path)

    found = measure()
    assert found["before"]["all"]["average"]["value"] == pytest.approx(8 / 9)
    assert found["retention"]["average"]["value"] == pytest.approx(6 / 8) and found["verdict"] == "below"
    assert found["retention"]["greedy"]["low"] < 0.75 < found["retention"]["greedy"]["high"]
    assert [one["id"] for one in found["changed"]] == ["mine/6", "mine/7"] or len(found["changed"]) == 2
    assert found["lengths"]["difference"]["value"] > 0 and found["lengths"]["cut_off_after"] == 0
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    asked = [c.asked for c in completers]
    assert asked == [18, 18] and measure() == found and [c.asked for c in completers] == asked


def test_tasks_by_name() -> None:
    task, examples = build_problems("wordmath", RetentionSettings(max_problems=2))
    assert {e.source for e in examples} == {"gsm8k", "svamp"} and len(examples) == 4
    task, examples = build_problems("countdown:2-3", RetentionSettings(max_problems=3))
    assert {e.source for e in examples} == {"countdown/2", "countdown/3"} and len(examples) == 6
    assert task.name == "countdown"
    with pytest.raises(RecipeError, match=r"no task 'mmlu'.*wordmath"):
        build_problems("mmlu", RetentionSettings())
    with pytest.raises(RecipeError, match="levels 1 to 6"):
        build_problems("countdown:9", RetentionSettings())
