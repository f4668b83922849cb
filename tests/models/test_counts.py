"""What the config says a model has is what the built one has, and what the published models are said to have."""

from __future__ import annotations

import pytest
import torch

from tafkir.models.decoder import Decoder
from tafkir.recipe.model import ModelConfig

RING_MINI = ModelConfig(
    vocab_size=157184,
    hidden_size=2048,
    num_hidden_layers=20,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    intermediate_size=5120,
    moe_intermediate_size=512,
    num_experts=256,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    rope_theta=6e5,
    max_position_embeddings=32768,
)
RING_FLASH = RING_MINI.model_copy(
    update={
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 9216,
        "moe_intermediate_size": 1024,
    }
)


def test_published_sizes_follow_from_the_config_alone() -> None:
    assert round(RING_MINI.num_parameters() / 1e9, 2) == 16.26
    assert round(RING_MINI.num_parameters(active=True) / 1e9, 2) == 1.43
    assert round(RING_MINI.num_parameters(active=True, embeddings=False) / 1e9, 3) == 0.789
    assert round(RING_FLASH.num_parameters() / 1e9, 2) == 102.89
    assert round(RING_FLASH.num_parameters(active=True) / 1e9, 2) == 6.15
    assert round(RING_FLASH.num_parameters(active=True, embeddings=False) / 1e9, 3) == 4.865
    assert RING_MINI.kv_bytes_per_token(2) == 40 * 1024
    assert RING_FLASH.kv_bytes_per_token(2) == 64 * 1024


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig(tie_word_embeddings=True, num_shared_experts=0),
        ModelConfig(use_qk_norm=False, first_k_dense_replace=3, num_shared_experts=2),
        ModelConfig(num_hidden_layers=2, first_k_dense_replace=5),
        RING_MINI,
        RING_FLASH,
    ],
    ids=["default", "tied", "no qk-norm", "all dense", "Ring-mini-2.0", "Ring-flash-2.0"],
)
def test_the_built_module_has_what_the_config_counts(config: ModelConfig) -> None:
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(p.numel() for p in decoder.parameters()) == config.num_parameters()
