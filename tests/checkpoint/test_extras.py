"""Models with parts of our own: written under our names, read back by us, and refused by a program that lacks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tafkir.checkpoint import load_checkpoint, load_config, save_checkpoint
from tafkir.errors import CheckpointError
from tafkir.models.build import build_decoder
from tafkir.recipe.model import ModelConfig, MtpConfig
from tafkir.recipe.residual import ResidualConfig

transformers = pytest.importorskip("transformers")

BASE = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_experts=4,
    n_group=2,
)
MHC = {"residual": ResidualConfig(kind="mhc", num_streams=2)}
EXTRAS: dict[str, dict[str, Any]] = {
    "mhc": MHC,
    "glm with mhc": MHC | {"model_type": "glm4_moe"},
    "mtp from hidden states first": {"mtp": MtpConfig(depth=1, concat_order="hidden_first")},
    "mhc and mtp": MHC | {"mtp": MtpConfig(depth=1, input_state="pre_norm")},
}


def config_with(case: str) -> ModelConfig:
    return ModelConfig.model_validate(BASE.model_dump() | EXTRAS[case])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", EXTRAS)
def test_it_is_read_back_by_us(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    decoder = build_decoder(config_with(case), seed=3).to(dtype)
    save_checkpoint(tmp_path / "model", decoder, dtype=dtype)
    assert load_config(tmp_path / "model").model_dump(include={"residual", "mtp"}) == decoder.config.model_dump(
        include={"residual", "mtp"}
    )
    loaded = load_checkpoint(tmp_path / "model", dtype=dtype).decoder
    ours, theirs = decoder.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == (torch.float32 if "expert_bias" in name else tensor.dtype), name
        assert torch.equal(theirs[name], tensor), name
    if "mhc" in case:
        # The maps of the residual streams stay float32 in memory and on disk.
        stored = load_file(tmp_path / "model" / "model.safetensors")
        maps = [name for name in stored if "_residual." in name]
        assert maps and {stored[name].dtype for name in maps} == {torch.float32}


@pytest.mark.parametrize("case", EXTRAS)
def test_a_plain_reader_refuses_it(case: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", build_decoder(config_with(case), seed=3))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"][0].startswith("Tafkir")
    assert config["tafkir"].keys() == EXTRAS[case].keys() - {"model_type"}
    with pytest.raises(ValueError, match=f"model type `{config['model_type']}`"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_it_cannot_be_passed_off_as_plain(tmp_path: Path) -> None:
    """With the plain names in config.json, what is left of the file no longer fits the model."""
    plain = build_decoder(BASE, seed=3)
    save_checkpoint(tmp_path / "plain", plain)
    save_checkpoint(tmp_path / "model", build_decoder(config_with("mhc"), seed=3))
    (tmp_path / "model" / "config.json").write_bytes((tmp_path / "plain" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: \d+ tensors not in the model: .*_residual\."):
        load_checkpoint(tmp_path / "model")


def test_mtp_layers_in_their_familys_own_form_are_plain(tmp_path: Path) -> None:
    """As Ling-flash-base has them: a program that knows the family reads them."""
    config = BASE.model_copy(update={"mtp": MtpConfig(depth=1)})
    save_checkpoint(tmp_path / "model", build_decoder(config, seed=3))
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["architectures"] == ["BailingMoeV2ForCausalLM"] and written["num_nextn_predict_layers"] == 1
    assert load_checkpoint(tmp_path / "model").config.mtp == config.mtp


def test_a_config_that_speaks_of_mtp_layers_that_are_not_there(tmp_path: Path) -> None:
    """transformers drops the layers on saving, but not the key."""
    save_checkpoint(tmp_path / "model", build_decoder(BASE, seed=3))
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": 1}))
    checkpoint = load_checkpoint(tmp_path / "model")
    assert checkpoint.config.mtp is None and checkpoint.decoder.config.mtp is None
