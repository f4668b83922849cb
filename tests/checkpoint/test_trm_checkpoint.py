"""Checkpoints of recursive models: what is saved is what comes back, and weights of the official code load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.trm import load_official_trm, load_trm, save_trm
from tafkir.data.puzzles.sudoku import Box, sudoku_format
from tafkir.errors import CheckpointError
from tafkir.models.trm import Trm, build_trm
from tafkir.models.trm_names import OFFICIAL_PREFIX, official_names
from tafkir.recipe.trm import TrmShape

FORMAT = sudoku_format(Box(2, 2))
KNOWN = {"num_attention_heads": 2, "intermediate_multiple": 8, "num_recursions": 2, "num_latent_steps": 2}


def model_of(**given: Any) -> Trm:
    known = {"hidden_size": 16, "prefix_length": 2, "vocab_size": 6, "sequence_length": 16, **KNOWN}
    return build_trm(TrmShape.model_validate(known | {"puzzle_embedding_size": 16, "num_puzzle_ids": 3} | given), 0)


@pytest.mark.parametrize("mixer", ["attention", "mlp"])
def test_what_is_saved_comes_back(mixer: str, tmp_path: Path) -> None:
    model = model_of(mixer=mixer)
    manifest = save_trm(tmp_path / "a", model, FORMAT, extra={"recipe": "x"})
    loaded = load_trm(tmp_path / "a")
    assert loaded.model.shape == model.shape and loaded.puzzles == FORMAT and loaded.manifest == manifest
    assert manifest.num_parameters == model.shape.num_parameters() and manifest.lineage == {"recipe": "x"}
    state = loaded.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    save_trm(tmp_path / "b", model, FORMAT, extra={"recipe": "x"})
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    half = save_trm(tmp_path / "c", model, FORMAT, dtype=torch.bfloat16)
    assert {entry.dtype for entry in half.tensors.values()} == {"bfloat16"}
    weight = load_trm(tmp_path / "c").model.lm_head.weight
    assert torch.equal(weight, model.lm_head.weight.bfloat16().float())


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(architectures=["X"]), r"architectures is \['X'\]; expected \['TrmForPuzzles'\]"),
        (lambda c: c["shape"].pop("vocab_size"), r"vocab_size: Field required"),
        (lambda c: c["shape"].update(sequence_length=81), r"the sizes of shape and puzzles differ"),
        (lambda c: c["shape"].update(hidden_size=24), r"y_init: shape is \[16\]"),
        (lambda c: c["shape"].update(num_hidden_layers=1), r"tensors not in the model: network.layers.1"),
    ],
)
def test_folders_that_are_not_right(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    save_trm(tmp_path / "a", model_of(), FORMAT)
    edited(tmp_path / "a", change)
    with pytest.raises(CheckpointError, match=message):
        load_trm(tmp_path / "a")


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    save_trm(tmp_path / "a", model_of(), FORMAT)
    file = tmp_path / "a" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-6] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"z_init: .* does not hold the tensor that tafkir.json describes"):
        load_trm(tmp_path / "a")
    load_trm(tmp_path / "a", verify_hashes=False)


def test_a_decoder_is_no_recursive_model(tmp_path: Path) -> None:
    save_trm(tmp_path / "a", model_of(), FORMAT)
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "a")


def official(model: Trm) -> dict[str, Tensor]:
    names = official_names(list(model.state_dict()), model.shape)
    return {OFFICIAL_PREFIX + theirs: model.state_dict()[ours].clone() for ours, theirs in names.items()}


@pytest.mark.parametrize("given", [{"mixer": "mlp"}, {}, {"latents": "z"}, {"position_encoding": "learned"}])
def test_official_weights(given: dict[str, str], tmp_path: Path) -> None:
    model = model_of(**given)
    torch.save(official(model), tmp_path / "step_10")
    save_file(official(model), tmp_path / "official.safetensors")
    for name in ("step_10", "official.safetensors"):
        loaded = load_official_trm(tmp_path / name, **KNOWN, prefix_length=2, sequence_length=16)
        assert loaded.shape == model.shape and not loaded.training
        inputs = torch.randint(0, 6, (2, 16), generator=torch.Generator().manual_seed(0))
        ours, theirs = (next(m.eval().steps(inputs)).logits for m in (model, loaded))
        assert torch.equal(ours, theirs)


def test_hrm_weights(tmp_path: Path) -> None:
    model = model_of(separate_networks=True, gradient="one_step", prefix_length=1)
    torch.save(official(model), tmp_path / "hrm")
    loaded = load_official_trm(tmp_path / "hrm", **KNOWN, sequence_length=16)
    assert loaded.shape == model.shape, "two networks, one prefix position and one-step gradients show"


def test_the_mlp_variant_of_another_length(tmp_path: Path) -> None:
    torch.save(official(model_of(mixer="mlp")), tmp_path / "step")
    with pytest.raises(
        CheckpointError, match=r"sequence_length is 16 by the weights; expected 81: .* tied to one length"
    ):
        load_official_trm(tmp_path / "step", **KNOWN, prefix_length=2, sequence_length=81)


def test_official_files_that_are_not_right(tmp_path: Path) -> None:
    weights = official(model_of())
    with pytest.raises(CheckpointError, match="no such file"):
        load_official_trm(tmp_path / "none")
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_official_trm(tmp_path / "text")
    torch.save({"step": 3}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="something else than named tensors"):
        load_official_trm(tmp_path / "other")
    torch.save({"wte": torch.zeros(2, 2)}, tmp_path / "gpt")
    with pytest.raises(CheckpointError, match="not a TRM or HRM checkpoint"):
        load_official_trm(tmp_path / "gpt")
    del weights[OFFICIAL_PREFIX + "q_head.bias"]
    torch.save(weights, tmp_path / "less")
    with pytest.raises(CheckpointError, match=r"1 tensors missing: q_head.bias"):
        load_official_trm(tmp_path / "less", **KNOWN, prefix_length=2)
    with pytest.raises(CheckpointError, match=r"shape is \[\d+, 16\]"):
        torch.save(official(model_of()), tmp_path / "wide")
        load_official_trm(tmp_path / "wide", prefix_length=2)
