"""`serve` as a process of its own: it says where it listens, stops on a signal, and fails in one line."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tafkir.errors import BackendUnavailable, CheckpointError
from tafkir.serve.run import serve

SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from tafkir.serve.run import serve
serve(sys.argv[1], port=0, num_threads=1)
"""


@pytest.fixture
def process(checkpoint: Path, cli_env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SCRIPT, str(checkpoint)]
    with subprocess.Popen(command, env=cli_env, stderr=subprocess.PIPE, text=True) as process:
        yield process
        if process.poll() is None:
            process.kill()


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"tiny-random: chat at (http://127\.0\.0\.1:\d+),", line):
            return found[1]
    raise AssertionError("the server ended before it listened")


def test_serves_until_a_signal(process: subprocess.Popen[str]) -> None:
    url = url_of(process)
    deadline = time.monotonic() + 20
    while True:
        try:
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=20)
            break
        except httpx.ConnectError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert answer.status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


def test_a_taken_port_is_told_before_the_model_is_loaded(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BackendUnavailable, match=rf"127\.0\.0\.1:{port}: the port is in use.*--port 0"):
            serve(checkpoint, port=port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("203.0.113.7", 0)])
def test_an_address_that_cannot_be(checkpoint: Path, host: str, port: int) -> None:
    with pytest.raises(BackendUnavailable, match=re.escape(f"{host}:{port}")):
        serve(checkpoint, host=host, port=port)


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        serve(tmp_path / "nothing", port=0)


def test_the_entry_points_do_not_pull_torch_in(cli_env: dict[str, str]) -> None:
    script = "import sys, tafkir.serve.run, tafkir.serve.chat, tafkir.serve.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env=cli_env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert os.environ.get("OMP_NUM_THREADS") == "1"
