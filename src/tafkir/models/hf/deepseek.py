"""DeepSeek-V3 and R1: multi-head latent attention. DeepSeek-V4: hyper-connections, whatever stands between them."""

from __future__ import annotations

from tafkir.models.hf.table import DENSE, EXPERTS, MTP, NORMS, StreamTable, WeightRule, WeightTable, renamed

__all__ = ["COPIES", "DEEPSEEK_V3", "DEEPSEEK_V4_STREAMS", "ROUTER_BIAS"]

ROUTER_BIAS = WeightRule("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",), float32=True)

COPIES = {"embed_tokens.weight": "embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
"""DeepSeek-V3:README_WEIGHTS.md: the embedding and the output head are repeated in the multi-token-prediction layer."""

DEEPSEEK_V3 = WeightTable(
    name="DeepseekV3ForCausalLM",
    model=renamed({"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}),
    layer=(
        *NORMS,
        *renamed(
            {
                "attention.q_proj": "self_attn.q_proj",
                "attention.q_a_proj": "self_attn.q_a_proj",
                "attention.q_a_norm": "self_attn.q_a_layernorm",
                "attention.q_b_proj": "self_attn.q_b_proj",
                "attention.kv_a_proj": "self_attn.kv_a_proj_with_mqa",
                "attention.kv_a_norm": "self_attn.kv_a_layernorm",
                "attention.kv_b_proj": "self_attn.kv_b_proj",
                "attention.o_proj": "self_attn.o_proj",
            }
        ),
        WeightRule("attention.q_a_proj.bias", ("self_attn.q_a_proj.bias",)),
        WeightRule("attention.kv_a_proj.bias", ("self_attn.kv_a_proj_with_mqa.bias",)),
        WeightRule("attention.o_proj.bias", ("self_attn.o_proj.bias",)),
        *DENSE,
        *EXPERTS,
        ROUTER_BIAS,
    ),
    mtp=MTP,
    mtp_copies=COPIES,
)


def _maps(ours: str, theirs: str) -> tuple[WeightRule, ...]:
    """The three tensors of a mapping; `theirs` is what stands before `fn`, `base` and `scale`."""
    pairs = {"phi": "fn", "bias": "base", "alpha": "scale"}
    return tuple(WeightRule(f"{ours}.{mine}", (theirs + name,), float32=True) for mine, name in pairs.items())


DEEPSEEK_V4_STREAMS = StreamTable(
    model=_maps("residual", "model.hc_head.hc_"),
    layer=(*_maps("attention_residual", "attn_hc."), *_maps("mlp_residual", "ffn_hc.")),
    mtp=_maps("residual", "hc_head.hc_"),
)
"""As transformers names them; rows of `fn` in the order [pre | post | comb]."""
