"""The average of the weights: against torch's own, against its closed form, through a resume and into a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tafkir.errors import CheckpointError
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.recipe.schema import EmaConfig, TrainTable
from tafkir.runlog.rundir import StageDir
from tafkir.train.ema import WeightAverage
from tafkir.train.loop import StepOutput, Trainer, fit
from tafkir.train.state import latest_state, load_state, save_state
from tests.train.conftest import CONFIG


def noise(decoder: Decoder, step: int) -> None:
    """Move all weights and biases, as training would."""
    draw = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for value in decoder.state_dict().values():
            value.add_(torch.randn(value.shape, generator=draw))


def test_the_average_agrees_with_torch() -> None:
    decoder = build_decoder(CONFIG, seed=0)
    ours = WeightAverage(decoder, 0.9, warmup=False)
    theirs = AveragedModel(decoder, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    theirs.update_parameters(decoder)  # torch takes the first weights as they are
    for step in range(6):
        noise(decoder, step)
        ours.update()
        theirs.update_parameters(decoder)
    expected = theirs.module.state_dict()
    assert set(ours.tensors) == set(expected)
    assert any("expert_bias" in name for name in ours.tensors)
    for name, value in ours.tensors.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_the_warm_up_forgets_the_first_weights() -> None:
    module = torch.nn.Linear(1, 1, bias=False).double()
    average = WeightAverage(module, 0.99)
    assert [average.decay_at(t) for t in (0, 1, 8, 10_000)] == [0.1, 2 / 11, 0.5, 0.99]
    values = [module.weight.item()]
    for step in range(5):
        with torch.no_grad():
            module.weight.fill_(float(step))
        average.update()
        values.append(float(step))
    # closed form: weight i counts (1 - d_i) times all later decays
    decays = [(1 + t) / (10 + t) for t in range(5)]
    expected = values[0]
    for t, decay in enumerate(decays):
        expected = decay * expected + (1 - decay) * values[t + 1]
    assert float(average.tensors["weight"]) == pytest.approx(expected, abs=1e-12)
    kept = torch.tensor(decays, dtype=torch.float64).prod()
    assert float(kept) < 0.003


def test_the_weights_come_back_to_the_bit_after_the_average_was_used() -> None:
    decoder = build_decoder(CONFIG, seed=0)
    average = WeightAverage(decoder, 0.5)
    noise(decoder, 0)
    average.update()
    live = {name: value.clone() for name, value in decoder.state_dict().items()}
    shadow = {name: value.clone() for name, value in average.tensors.items()}
    with pytest.raises(RuntimeError, match="in the block"), average.applied():
        assert all(torch.equal(value, shadow[name]) for name, value in decoder.state_dict().items())
        raise RuntimeError("in the block")
    assert all(torch.equal(value, live[name]) for name, value in decoder.state_dict().items())
    assert all(torch.equal(value, shadow[name]) for name, value in average.tensors.items())


class Killed(Exception):
    pass


@pytest.fixture
def table() -> Iterator[TrainTable]:
    yield TrainTable(steps=6, save_every=2, log_every=1, ema=EmaConfig(decay=0.8), expert_bias_update_rate=0.01)


def run(folder: Path, table: TrainTable, *, die_at: int | None = None) -> Trainer:
    trainer = Trainer(build_decoder(CONFIG, seed=0), table)
    stage = StageDir(folder, "pretrain")
    stage.make()

    def step(number: int) -> StepOutput:
        if number == die_at:
            raise Killed
        draw = torch.Generator().manual_seed(number)
        for param in trainer.decoder.parameters():
            param.grad = torch.randn(param.shape, generator=draw)
        loads = [torch.randint(0, 9, (4,), generator=draw)]
        return StepOutput({"train/grad_norm": trainer.update(loads, where="test")})

    fit(trainer, stage, step, label="test")
    return trainer


def test_a_killed_run_resumes_its_average_bit_for_bit(tmp_path: Path, table: TrainTable) -> None:
    whole = run(tmp_path / "whole", table)
    with pytest.raises(Killed):
        run(tmp_path / "killed", table, die_at=5)
    resumed = run(tmp_path / "killed", table)
    assert whole.average is not None and resumed.average is not None
    assert resumed.average.num_updates == whole.average.num_updates == 6
    for name, value in whole.average.tensors.items():
        assert torch.equal(value, resumed.average.tensors[name]), name
        assert torch.equal(whole.decoder.state_dict()[name], resumed.decoder.state_dict()[name]), name
    assert (whole.average.tensors["norm.weight"] != whole.decoder.norm.weight).any()


def test_an_average_leaves_training_as_it_is(tmp_path: Path, table: TrainTable) -> None:
    averaged = run(tmp_path / "with", table).decoder.state_dict()
    plain = run(tmp_path / "without", table.model_copy(update={"ema": None})).decoder.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in averaged.items())
    rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("with", "without")]
    assert rows[0] == rows[1]


def test_a_state_without_an_average_cannot_give_one(tmp_path: Path) -> None:
    decoder = build_decoder(CONFIG, seed=0)
    save_state(tmp_path, decoder, [], 3)
    path = latest_state(tmp_path)
    assert path is not None
    with pytest.raises(CheckpointError, match="no average"):
        load_state(path, decoder, [], WeightAverage(decoder, 0.9))
