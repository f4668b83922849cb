"""Every tutorial is run as a reader would run it: its `sh` blocks, in order, in an empty folder.

A line that begins with `!` shows a mistake and must fail. Blocks of another kind (`console`) take long.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
FORKED = Path(__file__).with_name("forked.py")
LIMIT_S = 400


def script_of(page: str) -> str:
    """The blocks as one script that ends at the first command which does not do what the page says."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    must_fail = r"if \1; then echo 'this should have failed: \1' >&2; exit 1; fi"
    script = re.sub(r"^! (.*)$", must_fail, "".join(blocks), flags=re.MULTILINE)
    return f"set -euo pipefail\n{script}"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a `tafkir` that starts at once."""
    folder = tmp_path_factory.mktemp("bin")
    socket = folder / "socket"
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, str(FORKED), "serve", str(socket)], env=env, start_new_session=True) as one:
        (folder / "tafkir").write_text(f'#!/bin/sh\nexec {sys.executable} -S {FORKED} call {socket} "$@"\n')
        (folder / "tafkir").chmod(0o755)
        while not socket.exists():
            assert one.poll() is None
            time.sleep(0.05)
        yield folder
        os.killpg(one.pid, signal.SIGKILL)  # and what pages have started


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_does_what_it_says(path: Path, programs: Path, tmp_path: Path) -> None:
    script = script_of(path.read_text(encoding="utf-8"))
    if "curl " in script and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    env = {"PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=os.environ | env | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as reader:
        try:
            told, _ = reader.communicate(timeout=LIMIT_S)
        finally:  # a page that ends early has not stopped what it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(reader.pid, signal.SIGKILL)
    assert reader.returncode == 0, told[-5000:]


def test_the_pages_have_something_to_run() -> None:
    assert len(TUTORIALS) == 8
    assert all("tafkir " in script_of(path.read_text(encoding="utf-8")) for path in TUTORIALS)
