"""gpt-oss' MXFP4: read and written as transformers reads and writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tafkir.errors import CheckpointError, RecipeError
from tafkir.quant.convert import open_source, quantize_checkpoint
from tafkir.quant.relayout import relayout_checkpoint
from tafkir.quant.verify import audit_checkpoint
from tafkir.recipe.quantize import QuantizeConfig

STACK = "model.layers.1.mlp.experts.gate_up_proj"
CONFIG = QuantizeConfig(scheme="mxfp4", preset="r1-fp4", layout="gpt-oss")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt-oss") / "model"
    shape = GptOssConfig(
        num_hidden_layers=2, num_local_experts=3, vocab_size=32, hidden_size=64, intermediate_size=96, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(path)
    return path


def test_transformers_loads_what_is_written(source: Path, tmp_path: Path) -> None:
    result = quantize_checkpoint(source, tmp_path / "out", CONFIG)
    assert {row["format"] for row in result.rows if row["component"] == "experts"} == {"mxfp4"}
    stored, before = load_file(result.path / "model.safetensors"), load_file(source / "model.safetensors")
    assert stored[f"{STACK}_blocks"].shape == (3, 192, 2, 16) and stored[f"{STACK}_scales"].shape == (3, 192, 2)
    said = json.loads((result.path / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "mxfp4" and "lm_head" in said["modules_to_not_convert"]
    assert not any("experts" in name for name in said["modules_to_not_convert"])
    # Without a GPU transformers brings the codes back to BF16, which holds each of their values.
    theirs = AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.bfloat16).state_dict()
    with open_source(result.path) as (files, _):
        assert set(files.names) == set(before)
        for name in files.names:
            assert torch.equal(files.read(name).bfloat16(), theirs[name]), name
    assert torch.equal(theirs["lm_head.weight"], before["lm_head.weight"])
    error = {audit.name: audit.relative_mse for audit in audit_checkpoint(source, result.path)}
    assert 0.005 < error[STACK] < 0.02 and error["model.layers.0.self_attn.sinks"] == 0


def test_every_code_under_every_scale(source: Path, tmp_path: Path) -> None:
    """Against transformers' own arithmetic; a scale of 254 leaves BF16 for the largest codes, and is left out."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 250, 16, 16).contiguous()
    scales = torch.arange(250, dtype=torch.uint8).view(1, 250, 1).expand(1, 250, 16).contiguous()
    save_file({"a_blocks": codes, "a_scales": scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    with open_source(tmp_path) as (files, _):
        mine = torch.empty(files.shape("a"), dtype=torch.bfloat16)
        files.read_into("a", mine)
    theirs = convert_moe_packed_tensors(codes, scales, dtype=torch.bfloat16)
    assert mine.shape == (1, 512, 250) and torch.equal(mine.view(torch.int16), theirs.view(torch.int16))


def test_what_has_no_place_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="packs stacks of experts alone"):
        rules = [{"tensors": "*q_proj.weight", "format": "mxfp4"}]
        quantize_checkpoint(
            source, tmp_path / "a", QuantizeConfig.model_validate({**CONFIG.model_dump(), "rules": rules})
        )
    with pytest.raises(ValueError, match=r"no place for fp8_block; layout = 'compressed-tensors' does"):
        QuantizeConfig(scheme="mxfp4", layout="gpt-oss")
    quantize_checkpoint(source, tmp_path / "out", CONFIG)
    with pytest.raises(CheckpointError, match=r"experts.*neither layout has a place for stacks"):
        relayout_checkpoint(tmp_path / "out", tmp_path / "b", "modelopt")
    with pytest.raises(CheckpointError, match="stacks of experts, the others each by itself"):
        relayout_checkpoint(tmp_path / "out", tmp_path / "b", "gpt-oss")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    stored.pop(f"{STACK}_scales")
    save_file(stored, tmp_path / "out" / "model.safetensors")
    with (
        pytest.raises(CheckpointError, match="gate_up_proj_blocks: the codes have no scale"),
        open_source(tmp_path / "out"),
    ):
        pass
