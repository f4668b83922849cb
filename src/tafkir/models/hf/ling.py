"""Ling 2.0 and Ring 2.0: fused projections, names of their own for embeddings and attention."""

from __future__ import annotations

from tafkir.models.hf.table import DENSE, EXPERTS, NORMS, WeightRule, WeightTable, renamed

__all__ = ["LING"]

LING = WeightTable(
    name="BailingMoeV2ForCausalLM",
    model=renamed({"embed_tokens": "model.word_embeddings", "norm": "model.norm", "lm_head": "lm_head"}),
    layer=(
        *NORMS,
        *renamed(
            {
                "attention.qkv_proj": "attention.query_key_value",
                "attention.o_proj": "attention.dense",
                "attention.q_norm": "attention.query_layernorm",
                "attention.k_norm": "attention.key_layernorm",
            }
        ),
        *DENSE,
        *EXPERTS,
        WeightRule("mlp.router.expert_bias", ("mlp.gate.expert_bias",), float32=True),
    ),
    mtp=renamed({"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "final_layernorm"}),
)
