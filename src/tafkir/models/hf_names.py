"""Reversible tables between our names and Hugging Face's: weights and config keys, one table per architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.models.decoder import Decoder
from tafkir.recipe.model import ModelConfig

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "WeightRule",
    "architecture_of",
    "config_from_hf",
    "config_to_hf",
    "read_hf_tensors",
    "resolve_names",
    "write_hf_tensors",
]


@dataclass(frozen=True, slots=True)
class WeightRule:
    """One tensor of ours and the tensors of theirs that it is made of.

    `{layer}` and `{expert}` stand for indices. Ours is the concatenation of `theirs` along dim 0, in order; where
    `{expert}` occurs, one such concatenation per expert, stacked. `float32` tensors keep that dtype on disk.
    """

    ours: str
    theirs: tuple[str, ...]
    float32: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one Hugging Face architecture spells its weights and its config.

    Attributes:
        name: the entry of `architectures` in config.json.
        model_types: accepted spellings of `model_type`; the first is written.
        weights: one rule per tensor of ours.
        required: config keys that must be present.
        fixed: keys that change the arithmetic, with the only values that the decoder computes; first is written.
        optional: config keys of ours that may be present.
        ignored: keys that do not change the arithmetic.
    """

    name: str
    model_types: tuple[str, ...]
    weights: tuple[WeightRule, ...]
    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    @property
    def keys(self) -> frozenset[str]:
        """Config keys that are fields of `ModelConfig`."""
        return self.required | self.optional


_LING = Architecture(
    name="BailingMoeV2ForCausalLM",
    model_types=("bailing_moe_v2", "bailing_moe"),
    weights=(
        WeightRule("embed_tokens.weight", ("model.word_embeddings.weight",)),
        WeightRule("norm.weight", ("model.norm.weight",)),
        WeightRule("lm_head.weight", ("lm_head.weight",)),
        WeightRule("layers.{layer}.input_layernorm.weight", ("model.layers.{layer}.input_layernorm.weight",)),
        WeightRule(
            "layers.{layer}.post_attention_layernorm.weight",
            ("model.layers.{layer}.post_attention_layernorm.weight",),
        ),
        WeightRule(
            "layers.{layer}.attention.qkv_proj.weight", ("model.layers.{layer}.attention.query_key_value.weight",)
        ),
        WeightRule("layers.{layer}.attention.o_proj.weight", ("model.layers.{layer}.attention.dense.weight",)),
        WeightRule(
            "layers.{layer}.attention.q_norm.weight", ("model.layers.{layer}.attention.query_layernorm.weight",)
        ),
        WeightRule("layers.{layer}.attention.k_norm.weight", ("model.layers.{layer}.attention.key_layernorm.weight",)),
        WeightRule(
            "layers.{layer}.mlp.gate_up_proj.weight",
            ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
        ),
        WeightRule("layers.{layer}.mlp.down_proj.weight", ("model.layers.{layer}.mlp.down_proj.weight",)),
        WeightRule("layers.{layer}.mlp.router.weight", ("model.layers.{layer}.mlp.gate.weight",)),
        WeightRule(
            "layers.{layer}.mlp.router.expert_bias", ("model.layers.{layer}.mlp.gate.expert_bias",), float32=True
        ),
        WeightRule(
            "layers.{layer}.mlp.experts.gate_up_proj",
            (
                "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
                "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
            ),
        ),
        WeightRule(
            "layers.{layer}.mlp.experts.down_proj", ("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",)
        ),
        WeightRule(
            "layers.{layer}.mlp.shared_experts.gate_up_proj.weight",
            (
                "model.layers.{layer}.mlp.shared_experts.gate_proj.weight",
                "model.layers.{layer}.mlp.shared_experts.up_proj.weight",
            ),
        ),
        WeightRule(
            "layers.{layer}.mlp.shared_experts.down_proj.weight",
            ("model.layers.{layer}.mlp.shared_experts.down_proj.weight",),
        ),
    ),
    required=frozenset(
        (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "moe_intermediate_size",
            "num_experts",
            "num_experts_per_tok",
            "num_shared_experts",
            "n_group",
            "topk_group",
            "first_k_dense_replace",
            "routed_scaling_factor",
            "rope_theta",
            "max_position_embeddings",
            "rms_norm_eps",
            "tie_word_embeddings",
        )
    ),
    optional=frozenset(
        (
            "model_type",
            "norm_topk_prob",
            "score_function",
            "partial_rotary_factor",
            "rotary_dim",
            "use_qk_norm",
            "initializer_range",
        )
    ),
    fixed={
        "score_function": ("sigmoid",),
        "hidden_act": ("silu",),
        "use_bias": (False,),
        "use_qkv_bias": (False,),
        "use_rmsnorm": (True,),
        "norm_head": (False,),
        "norm_softmax": (False,),
        "rope_scaling": (None,),
        "use_sliding_window": (False,),
        "router_dtype": ("fp32", None),
        "moe_router_enable_expert_bias": (True,),
        "num_nextn_predict_layers": (0, None),
    },
    ignored=frozenset(
        (
            "_name_or_path",
            "architectures",
            "attention_dropout",
            "auto_map",
            "bos_token_id",
            "dtype",
            "embedding_dropout",
            "eos_token_id",
            "max_window_layers",
            "moe_shared_expert_intermediate_size",
            "mtp_loss_scaling_factor",
            "output_dropout",
            "output_router_logits",
            "pad_token_id",
            "torch_dtype",
            "transformers_version",
            "use_cache",
        )
    ),
)

