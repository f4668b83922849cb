"""What the config says a model has is what the built one has, and what the published models are said to have."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from tafkir.errors import RecipeError
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.models.hf import resolve_names, table_for
from tafkir.models.mla import LatentAttention
from tafkir.recipe.hf_config import config_from_hf, config_to_hf
from tafkir.recipe.model import LayerSpec, ModelConfig, MtpConfig
from tafkir.recipe.presets import list_presets, load_preset

PRESETS = sorted(list_presets())


def billions(number: int, digits: int = 2) -> float:
    return round(number / 1e9, digits)


@pytest.mark.parametrize(
    ("name", "total", "active", "active_non_embedding"),
    [
        ("ring-mini-2.0", 16.26, 1.43, 0.789),
        ("ring-flash-2.0", 102.89, 6.15, 4.865),
        ("ring-1t", 999.71, 51.05, 48.479),
        ("deepseek-v3", 671.03, 37.55, 35.699),
        ("deepseek-r1", 671.03, 37.55, 35.699),
    ],
)
def test_published_sizes_follow_from_the_config_alone(
    name: str, total: float, active: float, active_non_embedding: float
) -> None:
    counts = load_preset(name).parameter_counts()
    assert (billions(counts.total), billions(counts.active)) == (total, active)
    assert billions(counts.active_non_embedding, 3) == active_non_embedding


def test_published_sizes_to_the_last_parameter() -> None:
    """DeepSeek-V3's 671,026,419,200 count the 58 x 256 router biases, which are buffers here."""
    assert load_preset("deepseek-v3").num_parameters() + 58 * 256 == 671_026_419_200
    # Qwen3-0.6B and 30B-A3B as their model cards count them: 0.6B (0.44B non-embedding), 30.5B (29.9B), 3.3B active.
    small, moe = load_preset("qwen3-0.6b"), load_preset("qwen3-30b-a3b")
    assert (billions(small.num_parameters()), billions(small.num_parameters(embeddings=False))) == (0.6, 0.44)
    assert billions(moe.num_parameters(), 1) == 30.5
    assert billions(moe.num_parameters(embeddings=False), 1) == 29.9
    assert billions(moe.num_parameters(active=True), 2) == 3.35
    assert billions(load_preset("glm-4.5-air").num_parameters(), 1) == 106.9


def test_one_mtp_layer_of_flash_adds_what_was_published() -> None:
    base, chat = load_preset("ling-flash-base-2.0"), load_preset("ring-flash-2.0")
    assert base.num_parameters() == chat.num_parameters()
    assert billions(base.parameter_counts().mtp) == 3.31
    assert billions(base.num_parameters(mtp=True)) == 106.2
    mini = load_preset("ring-mini-2.0").model_copy(update={"mtp": MtpConfig()})
    assert billions(mini.num_parameters(mtp=True)) == 17.08
    # DeepSeek-V3's README_WEIGHTS.md says 11.5B; one MoE layer, the projection and three norms make 11.61B.
    assert billions(load_preset("deepseek-v3").parameter_counts().mtp, 1) == 11.6


def test_the_rumour_is_counted_and_called_a_rumour() -> None:
    config = load_preset("r2-rumoured")
    assert billions(config.num_parameters(), 0) == 1203
    assert billions(config.num_parameters(active=True), 0) == 78
    assert "rumour, not a model" in list_presets()["r2-rumoured"]
    dense, routed = LayerSpec("mla", "dense"), LayerSpec("mla", "moe")
    assert config.layer_specs == (dense,) * 4 + (routed,) * 56
    assert config.num_shared_experts == 1


