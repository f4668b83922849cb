"""Sharded folders to and from transformers: the same tensors, byte for byte, and everything that travels with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tafkir.checkpoint import load_checkpoint, save_checkpoint
from tafkir.models.build import build_decoder
from tafkir.recipe.model import ModelConfig

transformers = pytest.importorskip("transformers")

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_experts=8,
)


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and (folder / "model.safetensors.index.json").is_file()
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A bfloat16 GLM-4.5-MoE in shards, as transformers saves it, with what a chat model's folder has besides."""
    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    config = transformers.Glm4MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        num_mtp_layers=0,
    )
    model = transformers.Glm4MoeForCausalLM(config)
    biases = {name: torch.rand_like(buffer) for name, buffer in model.named_buffers() if "bias" in name}
    model.to(torch.bfloat16)
    for name, bias in biases.items():
        model.get_buffer(name).data = bias
    model.generation_config.update(temperature=0.6, do_sample=True, eos_token_id=[3, 5], pad_token_id=0)
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return model, folder


def test_theirs_to_ours_to_theirs_is_byte_identical(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = theirs
    decoder = load_checkpoint(folder, dtype=torch.bfloat16).decoder
    save_checkpoint(tmp_path / "out", decoder, dtype=torch.bfloat16, tokenizer_dir=folder, max_shard_bytes=20_000)
    original, back = stored_tensors(folder), stored_tensors(tmp_path / "out")
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16, torch.float32}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [3, 5]


def test_transformers_loads_what_we_write(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = theirs
    decoder = load_checkpoint(folder, dtype=torch.bfloat16).decoder
    save_checkpoint(tmp_path / "out", decoder, dtype=torch.bfloat16, tokenizer_dir=folder, max_shard_bytes=20_000)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert again.generation_config.temperature == 0.6
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_transformers_reads_the_config_of_a_family_that_it_does_not_know(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ling", build_decoder(TINY, 0))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ling", trust_remote_code=True)
    assert type(config).__name__ == "BailingMoeV2Config" and config.num_hidden_layers == 2
    assert load_checkpoint(tmp_path / "ling").decoder.config.hidden_size == 32
