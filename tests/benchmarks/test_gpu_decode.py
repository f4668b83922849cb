"""The GPU benchmark: refused in one line where there is none, its comparisons on one, and through the interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_decode
from tafkir.ops import native

SCRIPT = Path(gpu_decode.__file__)


def test_without_a_device_it_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for device, message in ("cuda", "no CUDA device. Expected: a machine with one"), ("cpu", "set TRITON_INTERPRET=1"):
        with pytest.raises(SystemExit, match=f"^error: .*{message}") as ended:
            gpu_decode.device_of(device)
        assert "\n" not in str(ended.value)


def test_comparisons_through_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the triton package is not installed here")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["gpu_decode.py", "--check", "--device", "cpu"])
    before = native.kernels_in_use()
    native.select_kernels("torch")
    try:
        assert gpu_decode.main() == 0
    finally:
        native.select_kernels(before)
    said = capsys.readouterr().out
    assert said.count(" ok\n") == 9
    for name in ("nvfp4_linear", "moe_experts bfloat16", "moe_experts nvfp4", "paged_attention", "static steps nvfp4"):
        assert name in said


@pytest.mark.gpu
def test_comparisons_on_the_device() -> None:
    """In a process of its own: here Triton was imported for its interpreter."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "TAFKIR_KERNELS")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
