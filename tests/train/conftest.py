"""The smallest decoder that has every part: two layers, the second with routed experts and a shared one."""

from __future__ import annotations

from tafkir.recipe.model import ModelConfig

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
)