def test_cache_and_flops_of_the_published_models() -> None:
    per_token = {name: load_preset(name).kv_bytes_per_token(2) for name in PRESETS}
    assert per_token["ring-mini-2.0"] == 40 * 1024
    assert per_token["ring-flash-2.0"] == 64 * 1024
    assert per_token["ring-1t"] == 320 * 1024
    assert per_token["deepseek-v3"] == 61 * 576 * 2
    for name in PRESETS:
        config = load_preset(name)
        head = config.vocab_size * config.hidden_size
        assert config.flops_per_token() == 2 * (config.num_parameters(active=True, embeddings=False) + head)
        value_dim = config.v_head_dim or config.head_dim
        slope = 2 * config.num_hidden_layers * config.num_attention_heads * (config.head_dim + value_dim)
        assert config.flops_per_token(100) - config.flops_per_token() == 100 * slope


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_model_with_names_and_survives_the_round_trip(name: str) -> None:
    config = load_preset(name)
    assert config_from_hf(config_to_hf(config)) == config
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(p.numel() for p in decoder.parameters()) == config.num_parameters(mtp=True)
    assert len(resolve_names(decoder, table_for(config))) == len(decoder.state_dict())
    assert list_presets()[name]


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(
        RecipeError, match=r"ring-flash: no such preset; expected one of .*did you mean 'ring-flash-2\.0'"
    ):
        load_preset("ring-flash")


def test_presets_need_no_torch() -> None:
    script = "import sys; from tafkir.recipe.presets import *; [load_preset(n) for n in list_presets()];"
    done = subprocess.run(
        [sys.executable, "-c", script + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


MLA: dict[str, Any] = {
    "attention_type": "mla",
    "num_key_value_heads": 4,
    "head_dim": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "use_qk_norm": False,
}


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig(tie_word_embeddings=True, num_shared_experts=0),
        ModelConfig(use_qk_norm=False, first_k_dense_replace=3, num_shared_experts=2),
        ModelConfig(num_hidden_layers=2, first_k_dense_replace=5),
        ModelConfig(attention_bias=True, attention_output_bias=True, num_experts=0),
        ModelConfig(attention_bias=True, mtp=MtpConfig(depth=2), mlp_only_layers=(2,), decoder_sparse_step=2),
        ModelConfig(**MLA),
        ModelConfig(**MLA, q_lora_rank=10, attention_bias=True, attention_output_bias=True, mtp=MtpConfig()),
    ],
    ids=["default", "tied", "no qk-norm", "all dense", "no experts", "biased, MTP", "MLA", "MLA, MTP"],
)
def test_the_built_module_has_what_the_config_counts(config: ModelConfig) -> None:
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(p.numel() for p in decoder.parameters()) == config.num_parameters(mtp=True)
    built = [
        LayerSpec(
            "mla" if isinstance(layer.attention, LatentAttention) else "gqa",
            "moe" if any("router" in name for name, _ in layer.named_parameters()) else "dense",
        )
        for layer in decoder.layers
    ]
    assert tuple(built) == config.layer_specs


def test_active_parameters_are_those_that_a_token_meets() -> None:
    """Gradients tell: what a single token leaves without one is an expert or an embedding that it does not visit."""
    config = ModelConfig(hidden_size=16, moe_intermediate_size=8, intermediate_size=24, vocab_size=16, num_experts=8)
    decoder = build_decoder(config, 0)
    decoder.logits(decoder(torch.tensor([3]), torch.tensor([5]), VarlenCausal([0, 1])).hidden_ND).sum().backward()
    met = 0
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            met += sum(grad.numel() for grad in parameter.grad if grad.any())
        else:
            met += parameter.numel()
    assert met == config.num_parameters(active=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_only_layers": (4,)}, "not among the 4 layers"),
        ({"rope_interleave": True}, "rope_interleave needs attention_type='mla'"),
        ({"num_experts": 30}, "not a multiple of n_group=4"),
        ({"topk_group": 5}, "topk_group=5 exceeds n_group=4"),
        ({"num_experts_per_tok": 17}, "exceeds the 16 experts of topk_group groups"),
    ],
)
def test_layers_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate(changes)
