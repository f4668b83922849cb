"""GLM-4.5: Qwen3-MoE's names, a shared expert and a biased router."""

from __future__ import annotations

from dataclasses import replace

from tafkir.models.hf.deepseek import COPIES, ROUTER_BIAS
from tafkir.models.hf.qwen3 import QWEN3_MOE

__all__ = ["GLM4_MOE"]

GLM4_MOE = replace(QWEN3_MOE, name="Glm4MoeForCausalLM", layer=(*QWEN3_MOE.layer, ROUTER_BIAS), mtp_copies=COPIES)
