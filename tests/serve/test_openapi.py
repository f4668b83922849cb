"""schemathesis on our OpenAPI: what the text promises is what the server does, for requests of every kind."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tafkir.serve.app import build_app
from tests.serve.conftest import Server, start, write_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A context in which an answer that nobody bounded costs little."""
    app = build_app(write_checkpoint(tmp_path_factory.mktemp("openapi") / "tiny-random", 24), num_threads=1)
    server, uvicorn_server, thread = start(app)
    yield server
    uvicorn_server.should_exit = True
    thread.join(timeout=20)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_schemathesis_finds_nothing(short: Server, tmp_path: Path) -> None:
    """The short form of the command in docs/serving.md: a few requests of every operation, right and wrong ones."""
    hooks = "tests.serve.schemathesis_hooks"
    env = {**os.environ, "SCHEMATHESIS_HOOKS": hooks, "PYTHONPATH": str(ROOT)}
    options = ["--exclude-checks", "positive_data_acceptance", "--phases", "fuzzing", "--no-shrink"]
    url = f"{short.url}/openapi.json"
    found = subprocess.run(
        [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", url,
         "--checks", "all", *options, "--max-examples", "2", "--seed", "1"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-1000:]
