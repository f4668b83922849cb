"""What a GGUF file says of a model besides its weights: sizes, how it routes and rotates, and its tokenizer.

The keys are those that llama.cpp's own converter writes for the same family; the `gguf` package knows their names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tafkir.checkpoint.files import read_json
from tafkir.errors import CheckpointError
from tafkir.recipe.model import ModelConfig

__all__ = ["ARCHITECTURES", "GgufTokenizer", "architecture_of", "model_fields", "read_gguf_tokenizer"]

ARCHITECTURES: Mapping[str, str] = {
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "bailing_moe_v2": "bailingmoe2",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
}
"""llama.cpp's name of each family."""

# By a piece of the pattern that splits text before byte pairs are merged: the name under which llama.cpp has it.
_SPLITS: tuple[tuple[str, str], ...] = (
    (r"\\[A-Za-z]+\{?|", "superbpe"),  # Tafkir's own: llama.cpp's has no LaTeX, and this splits at digits alone
    (r"[一-龥぀-ゟ゠-ヿ]+", "deepseek-v3"),
    (r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*", "glm4"),
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|", "qwen2"),
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}|", "bailingmoe"),
)
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType


def architecture_of(config: ModelConfig, where: str) -> str:
    """The family's name in llama.cpp.

    Raises:
        CheckpointError: the model computes something that llama.cpp's graph of the family does not.
    """
    if config.residual.kind != "plain":
        raise CheckpointError(
            f"residual = {config.residual.kind!r}: llama.cpp has one stream", where=where, expected="plain"
        )
    dense = 0 if config.model_type in ("qwen3", "qwen3_moe") else config.first_k_dense_replace
    for layer, spec in enumerate(config.layer_specs):
        wanted = "moe" if config.num_experts and layer >= dense else "dense"
        if spec.ffn != wanted:
            raise CheckpointError(
                f"layer {layer} is {spec.ffn}", where=where, expected=f"{wanted}, as llama.cpp has it in this family"
            )
    return ARCHITECTURES[config.model_type]


def model_fields(config: ModelConfig) -> dict[str, int | float | bool | str]:
    """The keys of a model, without the family's name before them, by the dotted rest."""
    fields: dict[str, int | float | bool | str] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    return fields | _attention_fields(config) | _expert_fields(config) | _rope_scaling_fields(config)


def _attention_fields(config: ModelConfig) -> dict[str, int | float | bool | str]:
    if config.attention_type != "mla":
        fields: dict[str, int | float | bool | str] = {
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
        }
        if config.model_type in ("bailing_moe_v2", "glm4_moe"):
            fields["rope.dimension_count"] = config.rotary_dim or int(config.head_dim * config.partial_rotary_factor)
        return fields
    mla = config.mla
    rank, rope = mla.kv_lora_rank, mla.qk_rope_head_dim
    # Absorbed: one head of keys, the latent with the rotated part, of which the latent is the value.
    fields = {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": mla.qk_nope_head_dim + rope,
        "attention.value_length_mla": mla.v_head_dim,
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rope,
    }
    return fields | ({"attention.q_lora_rank": mla.q_lora_rank} if mla.q_lora_rank else {})


def _expert_fields(config: ModelConfig) -> dict[str, int | float | bool | str]:
    if not config.num_experts:
        return {}
    fields: dict[str, int | float | bool | str] = {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_gating_func": 1 if config.score_function == "softmax" else 2,
    }
    if config.model_type == "qwen3_moe":
        return fields
    fields |= {
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_shared_count": config.num_shared_experts,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": config.norm_topk_prob,
    }
    if config.n_group > 1:
        fields |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    if config.model_type == "bailing_moe_v2":
        fields["expert_shared_feed_forward_length"] = config.moe_intermediate_size * config.num_shared_experts
    return fields


def _rope_scaling_fields(config: ModelConfig) -> dict[str, int | float | bool | str]:
    yarn = config.rope_scaling
    if yarn is None:
        return {}
    fields: dict[str, int | float | bool | str] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": yarn.factor,
        "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": yarn.beta_fast,
        "rope.scaling.yarn_beta_slow": yarn.beta_slow,
    }
    if config.attention_type == "mla":
        fields["rope.scaling.yarn_log_multiplier"] = 0.1 * (yarn.mscale_all_dim or 0.0)
    return fields


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """A byte-level BPE tokenizer as GGUF has it.

    Attributes:
        pre: llama.cpp's name for how text is split before merging.
        tokens: by id; ids without a token have a name of their own.
        types: of the tokens, `gguf.TokenType`.
        merges: "left right".
        ids: such as eos_token_id, by key.
        chat_template: Jinja, where there is one.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    ids: dict[str, int]
    chat_template: str | None


def read_gguf_tokenizer(folder: Path, config: ModelConfig) -> GgufTokenizer:
    """The tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: tokenizer.json is missing, is not byte-level BPE, or splits text in a way that llama.cpp has
            no name for.
    """
    file = folder / "tokenizer.json"
    content = read_json(file)
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise CheckpointError(f"the tokenizer is {model.get('type')}", where=str(file), expected="byte-level BPE")
    split = json.dumps(content.get("pre_tokenizer"), ensure_ascii=False).replace("\\\\", "\\")
    pre = next((name for piece, name in _SPLITS if piece in split), None)
    if pre is None:
        raise CheckpointError(
            "llama.cpp has no name for how this tokenizer splits text", where=f"{file}: pre_tokenizer",
            expected=f"one of {', '.join(name for _, name in _SPLITS)}",
        )  # fmt: skip
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [_UNUSED] * config.vocab_size
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    for text, index in (*model["vocab"].items(), *((t["content"], i) for i, t in added.items())):
        if index >= config.vocab_size:
            raise CheckpointError(f"token {index} is beyond the {config.vocab_size} of the model", where=str(file))
        kind = _NORMAL if index not in added else _CONTROL if added[index].get("special") else _USER_DEFINED
        tokens[index], types[index] = text, kind
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return GgufTokenizer(pre, tokens, types, merges, _special_ids(folder), _chat_template(folder))


def _special_ids(folder: Path) -> dict[str, int]:
    ids: dict[str, int] = {}
    for name in ("config.json", "generation_config.json"):
        found = read_json(folder / name) if (folder / name).is_file() else {}
        for key, ours in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
            value = found.get(key)
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int):
                ids.setdefault(ours, value)
    return ids


def _chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "tokenizer_config.json").is_file():
        template = read_json(folder / "tokenizer_config.json").get("chat_template")
        return template if isinstance(template, str) else None
    return None
