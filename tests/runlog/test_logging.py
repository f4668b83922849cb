"""Messages and progress: plain without a terminal, live on one, and always in the run's log."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tafkir.errors import RunDirError, TrainingError
from tafkir.runlog.logging import log_to, setup_logging
from tafkir.runlog.progress import Progress, format_duration


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    logger = logging.getLogger("tafkir")
    before = list(logger.handlers), logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


def test_messages_go_to_stderr_and_to_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    setup_logging()
    with log_to(tmp_path / "log.jsonl"):
        logging.getLogger("tafkir.train").warning("slow: %d", 3)
    logging.getLogger("tafkir.train").debug("not this")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("slow: 3") == 1
    (row,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (row["level"], row["logger"], row["message"]) == ("WARNING", "tafkir.train", "slow: 3")


@pytest.mark.parametrize("error", [TrainingError("the loss is not finite", where="sft"), ZeroDivisionError("x / 0")])
def test_the_log_ends_with_why_the_run_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    setup_logging()
    with pytest.raises(type(error)), log_to(tmp_path / "log.jsonl"):
        raise error
    (row,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (row["level"], row["message"]) == ("ERROR", str(error))
    assert ("ZeroDivisionError" in row.get("traceback", "")) == isinstance(error, ZeroDivisionError)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_ends_the_run_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunDirError, match="the disk is full"), log_to(tmp_path / "log.jsonl"):
        logging.getLogger("tafkir").info("x")
    assert "Logging error" not in capsys.readouterr().err


def test_other_ranks_are_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    setup_logging()
    with log_to(tmp_path / "log.jsonl"):
        logging.getLogger("tafkir").warning("x")
    assert capsys.readouterr().err == "" and not (tmp_path / "log.jsonl").exists()


def test_the_line_says_step_share_numbers_rate_and_time_left() -> None:
    now = 0.0
    progress = Progress("sft", 300, start=100, clock=lambda: now)
    progress.update(120, tokens=5000, loss=1.23456)
    now = 10.0
    assert progress.line() == "sft 120/300 40% · loss 1.235 · 500 tok/s · ETA 1:30"
    progress.update(300)
    assert progress.line() == "sft 300/300 100% · loss 1.235 · 500 tok/s · took 0:10"


def test_plain_progress_says_a_line_now_and_then_and_one_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tafkir"), Progress("rlvr", 5, interval_s=3600) as progress:
        for step in range(1, 6):
            progress.update(step, reward=0.5)
    assert [record.getMessage().split(" · took")[0] for record in caplog.records] == ["rlvr 5/5 100% · reward 0.5"]


def test_durations() -> None:
    assert [format_duration(s) for s in (0, 75, 3700)] == ["0:00", "1:15", "1:01:40"]


_SCRIPT = """
import time, logging
from tafkir.errors import RunDirError, TrainingError
from tafkir.runlog.logging import setup_logging
from tafkir.runlog.progress import Progress
setup_logging()
with Progress("sft", 3) as progress:
    for step in (1, 2, 3):
        time.sleep(0.25)
        progress.update(step, tokens=10, loss=1.0)
"""


def test_a_terminal_gets_live_progress(cli_env: dict[str, str]) -> None:
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", _SCRIPT], env={**cli_env, "TERM": "xterm"}, stderr=follower
    ) as process:
        os.close(follower)
        seen = b""
        while chunk := _read(leader):
            seen += chunk
    os.close(leader)
    assert process.returncode == 0
    assert b"sft 1/3 33%" in seen and b"ETA" in seen and b"sft 3/3 100%" in seen


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, 4096)
    except OSError:  # Linux reports the end of a pseudo-terminal as an error
        return b""
