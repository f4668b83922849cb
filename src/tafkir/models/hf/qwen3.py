"""Qwen3, dense and mixture-of-experts."""

from __future__ import annotations

from dataclasses import replace

from tafkir.models.hf.table import DENSE, EXPERTS, MTP, NORMS, QKV, WeightTable, renamed

__all__ = ["QWEN3", "QWEN3_MOE"]

QWEN3 = WeightTable(
    name="Qwen3ForCausalLM",
    model=renamed({"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}),
    layer=(*NORMS, *QKV, *DENSE),
    mtp=MTP,
)

QWEN3_MOE = replace(QWEN3, name="Qwen3MoeForCausalLM", layer=(*QWEN3.layer, *EXPERTS))
