"""What all tests share: one thread, markers that skip where the machine cannot run them, and the real command line."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A shared machine may take any time over an example; how long one takes is no property of the code.
settings.register_profile("shared-machine", deadline=None, max_examples=50)
settings.load_profile("shared-machine")

# Read by OpenMP when torch is first imported, so it has to stand here.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Which arithmetic a test sees must not depend on what is built here: tests of the native kernels ask for them
# (`native_library`, `kernels`). TAFKIR_KERNELS=native runs every test on them.
os.environ.setdefault("TAFKIR_KERNELS", "torch")

# Triton's own functions, too, are made for its interpreter or for a device when it is first imported, by whatever does.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A suite started in the background may ignore interrupts, and what it starts would, too; some tests send them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]

Cli = Callable[..., subprocess.CompletedProcess[str]]


def pytest_sessionstart() -> None:
    if os.environ["TAFKIR_KERNELS"] == "native":
        from tafkir.native.build import build

        build()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    browser = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    for item in items:
        if item.get_closest_marker("gpu") and not _has_accelerator():
            item.add_marker(pytest.mark.skip(reason="no accelerator here"))
        if item.get_closest_marker("browser") and not browser:
            item.add_marker(pytest.mark.skip(reason="no Chromium here"))


def _has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def native_library() -> Path:
    """The compiled kernels, built once per machine into the user's cache."""
    from tafkir.errors import BackendUnavailable
    from tafkir.native.build import build

    try:
        return build()
    except BackendUnavailable as error:
        pytest.skip(f"no native kernels here: {error}")


@pytest.fixture(params=["native", "torch"], scope="module")
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs what uses it twice, with the native kernels and with torch's ops."""
    from tafkir.ops.native import kernels_in_use, select_kernels

    if request.param == "native":
        request.getfixturevalue("native_library")
    before = kernels_in_use()
    yield select_kernels(request.param)
    select_kernels(before)


@pytest.fixture
def cli_env() -> dict[str, str]:
    """Environment in which a subprocess finds this source tree, whether or not it is installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Runs `tafkir ARGS...` in this process, in a temporary directory: the same entry, without the start-up time."""
    from tafkir.cli.main import main

    logger = logging.getLogger("tafkir")
    before = list(logger.handlers), logger.propagate

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["tafkir", *args])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(args, code, captured.out, captured.err)

    monkeypatch.chdir(tmp_path)
    yield run
    logger.handlers[:], logger.propagate = before


@pytest.fixture
def cli(tmp_path: Path, cli_env: dict[str, str]) -> Cli:
    """Runs `tafkir ARGS...` as a process of its own, in a temporary directory."""

    def run(*args: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tafkir.cli.main", *args]
        return subprocess.run(command, cwd=cwd, env=cli_env, capture_output=True, text=True, timeout=300, check=False)

    return run
