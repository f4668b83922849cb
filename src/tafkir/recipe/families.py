"""Model families: how the config.json of each Hugging Face architecture spells what `ModelConfig` says. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAMILIES", "Family"]

Keys = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """The config keys of one architecture.

    Attributes:
        name: the entry of `architectures` in config.json.
        model_type: ours; what `ModelConfig.model_type` says.
        model_types: accepted spellings of theirs; the first is written.
        required: our field -> their key, for keys that must be present.
        optional: our field -> their key and the value where it is absent.
        implied: our fields that the architecture fixes.
        fixed: their keys that change the arithmetic, with the only values that the decoder computes; the first of them
            is written.
        ignored: their keys that do not change the arithmetic.
        has_mtp: whether `num_nextn_predict_layers` is one of their keys.
        complete: our fields that follow from other fields of ours.
        restate: keys of theirs that repeat what others say, as (their key, our fields -> its value); checked when
            present, written always.
    """

    name: str
    model_type: str
    model_types: tuple[str, ...]
    required: Mapping[str, str]
    optional: Mapping[str, tuple[str, Any]]
    implied: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    ignored: frozenset[str]
    has_mtp: bool = False
    complete: Callable[[Keys], Keys] = field(default=lambda ours: {})
    restate: Mapping[str, Callable[[Keys], Any]] = field(default_factory=dict)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_SHAPE = _same(
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "rope_theta",
    "max_position_embeddings",
    "rms_norm_eps",
)
_EXPERTS = _same("moe_intermediate_size", "num_experts_per_tok")
_GROUPS = _same("n_group", "topk_group", "first_k_dense_replace", "routed_scaling_factor")
_NO_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0}
_EVERYWHERE = {"tie_word_embeddings": ("tie_word_embeddings", False), "initializer_range": ("initializer_range", 0.02)}
_GQA = {"attention_type": "gqa", "rope_interleave": False}
_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": ()}
_SIGMOID = {"score_function": "sigmoid", "use_expert_bias": True}
_NOT_ARITHMETIC = frozenset(
    """_name_or_path architectures attention_dropout auto_map aux_loss_alpha bos_token_id dtype embedding_dropout
    eos_token_id ep_size max_window_layers mtp_loss_scaling_factor output_dropout output_router_logits pad_token_id
    pretraining_tp router_aux_loss_coef seq_aux torch_dtype transformers_version use_cache""".split()
)
_SILU = {"hidden_act": ("silu",)}


def _head_dim(ours: Keys) -> Keys:
    """What transformers takes where `head_dim` is absent."""
    if ours.get("head_dim") is not None:
        return {}
    return {"head_dim": ours["hidden_size"] // ours["num_attention_heads"]}


def _biased_output(ours: Keys) -> Keys:
    return {"attention_output_bias": ours["attention_bias"]}


_LING = Family(
    name="BailingMoeV2ForCausalLM",
    model_type="bailing_moe_v2",
    model_types=("bailing_moe_v2", "bailing_moe"),
    required=_SHAPE | _EXPERTS | _GROUPS | _same("head_dim", "num_experts", "num_shared_experts"),
    optional=_EVERYWHERE
    | {
        "partial_rotary_factor": ("partial_rotary_factor", None),
        "rotary_dim": ("rotary_dim", None),
        "norm_topk_prob": ("norm_topk_prob", True),
        "use_qk_norm": ("use_qk_norm", True),
    },
    implied=_GQA | _EVERY_LAYER | _SIGMOID | {"attention_bias": False, "attention_output_bias": False},
    fixed=_SILU
    | {
        "score_function": ("sigmoid",),
        "use_bias": (False,),
        "use_qkv_bias": (False,),
        "use_rmsnorm": (True,),
        "norm_head": (False,),
        "norm_softmax": (False,),
        "use_sliding_window": (False,),
        "router_dtype": ("fp32", None),
        "moe_router_enable_expert_bias": (True,),
    },
    ignored=_NOT_ARITHMETIC,
    has_mtp=True,
    restate={"moe_shared_expert_intermediate_size": lambda ours: ours["moe_intermediate_size"]},
)

_DEEPSEEK = Family(
    name="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    model_types=("deepseek_v3",),
    required=_SHAPE
    | _EXPERTS
    | _GROUPS
    | _same("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    | {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"},
    optional=_EVERYWHERE
    | {
        "attention_bias": ("attention_bias", False),
        "norm_topk_prob": ("norm_topk_prob", True),
        "rope_interleave": ("rope_interleave", True),
    },
    implied=_EVERY_LAYER | _SIGMOID | {"attention_type": "mla", "use_qk_norm": False},
    fixed=_SILU | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
    # transformers computes the last two anew, whatever the file says.
    ignored=_NOT_ARITHMETIC | {"head_dim", "qk_head_dim"},
    has_mtp=True,
    complete=lambda ours: _biased_output(ours) | {"head_dim": ours["qk_nope_head_dim"] + ours["qk_rope_head_dim"]},
)

_QWEN_FIXED = _SILU | {"use_sliding_window": (False,), "sliding_window": (None,)}
_QWEN_ATTENTION = _GQA | {"partial_rotary_factor": 1.0, "use_qk_norm": True}

_QWEN3 = Family(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    model_types=("qwen3",),
    required=_SHAPE | _same("head_dim"),
    optional=_EVERYWHERE | {"attention_bias": ("attention_bias", False)},
    implied=_QWEN_ATTENTION | _EVERY_LAYER | _NO_GROUPS | {"num_experts": 0, "num_shared_experts": 0},
    fixed=_QWEN_FIXED,
    ignored=_NOT_ARITHMETIC,
    complete=_biased_output,
    restate={"layer_types": lambda ours: ["full_attention"] * ours["num_hidden_layers"]},
)

_QWEN3_MOE = Family(
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    model_types=("qwen3_moe",),
    required=_SHAPE | _EXPERTS | _same("num_experts"),
    optional=_EVERYWHERE
    | {
        "head_dim": ("head_dim", None),
        "attention_bias": ("attention_bias", False),
        "norm_topk_prob": ("norm_topk_prob", False),
        "decoder_sparse_step": ("decoder_sparse_step", 1),
        "mlp_only_layers": ("mlp_only_layers", ()),
    },
    implied=_QWEN_ATTENTION
    | _NO_GROUPS
    | {"num_shared_experts": 0, "score_function": "softmax", "use_expert_bias": False},
    fixed=_QWEN_FIXED,
    ignored=_NOT_ARITHMETIC,
    complete=lambda ours: _head_dim(ours) | _biased_output(ours),
)

_GLM4_MOE = Family(
    name="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    model_types=("glm4_moe",),
    required=_SHAPE
    | _EXPERTS
    | _GROUPS
    | {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"},
    optional=_EVERYWHERE
    | {
        "head_dim": ("head_dim", None),
        "attention_bias": ("attention_bias", False),
        "norm_topk_prob": ("norm_topk_prob", True),
        "partial_rotary_factor": ("partial_rotary_factor", 0.5),
        "use_qk_norm": ("use_qk_norm", False),
    },
    implied=_GQA | _EVERY_LAYER | _SIGMOID | {"attention_output_bias": False},
    fixed=_SILU,
    ignored=_NOT_ARITHMETIC,
    has_mtp=True,
    complete=_head_dim,
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in (_LING, _DEEPSEEK, _QWEN3, _QWEN3_MOE, _GLM4_MOE)}
"""Every supported architecture, by the name that config.json gives it."""
