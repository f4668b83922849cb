"""States reshard: what any number of ranks saved, any other number goes on with, to the same end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tafkir.checkpoint.save import save_checkpoint
from tafkir.errors import CheckpointError
from tafkir.models.build import build_decoder
from tests.parallel.jobs import MODEL, train
from tests.parallel.ranks import run_ranks
from tests.parallel.test_trajectory import assert_same_rows, assert_same_weights

EVERY = {"save_every": 1, "ema": {"decay": 0.9}}


def write(weights: dict[str, torch.Tensor], folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint with these weights."""
    decoder = build_decoder(MODEL, seed=0)
    decoder.load_state_dict(weights, strict=True)
    save_checkpoint(folder, decoder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_a_state_of_four_resumes_on_two_on_one_and_on_four_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    wanted = train(tmp_path / "alone", {}, EVERY)
    assert run_ranks(4, train, run, {"data_parallel": 2, "expert_parallel": 2}, EVERY, stop=1) == [{}] * 4
    assert run_ranks(2, train, run, {"tensor_parallel": 2}, EVERY, stop=2) == [{}] * 2
    assert [path.name for path in (run / "state").iterdir()] == ["step-00000002.dcp"]
    assert train(run, {}, EVERY, stop=3) == {}
    assert [path.name for path in (run / "state").iterdir()] == ["step-00000003.safetensors"]
    found = run_ranks(4, train, run, {"data_parallel": 2, "tensor_parallel": 2}, EVERY)[0]
    assert_same_rows(found["rows"], wanted["rows"])
    assert_same_weights(found["weights"], wanted["weights"])
    assert found["tokens"] == wanted["tokens"]
    # The last state, read by a single process, is to the last bit what the four ranks gathered and write.
    alone = train(run, {}, EVERY)
    assert write(found["weights"], tmp_path / "gathered") == write(alone["weights"], tmp_path / "single")


def test_a_damaged_state_is_one_error_that_names_it(tmp_path: Path) -> None:
    run_ranks(2, train, tmp_path, {}, {"steps": 1})
    state = tmp_path / "state" / "step-00000001.dcp"
    part = next(state.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"step-00000001\.dcp: cannot read the training state"):
        train(tmp_path, {}, {"steps": 1})
    shutil.rmtree(state)
    state.mkdir()
    with pytest.raises(CheckpointError, match=r"step-00000001\.dcp"):
        train(tmp_path, {}, {"steps": 1})
