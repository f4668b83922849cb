"""A user's own reward: called in a process, limited in time, and whatever goes wrong is counted and named."""

from __future__ import annotations

import logging
import pickle
import textwrap
import threading
import time
from pathlib import Path

import pytest

from tafkir.errors import GradingError
from tafkir.records import Example
from tafkir.tasks.math import WordProblems
from tafkir.tasks.reward import RewardedTask, RewardFile

EXAMPLE = Example("p-1", "own", "train", "What is 2 + 3?", "5", {"level": 2, "data": (1, {2})})

PROGRAM = """
    import time
    import beside

    print("a reward may print")

    def reward(example, text):
        if text == "raise":
            return 1 / 0
        if text == "nan":
            return float("nan")
        if text == "inf":
            return float("inf")
        if text == "text":
            return "1.0"
        if text == "none":
            return
        if text == "hang":
            while True:
                time.sleep(1)
        if text == "exit":
            import os
            os._exit(3)
        if text == "system exit":
            raise SystemExit(0)
        return beside.SCALE * len(text) + example.extra["level"]
    """


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "reward.py"
    path.write_text(textwrap.dedent(PROGRAM))
    (tmp_path / "beside.py").write_text("SCALE = 0.5\n")
    return path


def test_a_reward_is_what_the_function_says_and_failures_are_named(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = RewardedTask(WordProblems(), RewardFile(file, timeout_s=0.5))
    verdict = task.grade(EXAMPLE, "\\boxed{5}")
    assert (verdict.outcome, verdict.reward) == ("correct", 6.5)
    assert (task.grade(EXAMPLE, "6").outcome, task.grade(EXAMPLE, "6").reward) == ("wrong", 2.5)
    expected = {
        "raise": "reward.py raised ZeroDivisionError: division by zero (reward.py:9)",
        "nan": "reward.py returned nan",
        "inf": "reward.py returned inf",
        "text": "reward.py returned str, not a number",
        "none": "reward.py returned NoneType, not a number",
        "hang": "reward.py took longer than 0.5 s",
        "exit": "reward.py ended its process",
        "system exit": "reward.py raised SystemExit: 0 (reward.py:25)",
    }
    seen: list[str] = []
    with caplog.at_level(logging.WARNING, "tafkir"):
        for text, reason in expected.items():
            verdict = task.grade(EXAMPLE, text)
            assert (verdict.outcome, verdict.reward, verdict.reason) == ("error", 0.0, reason)
            assert not verdict.is_ungraded
            seen.append(verdict.failure)
    want = ["raised", "not_finite", "not_finite", "wrong_type", "wrong_type", "time", "died", "raised"]
    assert seen == want
    assert len(caplog.records) == 5 and "division by zero" in caplog.text and "p-1" in caplog.text
    assert task.grade(EXAMPLE, "fine").reward == 4.0
    # A verifier in another process has a task of its own; how it failed comes back in the verdict.
    assert pickle.loads(pickle.dumps(task)).grade(EXAMPLE, "raise").failure == "raised"
    task.reward.close()


def test_the_limit_holds_in_a_thread_and_another_process_opens_it_anew(file: Path) -> None:
    reward = RewardFile(file, timeout_s=0.3)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(reward(EXAMPLE, "hang")))
    began = time.monotonic()
    thread.start()
    thread.join()
    assert found == [("time", "reward.py took longer than 0.3 s")]
    assert time.monotonic() - began < 20
    copy = pickle.loads(pickle.dumps(reward))
    assert copy(EXAMPLE, "ab") == 3.0 and copy.pool is not reward.pool
    reward.close()
    copy.close()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1\n", r"no function reward\(example, text\)"),
        ("reward = 3\n", r"no function reward\(example, text\)"),
        ("import nothing_of_the_kind\n", r"ModuleNotFoundError: .*nothing_of_the_kind.*reward.py:1"),
        ("def reward(:\n", "SyntaxError"),
        ("import os\nos._exit(0)\n", "its process does not start"),
    ],
)
def test_a_file_that_does_not_work_is_refused_before_training(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "reward.py"
    path.write_text(text)
    with pytest.raises(GradingError, match=reason):
        RewardFile(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GradingError, match=r"none\.py: there is no such reward file.*rlvr\.reward_file"):
        RewardFile(tmp_path / "none.py")
