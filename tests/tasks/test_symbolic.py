"""The verifier keeps its time limit in any thread and leaves nothing behind: real processes, really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tafkir.records import Example
from tafkir.tasks.math import WordProblems
from tafkir.tasks.symbolic import SymbolicResult, SymbolicVerifier

SLOW = "9!!!!!!"
SRC = Path(__file__).resolve().parents[2] / "src"


def _is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.fixture
def verifier() -> Iterator[SymbolicVerifier]:
    verifier = SymbolicVerifier(timeout_s=2.0)
    yield verifier
    verifier.close()


def test_a_worker_stays_warm_and_goes_when_closed(verifier: SymbolicVerifier) -> None:
    patient = SymbolicVerifier(timeout_s=20)
    assert patient.compare("4", "2^2") == SymbolicResult(True)
    pid = patient._idle[0].process.pid
    assert patient.compare("5", "2^2") == SymbolicResult(False)
    assert [worker.process.pid for worker in patient._idle] == [pid]
    patient.close()
    assert not _is_alive(pid)
    assert patient.compare("4", "2^2").equal
    patient.close()


def test_a_slow_comparison_is_cut_off_in_every_thread(verifier: SymbolicVerifier) -> None:
    task = WordProblems(verifier=verifier)
    example = Example("i", "own", "test", "q", "5")
    task.grade(example, "\\boxed{2^2}")
    verdicts = []

    def grade() -> None:
        began = time.monotonic()
        verdict = task.grade(example, f"\\boxed{{{SLOW}}}")
        verdicts.append((verdict, time.monotonic() - began))

    threads = [threading.Thread(target=grade)]
    grade()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for verdict, _ in verdicts:
        assert (verdict.outcome, verdict.reward) == ("error", 0.0)
        assert "longer than 2 s" in verdict.reason
    # the first one had a warm worker, so there was no start to wait for;
    # how late this machine runs anything is measured
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    assert verdicts[0][1] < 3 + 10 * (time.monotonic() - began)
    assert not verifier._idle


def test_a_worker_that_dies_is_replaced() -> None:
    verifier = SymbolicVerifier(timeout_s=20)
    assert verifier.compare("4", "2^2").equal
    os.kill(verifier._idle[0].process.pid, signal.SIGKILL)
    verifier._idle[0].process.wait()
    assert verifier.compare("4", "2^2").equal
    verifier.close()


def test_a_worker_that_cannot_start_is_a_recorded_failure() -> None:
    verifier = SymbolicVerifier(memory_bytes=1 << 20)
    result = verifier.compare("4", "2^2")
    assert result.equal is None and result.reason.startswith("math-verify cannot be started")


@pytest.mark.parametrize("answer", ["", "\\frac{", "((((((", "}{", "\\text{}", "x" * 100, "{" * 100, "\u0000\ud800"])
def test_malformed_answers_do_not_break_the_worker(answer: str) -> None:
    result = SHARED.compare("4", answer)
    assert not result.equal
    assert SHARED.compare("4", "2^2").equal


SHARED = SymbolicVerifier(timeout_s=20)


@pytest.fixture(scope="module", autouse=True)
def _close_shared() -> Iterator[None]:
    yield
    SHARED.close()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_nothing_is_left_behind_when_the_parent_is_killed_in_the_middle() -> None:
    code = (
        "import threading, time\n"
        "from tafkir.tasks.symbolic import SymbolicVerifier\n"
        "verifier = SymbolicVerifier(timeout_s=1.0)\n"
        "assert verifier.compare('4', '2^2').equal is not None\n"
        "worker = verifier._idle[0]\n"
        f"worker.send({{'expected': '4', 'answer': {SLOW!r}, 'timeout_s': 1.0}})\n"
        "print(worker.process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SRC)}, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert _is_alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 15
    while _is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(pid)
