"""What a decoder is made of, as far as its costs go: parameters, cache and multiplications by part."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tafkir.plan.params import block_matrices
from tafkir.recipe.model import ModelConfig

__all__ = ["PLAIN_ARCHITECTURES", "ModelShape", "list_shapes", "load_shape", "shape_of", "shape_of_table"]

_TABLE = Path(__file__).resolve().parent / "tables" / "shapes.toml"
PLAIN_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Dense decoders with grouped-query attention that are counted from their config.json, and not built here."""

# A linear layer's state is kept in float32.
_STATE_BYTES = 4


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder in parts that shard and cost differently. Parameters are of all layers together.

    Attributes:
        mixer: `gqa` or `mla`.
        num_full_layers: layers whose cache grows with every token.
        num_windowed_layers: of those, layers that keep `window` tokens only.
        attended: tokens that a sparse attention reads at most; 0, all.
        num_linear_layers: layers with a state of constant size.
        state_bytes: that state, of one sequence over all its layers.
        qk_dim: width of a query or key head. v_dim: of a value head.
        kv_lora_rank: width of MLA's latent. rope_dim: of its rotated key.
        attention: matrices of attention. attention_out: those of them that are its output projections.
        attention_copied: those of them that tensor parallelism does not split (MLA's way down).
        dense: dense MLPs. shared: shared experts. router: routers. expert: one routed expert, of one layer.
        table: embedding table; the output head is as large. tied: they are one.
        other: norms, biases, residual mappings.
        mtp: multi-token-prediction layers, `mtp_matrices` of them linear maps inside the block; `mtp_active` a token.
        mtp_copies: the checkpoint repeats embedding table and head for them.
        streams: residual streams; 1 for a plain residual.
        routing_groups: nodes that a token's experts lie on at most; 0, any.
    """

    name: str
    num_layers: int
    hidden: int
    vocab: int
    mixer: str
    num_heads: int
    num_kv_heads: int
    qk_dim: int
    v_dim: int
    kv_lora_rank: int
    rope_dim: int
    num_full_layers: int
    num_windowed_layers: int
    window: int
    attended: int
    num_linear_layers: int
    state_bytes: int
    attention: int
    attention_out: int
    attention_copied: int
    dense: int
    shared: int
    router: int
    expert: int
    num_experts: int
    top_k: int
    num_moe_layers: int
    table: int
    tied: bool
    other: int
    mtp: int
    mtp_matrices: int
    mtp_active: int
    mtp_depth: int
    mtp_copies: bool
    streams: int
    routing_groups: int
    max_context: int

    @property
    def routed(self) -> int:
        """Parameters of all routed experts."""
        return self.expert * self.num_experts * self.num_moe_layers

    @property
    def embeddings(self) -> int:
        return self.table * (1 if self.tied else 2)

    @property
    def total(self) -> int:
        """All parameters but the multi-token-prediction layers."""
        return self.attention + self.dense + self.shared + self.router + self.routed + self.embeddings + self.other

    @property
    def active(self) -> int:
        """Parameters that one token meets, both embedding tables among them."""
        return self.total - self.routed + self.expert * self.top_k * self.num_moe_layers

    @property
    def active_without_input(self) -> int:
        """The same without the embedding table, which is looked up and not multiplied."""
        return self.active - (0 if self.tied else self.table)

    @property
    def active_non_embedding(self) -> int:
        return self.active - self.embeddings

    def kv_bytes_per_token(self, dtype_bytes: float = 2) -> float:
        """Cache that one more token takes over all layers, bytes; windowed layers are left out once they are full."""
        return (self.num_full_layers - self.num_windowed_layers) * self._kv_width * dtype_bytes

    def sequence_bytes(self, tokens: float, dtype_bytes: float = 2) -> float:
        """Cache and states of one sequence of so many tokens, bytes."""
        windowed = self.num_windowed_layers * min(tokens, self.window) * self._kv_width * dtype_bytes
        return tokens * self.kv_bytes_per_token(dtype_bytes) + windowed + self.state_bytes

    @property
    def _kv_width(self) -> int:
        if self.mixer == "mla":
            return self.kv_lora_rank + self.rope_dim
        return self.num_kv_heads * (self.qk_dim + self.v_dim)

    def seen(self, context: float) -> float:
        """Tokens that a position sees, summed over the layers, given the tokens that there are."""
        full = self.num_full_layers - self.num_windowed_layers
        most = min(context, self.attended) if self.attended else context
        return full * most + self.num_windowed_layers * min(context, self.window)

    def attention_flops(self, context: float, *, absorbed: bool = False) -> float:
        """FLOPs of one token's attention over `context` tokens and all layers: scores and sums.

        Args:
            context: tokens that it sees; (S + 1) / 2 in the mean over a causal prompt of S.
            absorbed: as MLA decodes, on latents (2 x heads x (2 x rank + rope) a token and layer).
        """
        width = self.qk_dim + self.v_dim
        if absorbed and self.mixer == "mla":
            width = 2 * self.kv_lora_rank + self.rope_dim
        return 2.0 * self.num_heads * width * self.seen(context) + 4.0 * self.state_bytes / _STATE_BYTES

    def forward_flops(self, context: float, *, absorbed: bool = False, head: bool = True) -> float:
        """FLOPs of one token: two for each active parameter, and attention over `context` tokens."""
        matrices = self.active_without_input - (0 if head else self.table)
        return 2.0 * matrices + self.attention_flops(context, absorbed=absorbed)


def shape_of(config: ModelConfig, name: str = "model") -> ModelShape:
    """A decoder's parts, from its config; they add up to `config.parameter_counts()`."""
    counts = config.parameter_counts()
    hidden, heads = config.hidden_size, config.num_attention_heads
    mla = config.mla if config.attention_type == "mla" else None
    moe_layers = sum(spec.ffn == "moe" for spec in config.layer_specs)
    layers = config.num_hidden_layers
    expert = 3 * hidden * config.moe_intermediate_size
    dense = (layers - moe_layers) * 3 * hidden * config.intermediate_size
    shared = moe_layers * config.num_shared_experts * expert
    routed = moe_layers * config.num_experts * expert
    router = moe_layers * config.num_experts * hidden
    matrices = sum(rows * columns * count for rows, columns, count in block_matrices(config))
    attention = matrices - dense - shared - routed
    v_dim = mla.v_head_dim if mla else config.head_dim
    depth = config.mtp.depth if config.mtp else 0
    mtp_ffn = expert * (config.num_experts + config.num_shared_experts)
    if not config.num_experts:
        mtp_ffn = 3 * hidden * config.intermediate_size
    known = attention + dense + shared + routed + router + counts.embeddings
    return ModelShape(
        name=name,
        num_layers=layers,
        hidden=hidden,
        vocab=config.vocab_size,
        mixer=config.attention_type,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        qk_dim=config.head_dim,
        v_dim=v_dim,
        kv_lora_rank=mla.kv_lora_rank if mla else 0,
        rope_dim=mla.qk_rope_head_dim if mla else 0,
        num_full_layers=layers,
        num_windowed_layers=0,
        window=0,
        attended=0,
        num_linear_layers=0,
        state_bytes=0,
        attention=attention,
        attention_out=layers * heads * v_dim * hidden,
        attention_copied=layers * hidden * ((mla.q_lora_rank or 0) + mla.latent_dim) if mla else 0,
        dense=dense,
        shared=shared,
        router=router,
        expert=expert if moe_layers else 0,
        num_experts=config.num_experts if moe_layers else 0,
        top_k=config.num_experts_per_tok if moe_layers else 0,
        num_moe_layers=moe_layers,
        table=config.vocab_size * hidden,
        tied=config.tie_word_embeddings,
        other=counts.total - known,
        mtp=counts.mtp,
        mtp_matrices=depth * (attention // layers + mtp_ffn),
        mtp_active=counts.mtp_active,
        mtp_depth=depth,
        mtp_copies=depth > 0 and config.model_type == "deepseek_v3",
        streams=config.residual.num_streams if config.residual.kind != "plain" else 1,
        routing_groups=config.topk_group if moe_layers and config.n_group > 1 else 0,
        max_context=config.max_position_embeddings,
    )


@cache
def _tables() -> Mapping[str, Mapping[str, Any]]:
    models: dict[str, dict[str, Any]] = tomllib.loads(_TABLE.read_text(encoding="utf-8"))["models"]
    return models


def list_shapes() -> dict[str, str]:
    """What every published shape of the planner's own is, by its name."""
    return {name: str(table["description"]) for name, table in _tables().items()}


def load_shape(name: str) -> ModelShape:
    """A published shape of the planner's own.

    Raises:
        KeyError: there is none of that name.
    """
    return shape_of_table(name, _tables()[name])


def shape_of_table(name: str, table: Mapping[str, Any]) -> ModelShape:
    """A decoder's parts from the keys of a config.json, with the tables `mla`, `linear` and `windowed` of our own.

    Biases and norms are counted as two norms a layer: close, not exact.
    """
    hidden, layers = table["hidden_size"], table["num_hidden_layers"]
    heads = table["num_attention_heads"]
    linear, windowed, mla = table.get("linear", {}), table.get("windowed", {}), table.get("mla")
    full = layers - linear.get("layers", 0)
    attention, copied, state, qk, v_dim = _mixers(table, full)
    experts = table.get("num_experts", 0)
    moe_layers = layers - table.get("first_k_dense_replace", 0) if experts else 0
    expert = 3 * hidden * table.get("moe_intermediate_size", 0)
    return ModelShape(
        name=name,
        num_layers=layers,
        hidden=hidden,
        vocab=table["vocab_size"],
        mixer="mla" if mla else "gqa",
        num_heads=heads,
        num_kv_heads=table["num_key_value_heads"],
        qk_dim=qk,
        v_dim=v_dim,
        kv_lora_rank=mla["kv_lora_rank"] if mla else 0,
        rope_dim=mla["qk_rope_head_dim"] if mla else 0,
        num_full_layers=full,
        num_windowed_layers=windowed.get("layers", 0),
        window=windowed.get("window", 0),
        attended=table.get("attended", 0),
        num_linear_layers=linear.get("layers", 0),
        state_bytes=state,
        attention=attention,
        attention_out=full * heads * v_dim * hidden,
        attention_copied=copied,
        dense=(layers - moe_layers) * 3 * hidden * table.get("intermediate_size", 0),
        shared=moe_layers * table.get("num_shared_experts", 0) * expert,
        router=moe_layers * experts * hidden,
        expert=expert if experts else 0,
        num_experts=experts,
        top_k=table.get("num_experts_per_tok", 0),
        num_moe_layers=moe_layers,
        table=table["vocab_size"] * hidden,
        tied=bool(table.get("tie_word_embeddings", False)),
        other=(2 * layers + 1) * hidden,
        mtp=0,
        mtp_matrices=0,
        mtp_active=0,
        mtp_depth=0,
        mtp_copies=False,
        streams=1,
        routing_groups=0,
        max_context=table.get("max_position_embeddings", 131072),
    )


def _mixers(table: Mapping[str, Any], full: int) -> tuple[int, int, int, int, int]:
    """Of all layers: matrices of attention, those that are not split, state bytes; widths of a key and a value head."""
    hidden, heads = table["hidden_size"], table["num_attention_heads"]
    linear, mla = table.get("linear", {}), table.get("mla")
    if mla:
        qk, v_dim = mla["qk_nope_head_dim"] + mla["qk_rope_head_dim"], mla["v_head_dim"]
        latent = mla["kv_lora_rank"] + mla["qk_rope_head_dim"]
        copied = hidden * (mla["q_lora_rank"] + latent)
        up = mla["q_lora_rank"] * heads * qk + heads * (mla["qk_nope_head_dim"] + v_dim) * mla["kv_lora_rank"]
        attention, copied = full * (copied + up + heads * v_dim * hidden), full * copied
    else:
        qk = v_dim = table["head_dim"]
        copied = 0
        queries = heads * (2 if table.get("output_gate") else 1)
        attention = full * hidden * qk * (queries + heads + 2 * table["num_key_value_heads"])
    state = 0
    if linear:
        keys, values = (linear[f"{kind}_heads"] * linear[f"{kind}_head_dim"] for kind in ("key", "value"))
        attention += linear["layers"] * hidden * (2 * keys + 3 * values + 2 * linear["value_heads"])
        state = linear["layers"] * values * linear["key_head_dim"] * _STATE_BYTES
    return attention, copied, state, qk, v_dim
