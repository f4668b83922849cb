"""What a step function takes along besides weights is in the saved state, and comes back from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tafkir.models.build import build_decoder
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.tables import TrainTable
from tafkir.runlog.rundir import RunDir
from tafkir.train.loop import StepOutput, Trainer, fit
from tafkir.train.state import load_carried, save_state

CONFIG = ModelConfig(vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, head_dim=4)


class Counter:
    """A step function that counts, from where it was left."""

    def __init__(self, die_at: int = -1) -> None:
        self.total, self.die_at = 0, die_at

    def __call__(self, step: int) -> StepOutput:
        if step == self.die_at:
            raise KeyboardInterrupt
        self.total += step + 1
        return StepOutput({"total": float(self.total)})

    def state(self) -> Any:
        return {"total": self.total, "text": "٣ تفاح", "logprob": -0.1234567890123} if self.total else None

    def load_state(self, state: Any) -> None:
        self.total = state["total"]


def run(place: Path, counter: Counter) -> bytes:
    stage = RunDir(place).stage("rlvr")
    config = TrainTable(steps=7, save_every=2, log_every=1)
    fit(Trainer(build_decoder(CONFIG, 0), config), stage, counter, carried={"counter": counter}, label="x")
    return stage.metrics_path.read_bytes()


def test_a_run_that_resumes_goes_on_with_what_it_carried(tmp_path: Path) -> None:
    unbroken = run(tmp_path / "a", Counter())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", Counter(die_at=5))  # after step 4's state
    assert run(tmp_path / "b", Counter()) == unbroken
    assert b'"total": 28.0' in unbroken


def test_the_state_holds_it_to_the_last_bit_and_nothing_where_there_is_nothing(tmp_path: Path) -> None:
    decoder = build_decoder(CONFIG, 0)
    value = {"a": {"floats": [0.1, -1e-7, 1 / 3], "text": "تفكير"}}
    assert load_carried(save_state(tmp_path, decoder, [], 1, carried=value)) == value
    without = save_state(tmp_path, decoder, [], 2, carried={})
    assert load_carried(without) == {} and b"carried" not in without.read_bytes()


def test_a_tracker_gets_what_the_files_get(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    stage = RunDir(tmp_path / "demo").stage("rlvr")
    stage.track = ("tensorboard",)
    fit(Trainer(build_decoder(CONFIG, 0), TrainTable(steps=3, log_every=1)), stage, Counter(), label="x")
    events = reader.EventAccumulator(str(stage.path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("total")] == [(1, 1.0), (2, 3.0), (3, 6.0)]
    assert {"train/learning_rate", "time/step_s", "memory/peak_rss_bytes"} <= set(events.Tags()["scalars"])