ARCHITECTURES: Mapping[str, Architecture] = {_LING.name: _LING}


def architecture_of(hf_config: Mapping[str, Any], where: str) -> Architecture:
    """The table for a config.json.

    Raises:
        CheckpointError: no architecture is named, or one that is not in `ARCHITECTURES`.
    """
    names = hf_config.get("architectures") or []
    known = [ARCHITECTURES[name] for name in names if name in ARCHITECTURES]
    if not known:
        named = ", ".join(map(str, names)) or f"none (model_type {hf_config.get('model_type')!r})"
        raise CheckpointError(
            f"architecture {named} is not supported",
            where=where,
            expected=f"one of {', '.join(ARCHITECTURES)}",
            fix="choose a checkpoint of a supported architecture",
        )
    return known[0]


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json; `config_from_hf` reads it back to an equal config."""
    hf = {"architectures": [_LING.name], **config.model_dump(exclude_none=True, include=set(_LING.keys))}
    hf |= {key: values[0] for key, values in _LING.fixed.items()}
    hf["moe_shared_expert_intermediate_size"] = config.moe_intermediate_size
    return hf


def config_from_hf(hf_config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The decoder that a config.json describes.

    Raises:
        CheckpointError: the architecture is not supported, a key is missing or unknown, or a value asks for
            arithmetic that the decoder does not compute.
    """
    table = architecture_of(hf_config, where)
    keys = _unfold_rope_parameters(hf_config)
    model_type = keys.pop("model_type", table.model_types[0])
    if model_type not in table.model_types:
        raise CheckpointError(
            f"model_type is {model_type!r}", where=where, expected=f"one of {', '.join(table.model_types)}"
        )
    for key, allowed in table.fixed.items():
        value = keys.pop(key, allowed[0])
        if value not in allowed:
            raise CheckpointError(f"{key} = {value!r} is not supported", where=where, expected=f"{allowed[0]!r}")
    keys = {key: value for key, value in keys.items() if key not in table.ignored}
    _check_keys(keys, table, where)
    try:
        return ModelConfig.model_validate(keys)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "config"
        raise CheckpointError(f"{name}: {first['msg']}", where=where, fix="correct the file") from error


