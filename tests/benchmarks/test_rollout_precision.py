"""The benchmark of rollout formats runs on the bundled checkpoint, and finds every format apart from training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.rollout_precision import main


def test_every_format_but_float32_is_apart_from_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.json"
    sizes = ["--prompts", "2", "--group", "2", "--speed-tokens", "2", "--probe-tokens", "16", "--repeats", "1"]
    command = ["rollout_precision.py", *sizes, "--precisions", "fp8", "nvfp4", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    main()
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["float32", "fp8", "nvfp4"]
    assert "nvfp4" in capsys.readouterr().out
    gaps = [rows[name]["own_experts"]["abs_logprob_diff_mean"] for name in rows]
    assert gaps[0] < 1e-5 < min(gaps[1:])
    assert rows["nvfp4"]["own_experts"]["expert_agreement"] < 1
    assert rows["nvfp4"]["replayed_experts"]["expert_agreement"] == 1
    assert rows["nvfp4"]["tokens_per_cpu_s"] > 0 < rows["nvfp4"]["refresh_cpu_s"]
