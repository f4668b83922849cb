"""DeepSeek-V4's residual streams on disk: under the names of transformers' class, with its numbers, there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tafkir.checkpoint import load_checkpoint, save_checkpoint
from tafkir.errors import CheckpointError
from tafkir.models.build import build_decoder
from tafkir.models.hf import write_hf_tensors
from tafkir.models.residual import StreamState
from tafkir.recipe.model import ModelConfig, MtpConfig
from tafkir.recipe.residual import ResidualConfig

HIDDEN, STREAMS, LAYERS = 16, 3, 2
FAMILIES: dict[str, dict[str, Any]] = {
    "bailing_moe_v2": {},
    "deepseek_v3": {
        "attention_type": "mla",
        "num_key_value_heads": 2,
        "kv_lora_rank": 6,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
        "use_qk_norm": False,
    },
}


def config_of(family: str, depth: int = 0) -> ModelConfig:
    shape: dict[str, Any] = {
        "model_type": family,
        "vocab_size": 40,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "n_group": 2,
        "rms_norm_eps": 1e-5,
        "residual": ResidualConfig(kind="deepseek_v4", num_streams=STREAMS),
        "mtp": MtpConfig(depth=depth) if depth else None,
    }
    return ModelConfig.model_validate(shape | FAMILIES[family])


def is_stream(name: str) -> bool:
    return any(part in name for part in ("attn_hc.", "ffn_hc.", "hc_head."))


def v4_model() -> Any:
    """transformers' DeepSeek-V4, tiny, its streams' weights random."""
    deepseek = pytest.importorskip("transformers.models.deepseek_v4")
    config = deepseek.DeepseekV4Config(
        vocab_size=40,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        head_dim=8,
        q_lora_rank=8,
        o_lora_rank=8,
        o_groups=1,
        moe_intermediate_size=8,
        n_routed_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        hc_mult=STREAMS,
        rms_norm_eps=1e-5,
        pad_token_id=0,
    )
    model = deepseek.DeepseekV4ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_stream(name):
                parameter.normal_(0.0, 0.3 if parameter.ndim == 2 else 1.0, generator=generator)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_and_shapes_are_those_of_transformers(family: str) -> None:
    """Whatever stands between the streams: `model.layers.N.attn_hc.fn`, ..., `model.hc_head.hc_scale`."""
    theirs = {name: tuple(p.shape) for name, p in v4_model().named_parameters() if is_stream(name)}
    written = dict(write_hf_tensors(build_decoder(config_of(family), 0), torch.bfloat16))
    ours = {name: tensor for name, tensor in written.items() if is_stream(name)}
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == theirs
    assert len(ours) == LAYERS * 6 + 3
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    assert not any("residual" in name for name in written)


@torch.no_grad()
def test_what_transformers_names_so_computes_the_same_here(tmp_path: Path) -> None:
    """Their tensors under their names in a file of ours; each connection and the way out, against their modules."""
    theirs, folder = v4_model(), tmp_path / "model"
    save_checkpoint(folder, build_decoder(config_of("deepseek_v3"), 0))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, parameter in theirs.named_parameters():
        if is_stream(name):
            assert name in tensors
            tensors[name] = parameter.detach().clone()
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "tafkir.json").unlink()
    decoder = load_checkpoint(folder).decoder
    x_NnD = torch.randn(9, STREAMS, HIDDEN, generator=torch.Generator().manual_seed(1))
    y_ND = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(2))
    close = {"rtol": 0, "atol": 5e-6}
    for i in range(LAYERS):
        for ours, module in (
            (decoder.get_submodule(f"layers.{i}.attention_residual"), theirs.model.layers[i].attn_hc),
            (decoder.get_submodule(f"layers.{i}.mlp_residual"), theirs.model.layers[i].ffn_hc),
        ):
            post, comb, collapsed = module(x_NnD.unsqueeze(0))
            u_ND, context = ours.read(StreamState(x_NnD, None))
            torch.testing.assert_close(u_ND, collapsed[0], **close)
            expected = post[0].unsqueeze(-1) * y_ND.unsqueeze(1) + torch.einsum("njd,nji->nid", x_NnD, comb[0])
            written = ours.write(StreamState(x_NnD, None), context, y_ND).x_NnD
            torch.testing.assert_close(written, expected, **close)
    out: Tensor = theirs.model.hc_head(x_NnD.unsqueeze(0))[0]
    torch.testing.assert_close(decoder.residual.exit(StreamState(x_NnD, None)), out, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family: str, depth: int, dtype: torch.dtype, tmp_path: Path) -> None:
    decoder = build_decoder(config_of(family, depth), 3).to(dtype)
    save_checkpoint(tmp_path / "one", decoder, dtype=dtype)
    loaded = load_checkpoint(tmp_path / "one", dtype=dtype).decoder
    assert loaded.config.residual == decoder.config.residual
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    save_checkpoint(tmp_path / "two", loaded, dtype=dtype)
    first, second = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two"))
    assert first == second
    stored = load_file(tmp_path / "one" / "model.safetensors")
    mtp = {name for name in stored if name.startswith(f"model.layers.{LAYERS}.") and is_stream(name)}
    assert len(mtp) == depth * 9  # two connections, and the layer's own way out
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["tafkir"]["residual"]["kind"] == "deepseek_v4"


def test_a_missing_map_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", build_decoder(config_of("bailing_moe_v2"), 3))
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.ffn_hc.base"]
    save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "model" / "tafkir.json").unlink()
    with pytest.raises(CheckpointError, match=r"1 tensors missing: model\.layers\.1\.ffn_hc\.base"):
        load_checkpoint(tmp_path / "model")
