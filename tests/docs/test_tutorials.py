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
from pathlib import Path

import pytest

from tests.conftest import ROOT

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
LIMIT_S = 400


def script_of(page: str) -> str:
    """The blocks as one script that ends at the first command which does not do what the page says."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    must_fail = r"if \1; then echo 'this should have failed: \1' >&2; exit 1; fi"
    script = re.sub(r"^! (.*)$", must_fail, "".join(blocks), flags=re.MULTILINE)
    return f"set -euo pipefail\n{script}"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_does_what_it_says(path: Path, tmp_path: Path) -> None:
    if "curl " in script_of(path.read_text(encoding="utf-8")) and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    programs, place = tmp_path / "bin", tmp_path / "reader"
    for folder in (programs, place):
        folder.mkdir()
    (programs / "tafkir").write_text(f'#!/bin/sh\nexec {sys.executable} -m tafkir.cli.main "$@"\n')
    (programs / "tafkir").chmod(0o755)
    path_env = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    with subprocess.Popen(
        ["bash", "-c", script_of(path.read_text(encoding="utf-8"))],
        cwd=place,
        env=os.environ | {"PATH": path_env, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
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
