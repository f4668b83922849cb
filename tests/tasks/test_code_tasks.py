"""HumanEval(+), MBPP(+), contests: golden answers, canonical solutions, forgeries, and data that are no such."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tafkir.errors import BackendUnavailable, DataError, TafkirError
from tafkir.records import Example
from tafkir.tasks.backends import Backends, choose_backends, default_sandbox
from tafkir.tasks.catalog import load_task
from tafkir.tasks.published.code import ProgramTask, plus_equal
from tafkir.tasks.published.contests import same_lines
from tafkir.tasks.sandbox import Limits, ProgramResult, Sandbox

GOLDENS = Path(__file__).with_name("goldens") / "code"
NAMES = ("humaneval", "humaneval-plus", "mbpp", "mbpp-plus", "livecodebench")
SAMPLED = ("humaneval", "humaneval-plus", "mbpp", "mbpp-plus")


def _works() -> bool:
    try:
        Sandbox()
    except BackendUnavailable:
        return False
    return True


needs_bwrap = pytest.mark.skipif(not _works(), reason="bubblewrap does not work here")


@pytest.fixture(scope="module", autouse=True)
def sandbox() -> Iterator[None]:
    with choose_backends(Backends()):
        yield


def load(name: str) -> tuple[ProgramTask, dict[str, Example]]:
    own = GOLDENS / f"{name}.data.jsonl"
    task = load_task(name, own if own.exists() else None)
    assert isinstance(task, ProgramTask)
    return task, {example.id: example for example in task.examples("test")}


@needs_bwrap
@pytest.mark.parametrize("name", NAMES)
def test_golden_answers(name: str) -> None:
    task, examples = load(name)
    rows = [json.loads(line) for line in (GOLDENS / f"{name}.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) >= 10
    for row in rows:
        example = examples[row["item"]]
        verdict = task.grade(example, row["text"], finished=row.get("finished", True))
        assert verdict.outcome == row["outcome"], (row["text"], verdict)
        assert verdict.reward == (verdict.outcome == "correct")
        assert verdict.sandbox == ("bwrap" if "def " in row["text"] and verdict.outcome == "wrong" else verdict.sandbox)


@needs_bwrap
@pytest.mark.parametrize("name", SAMPLED)
def test_canonical_solutions_pass_and_forged_and_corrupted_ones_do_not(name: str) -> None:
    task, examples = load(name)
    for example in list(examples.values())[5::45]:
        assert task.grade(example, f"```python\n{example.answer}\n```").correct, example.id
        entry = example.extra["entry"]
        forged = f"class Same:\n    def __eq__(self, other): return True\ndef {entry}(*a, **k): return Same()"
        for program in (forged, f"def {entry}(*a, **k): return '?'", f"{example.answer}\n{entry} = print"):
            assert task.grade(example, f"```python\n{program}\n```").outcome == "wrong", (example.id, program)


def test_the_data_in_the_package_are_whole() -> None:
    for name, items, tests in (("humaneval", 164, 1570), ("mbpp-plus", 378, 1172), ("mbpp", 500, 1500)):
        task, examples = load(name)
        assert len(examples) == task.card.num_items == items
        assert sum(len(example.extra.get("base") or example.extra["tests"]) for example in examples.values()) >= tests
        prompt = task.prompt(next(iter(examples.values())))[0].content
        assert "```" in prompt and next(iter(examples.values())).question.strip() in prompt


def test_floats_are_compared_as_evalplus_does() -> None:
    assert plus_equal(0.3, 0.1 + 0.2, 0) and plus_equal([1.0], [1.0 + 1e-7], 0) and plus_equal(2, 2.0, 0)
    assert plus_equal([1, 2.5], [1, 2.5001], 1e-3) and plus_equal(float("nan"), float("nan"), 1e-6)
    assert not plus_equal(0.3, 0.3001, 0) and not plus_equal((1.0,), [1.0], 0) and not plus_equal(1.5, 10**400, 0)
    assert not plus_equal([1, 2.5], [1, 2.5001], 0), "a list with an integer in it has no tolerance of its own"


def test_lines_are_equal_as_texts_or_decimal_numbers() -> None:
    assert same_lines("1 2\n3\n", " 1 2 \n3.0\n\n") and same_lines("0.10", "0.1") and same_lines("YES", "YES\n")
    wrong = [("1\n2", "1 2"), ("50000000000000000", "50000000000000001"), ("yes", "Yes"), ("1", "sNaN"), ("1", "")]
    assert not any(same_lines(a, b) for a, b in wrong)


def test_a_sandbox_that_fails_and_a_broken_reference_are_no_wrong_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    task, examples = load("mbpp")
    example = next(iter(examples.values()))
    broken = ProgramResult("sandbox", "no room")
    monkeypatch.setattr(Sandbox, "run", lambda *_, **__: broken)
    verdict = task.grade(example, f"```python\n{example.answer}\n```")
    assert (verdict.outcome, verdict.failure, verdict.reason) == ("error", "sandbox", "no room") and verdict.is_ungraded
    plus, others = load("mbpp-plus")
    with pytest.raises(TafkirError, match="canonical solution fails: no room"):
        plus.grade(next(iter(others.values())), "```\ndef f(): pass\n```")


def test_bad_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not in the package.*code_generation_lite"):
        load_task("livecodebench")
    with pytest.raises(DataError, match=r"not in the package.*tests \[\{input, output\}\]"):
        load_task("codeforces")
    row = json.loads((GOLDENS / "livecodebench.data.jsonl").read_text("utf-8").splitlines()[0])

    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("touch /tmp/tafkir-harm",)

    row["private_test_cases"] = base64.b64encode(zlib.compress(pickle.dumps(Harm()))).decode()
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"test\.jsonl:1.*posix\.system in a file of tests"):
        load_task("livecodebench", tmp_path).examples("test")
    assert not Path("/tmp/tafkir-harm").exists()
    (tmp_path / "cf.jsonl").write_text(json.dumps({"id": "1A", "question": "?", "tests": [{"input": "1"}]}))
    with pytest.raises(DataError, match="tests as a list of objects with input and output"):
        load_task("codeforces", tmp_path / "cf.jsonl").examples("test")


@needs_bwrap
def test_codeforces_problems_of_ones_own(tmp_path: Path) -> None:
    problem = {"id": "4A", "question": "Watermelon", "rating": 800, "time_limit": 0.2}
    problem["tests"] = [{"input": "8\n", "output": "YES\n"}, {"input": "3\n", "output": "NO\n"}]
    (tmp_path / "cf.jsonl").write_text(json.dumps(problem))
    task = load_task("codeforces", tmp_path / "cf.jsonl")
    (example,) = task.examples("test")
    assert example.difficulty == "800" and "stdin" in task.prompt(example)[0].content
    right = "n = int(input())\nprint('YES' if n % 2 == 0 and n > 2 else 'NO')"
    assert task.grade(example, f"```python\n{right}\n```").correct
    assert task.grade(example, "```python\nprint('YES')\n```").outcome == "wrong"
    late = task.grade(example, "```python\nwhile True: pass\n```")
    assert (late.outcome, late.reason) == ("wrong", "test 1 of 2: one call took longer than 0.2 s")


def test_the_chosen_backends_hold_until_the_block_is_left() -> None:
    outer = default_sandbox()
    with choose_backends(Backends(sandbox="rlimit", unsafe=True, limits=Limits(timeout_s=1.0))):
        assert (default_sandbox().tier, default_sandbox().limits.timeout_s) == ("rlimit", 1.0)
    assert default_sandbox() is outer
    with choose_backends(Backends(sandbox="rlimit")), pytest.raises(TafkirError, match="--unsafe"):
        default_sandbox()