def _unfold_rope_parameters(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 gathers the RoPE keys in `rope_parameters`; lay them flat again."""
    keys = dict(hf_config)
    rope = keys.pop("rope_parameters", None) or {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            keys.setdefault(key, rope[key])
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = rope
    return keys


def _check_keys(keys: Mapping[str, Any], table: Architecture, where: str) -> None:
    missing = sorted(table.required - keys.keys())
    if keys.get("rotary_dim") is None and keys.get("partial_rotary_factor") is None:
        missing.append("rotary_dim or partial_rotary_factor")
    if missing:
        raise CheckpointError(f"keys are missing: {', '.join(missing)}", where=where, fix="take the model's own file")
    unknown = sorted(keys.keys() - table.keys)
    if unknown:
        raise CheckpointError(
            f"unknown keys: {', '.join(unknown)}",
            where=where,
            expected="keys whose effect on the arithmetic is known",
            fix="remove them if they change nothing",
        )


_LAYER = re.compile(r"(?<=^layers\.)\d+")


def resolve_names(decoder: Decoder, table: Architecture = _LING) -> list[tuple[str, list[list[str]], WeightRule]]:
    """For each tensor of the decoder: its name, the names it is made of (per expert, per part), and its rule.

    Raises:
        CheckpointError: the table has no rule for a tensor.
    """
    rules = {rule.ours: rule for rule in table.weights}
    resolved = []
    for name, tensor in decoder.state_dict(keep_vars=True).items():
        layer = _LAYER.search(name)
        rule = rules.get(_LAYER.sub("{layer}", name))
        if rule is None:
            raise CheckpointError(f"{table.name} has no name for this tensor", where=name)
        experts = range(tensor.shape[0]) if "{expert}" in rule.theirs[0] else range(1)
        parts = [
            [theirs.format(layer=layer.group() if layer else "", expert=expert) for theirs in rule.theirs]
            for expert in experts
        ]
        resolved.append((name, parts, rule))
    return resolved


def write_hf_tensors(decoder: Decoder, dtype: torch.dtype, table: Architecture = _LING) -> Iterator[tuple[str, Tensor]]:
    """Their tensors, one at a time, contiguous and on the CPU, in `dtype` (float32 where the rule says so)."""
    state = decoder.state_dict()
    for name, parts, rule in resolve_names(decoder, table):
        tensor = state[name].detach().to("cpu", torch.float32 if rule.float32 else dtype)
        stacked = "{expert}" in rule.theirs[0]
        for names, piece in zip(parts, tensor if stacked else [tensor], strict=True):
            for theirs, chunk in zip(names, piece.chunk(len(names)), strict=True):
                yield theirs, chunk.clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def read_hf_tensors(
    decoder: Decoder,
    available: Iterable[str],
    read: Callable[[str], Tensor],
    table: Architecture = _LING,
    *,
    read_into: Callable[[str, Tensor], None] | None = None,
) -> None:
    """Fill the decoder from their tensors, one at a time; strict in both directions.

    Args:
        available: names that the checkpoint holds.
        read: gives the tensor of a name; cast to the decoder's dtype on copying.
        read_into: where given, fills a part of the decoder with the tensor of a name instead, without a copy between;
            it casts, and raises a CheckpointError where the shape is another.

    Raises:
        CheckpointError: tensors are missing, left over, or of another shape; the message names them.
    """
    resolved = resolve_names(decoder, table)
    _check_names({name for _, parts, _ in resolved for names in parts for name in names}, set(available))
    state = decoder.state_dict()
    for name, parts, rule in resolved:
        ours = state[name]
        stacked = "{expert}" in rule.theirs[0]
        for names, piece in zip(parts, ours if stacked else [ours], strict=True):
            for theirs, place in zip(names, piece.chunk(len(names)), strict=True):
                if read_into is not None:
                    read_into(theirs, place)
                    continue
                tensor = read(theirs)
                if tensor.shape != place.shape:
                    raise CheckpointError(
                        f"shape is {list(tensor.shape)}",
                        where=theirs,
                        expected=f"{list(place.shape)} by config.json",
                        fix="use the config.json that belongs to these weights",
                    )
                place.copy_(tensor)


def _check_names(wanted: set[str], available: set[str]) -> None:
    missing, extra = sorted(wanted - available), sorted(available - wanted)
    if not missing and not extra:
        return
    problems = []
    for label, names in (("missing", missing), ("not in the model", extra)):
        if names:
            rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{len(names)} tensors {label}: {', '.join(names[:4])}{rest}")
    raise CheckpointError("; ".join(problems), fix="use the config.json that belongs to these weights")
