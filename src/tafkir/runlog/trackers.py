"""Numbers of a run beside `metrics.jsonl`: TensorBoard's event files and Weights & Biases, each where it is asked for.

Both are optional packages, imported only when a recipe's `track` names them. What they write carries the time of day,
so it is no part of what equal runs share.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from tafkir.errors import BackendUnavailable
from tafkir.runlog.atomic import guard_disk
from tafkir.runlog.metrics import Metric

__all__ = ["TensorBoardSink", "Tracker", "TrackerName", "WandbSink", "check_trackers", "open_trackers"]

TrackerName = Literal["tensorboard", "wandb"]


class Tracker(Protocol):
    """A `MetricSink` that is closed at the end of a stage."""

    def write(self, step: int, values: Mapping[str, Metric]) -> None: ...

    def close(self) -> None: ...


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Say at once what is not installed, before any stage has worked for it.

    Raises:
        BackendUnavailable: with the pip command.
    """
    for name in names:
        if find_spec(name) is None:
            raise BackendUnavailable(
                f"{name} is not installed", where=f'track = ["{name}"]', fix="pip install 'tafkir[rl]'"
            )


def open_trackers(names: Sequence[TrackerName], folder: Path, label: str, start: int) -> list[Tracker]:
    """The trackers of one stage.

    Args:
        names: which ones.
        folder: the stage's directory; each tracker writes below it.
        label: the run and the stage, such as `wordmath-tiny/rlvr`.
        start: finished steps; what an earlier process wrote of later ones is void.

    Raises:
        BackendUnavailable: a package is not installed.
        RunDirError: the place is not writable.
    """
    check_trackers(names)
    kinds: dict[TrackerName, type[TensorBoardSink | WandbSink]] = {"tensorboard": TensorBoardSink, "wandb": WandbSink}
    return [kinds[name](folder / name, label, start) for name in names]


def _scalars(values: Mapping[str, Metric]) -> dict[str, float]:
    """The numbers that make a curve: one a step, and finite. Lists stay in `metrics.jsonl`."""
    return {name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}


class TensorBoardSink:
    """Event files in `<stage>/tensorboard`; `tensorboard --logdir runs` finds those of every run and stage."""

    def __init__(self, folder: Path, label: str, start: int) -> None:
        self._folder = folder
        self._events: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summaries: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        writer: Any = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        with guard_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = writer.EventFileWriter(str(folder))
        # TensorBoard drops what earlier files say of this step and of all after it.
        session = self._events.SessionLog(status=self._events.SessionLog.START)
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=start + 1, session_log=session))

    def write(self, step: int, values: Mapping[str, Metric]) -> None:
        """Write the scalars among the values, and have them on disk."""
        value = self._summaries.Summary.Value
        summary = self._summaries.Summary(
            value=[value(tag=name, simple_value=number) for name, number in _scalars(values).items()]
        )
        with guard_disk(self._folder):
            self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, summary=summary))
            self._writer.flush()

    def close(self) -> None:
        with guard_disk(self._folder):
            self._writer.close()


class WandbSink:
    """One Weights & Biases run per stage, in the project `tafkir`; `WANDB_MODE=offline` keeps it on this machine."""

    def __init__(self, folder: Path, label: str, start: int) -> None:
        wandb: Any = importlib.import_module("wandb")
        with guard_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project="tafkir",
            name=label,
            id=label.replace("/", "-"),
            resume="allow",
            dir=str(folder),
            config={"started_at_step": start},
        )
        # Its own step counter never goes back, as a resumed stage does; the metrics' step may.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Metric]) -> None:
        """Send the scalars among the values."""
        self._run.log({"step": step, **_scalars(values)})

    def close(self) -> None:
        self._run.finish()
