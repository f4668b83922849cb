"""Running a task: the plan, the seeds, the records, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.engine import Engine
from tafkir.errors import DataError, RunDirError
from tafkir.eval.records import EvalRecord, load_records
from tafkir.eval.run import evaluate
from tafkir.records import Example, Request
from tafkir.tasks.math import WordProblems

Scripted = Callable[..., Any]


def _run(completer: Any, tokenizer: Tokenizer, examples: list[Example], path: Path, **changes: Any) -> list[EvalRecord]:
    options = {"samples": 3, "temperature": 0.8, "max_tokens": 24, "seed": 5, "fingerprint": "w1", **changes}
    return evaluate(completer, tokenizer, WordProblems(), examples, path=path, **options)


def _right_when_greedy(request: Request) -> str:
    return "<think>\n7-2=5\n</think>\n\\boxed{5}" if request.params.temperature == 0 else "I cannot say"


def test_every_example_gets_one_greedy_and_k_sampled_answers(
    scripted: Scripted, tokenizer: Tokenizer, examples: list[Example], tmp_path: Path
) -> None:
    completer = scripted(_right_when_greedy)
    records = _run(completer, tokenizer, examples, tmp_path / "a.jsonl")
    assert [(r.example_id, r.repeat) for r in records] == [(e.id, k) for e in examples for k in range(4)]
    assert [r.params.temperature for r in reversed(completer.seen)] == [0.0, 0.8, 0.8, 0.8] * 6
    assert all(r.params.max_tokens == 24 for r in completer.seen)
    first = records[0]
    assert (first.outcome, first.extracted, first.expected) == ("correct", "5", "5")
    assert {r.outcome for r in records if r.repeat} == {"no_answer"}
    assert records[4].outcome == "correct" and records[8].outcome == "wrong"


def test_every_sampled_answer_has_a_seed_of_its_own(
    scripted: Scripted, tokenizer: Tokenizer, examples: list[Example], tmp_path: Path
) -> None:
    completer = scripted(_right_when_greedy)
    _run(completer, tokenizer, examples, tmp_path / "a.jsonl")
    seeds = {r.id: r.params.seed for r in completer.seen if r.params.temperature > 0}
    assert len(set(seeds.values())) == 18
    # The stream belongs to the example, not to its place: fewer examples draw the same.
    fewer = scripted(_right_when_greedy)
    _run(fewer, tokenizer, examples[3:], tmp_path / "b.jsonl")
    again = {r.id: r.params.seed for r in fewer.seen if r.params.temperature > 0}
    assert len(again) == 9 and all(seeds[key] == seed for key, seed in again.items())
    other = scripted(_right_when_greedy)
    _run(other, tokenizer, examples, tmp_path / "c.jsonl", seed=6)
    assert not set(seeds.values()) & {r.params.seed for r in other.seen if r.params.temperature > 0}


def test_a_cut_off_answer_is_an_outcome_of_its_own(
    scripted: Scripted, tokenizer: Tokenizer, examples: list[Example], tmp_path: Path
) -> None:
    records = _run(scripted(lambda r: "1+1=2\n" * 50), tokenizer, examples, tmp_path / "a.jsonl")
    assert {r.outcome for r in records} == {"length"}
    assert {r.finish_reason for r in records} == {"length"}
    assert {r.tokens for r in records} == {24}


def test_rows_hold_what_the_report_needs(
    scripted: Scripted, tokenizer: Tokenizer, examples: list[Example], tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "a.jsonl"
    records = _run(scripted(_right_when_greedy), tokenizer, examples, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 24
    assert rows[0]["question"] == examples[0].question
    assert rows[0]["text"] == "<think>\n7-2=5\n</think>\n\\boxed{5}"
    assert load_records(path) == records


def test_answers_that_are_there_are_not_asked_for_again(
    scripted: Scripted, tokenizer: Tokenizer, examples: list[Example], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    first = _run(scripted(_right_when_greedy), tokenizer, examples, path)
    content = path.read_bytes()
    silent = scripted(_right_when_greedy)
    assert _run(silent, tokenizer, examples, path) == first
    assert silent.seen == [] and path.read_bytes() == content


@pytest.mark.parametrize(
    "changes", [{"fingerprint": "w2"}, {"seed": 6}, {"temperature": 0.7}, {"max_tokens": 25}, {"samples": 2}]
)
def test_other_inputs_are_other_answers(
    scripted: Scripted, tokenizer: Tokenizer, examples: list[Example], tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tmp_path / "a.jsonl"
    _run(scripted(_right_when_greedy), tokenizer, examples, path)
    again = scripted(lambda r: "other")
    records = _run(again, tokenizer, examples, path, **changes)
    asked = {r.id for r in again.seen}
    assert len(load_records(path)) == len(records) == 6 * (changes.get("samples", 3) + 1)
    if "samples" not in changes:
        # A seed or temperature is nothing to a greedy answer, yet the batch is redone whole.
        assert len(asked) == 24


@pytest.mark.parametrize("tail", ["", '{"key": "half', "\n"])
def test_a_broken_evaluation_goes_on(
    scripted: Scripted, tokenizer: Tokenizer, examples: list[Example], tmp_path: Path, tail: str
) -> None:
    whole = _run(scripted(_right_when_greedy), tokenizer, examples, tmp_path / "whole.jsonl", batch_requests=5)
    path = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        _run(scripted(_right_when_greedy, 13), tokenizer, examples, path, batch_requests=5)
    assert len(load_records(path)) == 10
    if tail != "\n":
        with path.open("a") as file:
            file.write(tail)
    second = scripted(_right_when_greedy)
    assert _run(second, tokenizer, examples, path, batch_requests=5) == whole
    assert len(second.seen) == 14
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_batch_with_a_missing_row_is_redone_whole(
    scripted: Scripted, tokenizer: Tokenizer, examples: list[Example], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    _run(scripted(_right_when_greedy), tokenizer, examples, path, batch_requests=5)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]))
    second = scripted(_right_when_greedy)
    _run(second, tokenizer, examples, path, batch_requests=5)
    assert len(second.seen) == 19 and path.read_bytes() == content


def test_the_engine_gives_the_same_file_twice(
    engine: Engine, tokenizer: Tokenizer, examples: list[Example], tmp_path: Path
) -> None:
    first = _run(engine, tokenizer, examples, tmp_path / "a.jsonl", max_tokens=10)
    _run(engine, tokenizer, examples, tmp_path / "b.jsonl", max_tokens=10)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    texts = {r.text for r in first if r.repeat and r.example_id == "p0"}
    assert len(texts) == 3, "the repeats of one problem are not different samples"


def test_a_malformed_row_is_named(
    scripted: Scripted, tokenizer: Tokenizer, examples: list[Example], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"key": "x"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: the answer lacks example_id"):
        _run(scripted(_right_when_greedy), tokenizer, examples, path)
    path.write_text("garbage\n")
    with pytest.raises(RunDirError, match=r"a\.jsonl:1: not valid JSON"):
        _run(scripted(_right_when_greedy), tokenizer, examples, path)


def test_bad_examples_are_refused(
    scripted: Scripted, tokenizer: Tokenizer, examples: list[Example], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no example"):
        _run(scripted(_right_when_greedy), tokenizer, [], tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="same id"):
        _run(scripted(_right_when_greedy), tokenizer, [examples[0], examples[0]], tmp_path / "a.jsonl")


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tafkir.data.tokenizer import Tokenizer
from tafkir.eval.run import evaluate
from tafkir.records import Completion, Example
from tafkir.tasks.math import WordProblems

tokenizer = Tokenizer.load(Path(sys.argv[3]))
class Slow:
    def complete(self, requests):
        for request in requests:
            time.sleep(float(sys.argv[4]))
            text = f"\\\\boxed{{{(request.params.seed or 0) % 7}}}"
            ids = (*tokenizer.encode(text), tokenizer.turn_end_id)
            yield Completion(request.id, ids, (0.0,) * len(ids), "stop")
examples = [Example(f"p{i}", "own", "test", f"What is {i}?", str(i % 7)) for i in range(40)]
evaluate(Slow(), tokenizer, WordProblems(), examples, samples=4, temperature=1.0, max_tokens=20, seed=1,
         path=Path(sys.argv[1]), batch_requests=8)
"""


def test_kill_minus_nine_loses_nothing_that_was_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    source = str(Path(__file__).resolve().parents[2] / "src")
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"

    def command(path: Path, pause: str) -> list[str]:
        return [sys.executable, "-c", KILLED, str(path), source, str(tmp_path / "tokenizer"), pause]

    process = subprocess.Popen(command(killed, "0.01"), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (killed.exists() and killed.stat().st_size > 0):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = len(load_records(killed))
    assert 0 < before < 200 and before % 8 == 0
    for path in (killed, whole):
        subprocess.run(command(path, "0"), check=True, stderr=subprocess.DEVNULL)
    assert killed.read_bytes() == whole.read_bytes()
    assert len(load_records(whole)) == 200
