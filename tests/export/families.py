"""A small model of every family that other engines know, for their tests."""

from __future__ import annotations

from typing import Any

import torch

from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.model import ModelConfig

BASE = find_checkpoint("base-tiny")
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_experts": 0, "num_shared_experts": 0, "first_k_dense_replace": 0, "partial_rotary_factor": 1.0,
              "use_expert_bias": False, "routed_scaling_factor": 1.0, "score_function": "softmax", "n_group": 1,
              "topk_group": 1},
    "qwen3_moe": {"num_shared_experts": 0, "first_k_dense_replace": 0, "partial_rotary_factor": 1.0, "n_group": 1,
                  "topk_group": 1, "use_expert_bias": False, "routed_scaling_factor": 1.0, "score_function": "softmax"},
    "deepseek_v3": {
        "attention_type": "mla", "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "head_dim": 64, "rope_interleave": True,
        "use_qk_norm": False, "partial_rotary_factor": 1.0,
    },
    "glm4_moe": {"use_qk_norm": True, "attention_bias": True, "n_group": 1, "topk_group": 1},
}  # fmt: skip


def build_family(family: str, **other: Any) -> Decoder:
    """A small decoder whose logits are spread, and whose norms are no ones."""
    sizes = {"model_type": family, "vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 3}
    decoder = build_decoder(ModelConfig.model_validate(sizes | FAMILIES[family] | other), seed=1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
            elif "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.2)
    return decoder
