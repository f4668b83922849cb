"""What a table of names consists of, and the rules that most families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tafkir.recipe.model import ModelConfig

__all__ = ["DENSE", "EXPERTS", "MTP", "NORMS", "QKV", "Resolved", "StreamTable", "WeightRule", "WeightTable", "renamed"]

Rows = Callable[[ModelConfig], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class WeightRule:
    """One tensor of ours and the tensors of theirs that it is made of.

    Ours is the concatenation of `theirs` along dim 0, in order, in parts of equal length or of `rows(config)`; where
    `{expert}` occurs, one such concatenation per expert, stacked. `float32` tensors keep that dtype on disk.
    """

    ours: str
    theirs: tuple[str, ...]
    float32: bool = False
    rows: Rows | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """A tensor of a decoder with the names it is made of: per expert, then per part of `rows` lengths."""

    name: str
    parts: tuple[tuple[str, ...], ...]
    stacked: bool
    rows: tuple[int, ...] | None
    float32: bool


@dataclass(frozen=True, slots=True)
class WeightTable:
    """The names of one architecture.

    Attributes:
        name: the entry of `architectures` in config.json.
        model: rules for what stands outside the layers; whole names.
        layer: rules for what stands in a decoder layer; names behind `layers.N.` and `model.layers.N.`.
        mtp: rules for what a multi-token-prediction layer has besides its decoder layer. Layer k stands behind the
            decoder's own as `model.layers.{num_hidden_layers + k}.`
        mtp_copies: what checkpoints repeat in every such layer -> the name of the tensor of ours that it equals.
    """

    name: str
    model: tuple[WeightRule, ...]
    layer: tuple[WeightRule, ...]
    mtp: tuple[WeightRule, ...]
    mtp_copies: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StreamTable:
    """The names of residual streams, which go with any family's; scopes as in `WeightTable`."""

    model: tuple[WeightRule, ...] = ()
    layer: tuple[WeightRule, ...] = ()
    mtp: tuple[WeightRule, ...] = ()


def _qkv_rows(config: ModelConfig) -> tuple[int, ...]:
    kv = config.num_key_value_heads * config.head_dim
    return config.num_attention_heads * config.head_dim, kv, kv


def renamed(pairs: Mapping[str, str]) -> tuple[WeightRule, ...]:
    """Rules for weights that differ in their name alone: ours -> theirs, without `.weight`."""
    return tuple(WeightRule(f"{ours}.weight", (f"{theirs}.weight",)) for ours, theirs in pairs.items())


def _gate_up(ours: str, theirs: str) -> tuple[WeightRule, ...]:
    return (
        WeightRule(f"{ours}.gate_up_proj.weight", (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")),
        WeightRule(f"{ours}.down_proj.weight", (f"{theirs}.down_proj.weight",)),
    )


NORMS = renamed({name: name for name in ("input_layernorm", "post_attention_layernorm")})

DENSE = _gate_up("mlp", "mlp")

EXPERTS = (
    WeightRule("mlp.router.weight", ("mlp.gate.weight",)),
    WeightRule(
        "mlp.experts.gate_up_proj",
        ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    ),
    WeightRule("mlp.experts.down_proj", ("mlp.experts.{expert}.down_proj.weight",)),
    *_gate_up("mlp.shared_experts", "mlp.shared_experts"),
)
"""A router without a bias, routed and shared experts."""

QKV = (
    *(
        WeightRule(
            f"attention.qkv_proj.{kind}", tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv"), rows=_qkv_rows
        )
        for kind in ("weight", "bias")
    ),
    WeightRule("attention.o_proj.weight", ("self_attn.o_proj.weight",)),
    WeightRule("attention.o_proj.bias", ("self_attn.o_proj.bias",)),
    *renamed({"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}),
)
"""Grouped-query attention with projections apart."""

MTP = renamed({"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"})
"""As DeepSeek-V3 names it."""
