"""TensorBoard's files read by TensorBoard itself; Weights & Biases by what it is told; what is missing is named."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tafkir.errors import BackendUnavailable
from tafkir.protocols import MetricSink
from tafkir.runlog.trackers import check_trackers, open_trackers


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loader.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written_and_forgets_what_a_killed_run_wrote_too_much(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (first,) = open_trackers(["tensorboard"], tmp_path, "run/rlvr", 0)
    sink: MetricSink = first
    for step in (1, 2, 3):
        sink.write(step, {"train/loss": 1.0 / step, "bad": math.nan, "router/load/0": [0.5, 0.5]})  # type: ignore[dict-item]
    first.close()
    assert read_scalars(tmp_path / "tensorboard") == {
        "train/loss": [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))],
    }
    # Killed after step 3, its last state is that of step 1.
    (again,) = open_trackers(["tensorboard"], tmp_path, "run/rlvr", 1)
    again.write(2, {"train/loss": 0.25})
    again.close()
    assert read_scalars(tmp_path / "tensorboard") == {"train/loss": [(1, 1.0), (2, 0.25)]}


class FakeRun:
    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished = True


def test_wandb_is_given_scalars_with_their_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, told = FakeRun(), {}
    module: Any = ModuleType("wandb")
    module.__spec__ = sys.__spec__
    module.init = lambda **options: told.update(options) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    (sink,) = open_trackers(["wandb"], tmp_path, "demo/rlvr", 4)
    sink.write(5, {"train/loss": 0.5, "router/load/0": [0.5, 0.5]})
    sink.close()
    assert told["name"] == "demo/rlvr" and told["id"] == "demo-rlvr" and told["resume"] == "allow"
    assert run.metrics == [("*", "step")] and run.rows == [{"step": 5, "train/loss": 0.5}] and run.finished


def test_a_missing_package_is_named_with_its_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tafkir.runlog.trackers.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'tafkir\[rl\]'"):
        check_trackers(["tensorboard"])
    check_trackers([])
