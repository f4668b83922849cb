"""The shape of a decoder: one closed, torch-free config in Hugging Face's spellings, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tafkir.recipe.residual import ResidualConfig

__all__ = ["LayerSpec", "MlaShape", "ModelConfig", "MtpConfig", "ParameterCounts", "YarnConfig"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one decoder block is made of: how tokens mix, and what follows."""

    mixer: Literal["gqa", "mla"]
    ffn: Literal["dense", "moe"]


@dataclass(frozen=True, slots=True)
class MlaShape:
    """The sizes of multi-head latent attention (arXiv 2412.19437, section 2.1.1), all given."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def latent_dim(self) -> int:
        """What one token leaves in the cache of one layer: the compressed latent and the shared rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Parameters of a decoder; the routers' expert biases (buffers) are not among them.

    Attributes:
        total: everything but the multi-token-prediction layers, as published sizes count.
        active: those of `total` that one token meets.
        embeddings: embedding table and output head (one of them where they are tied).
        residual: those of `total` that belong to the residual streams' mappings; 0 for the plain residual.
        mtp: the multi-token-prediction layers, on top of `total`.
        mtp_active: those of `mtp` that one token meets.
    """

    total: int
    active: int
    embeddings: int
    residual: int
    mtp: int
    mtp_active: int

    @property
    def non_embedding(self) -> int:
        return self.total - self.embeddings

    @property
    def active_non_embedding(self) -> int:
        return self.active - self.embeddings


def _check_64_bits(values: Mapping[str, Any]) -> None:
    """No size is larger; arithmetic with floats would end in an OverflowError."""
    for name, value in values.items():
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise ValueError(f"{name} does not fit into 64 bits")


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _in_64_bits(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            _check_64_bits(values)
        return values

    @model_validator(mode="after")
    def _in_64_bits_when_read(self) -> Self:
        _check_64_bits(dict(self))  # sizes that came as text are numbers by now
        return self


class YarnConfig(_Table):
    """YaRN (arXiv 2309.00071): slow angles are interpolated by `factor`, fast ones stay."""

    factor: float = Field(ge=1, description="How many times the original context.")
    original_max_position_embeddings: int = Field(ge=1, description="Context that the weights were trained on.")
    beta_fast: float = Field(32.0, gt=0, description="Angles with more turns over the original context stay.")
    beta_slow: float = Field(1.0, gt=0, description="Angles with fewer turns are interpolated in full.")
    mscale: float | None = Field(None, ge=0, description="DeepSeek's numerator of the factor on cosines and sines.")
    mscale_all_dim: float | None = Field(
        None, ge=0, description="DeepSeek's denominator of that factor; with MLA it also scales the softmax."
    )
    attention_factor: float | None = Field(None, gt=0, description="The factor on cosines and sines, given outright.")
    truncate: bool = Field(True, description="Round the bounds of the ramp to whole dims.")

    def bounds(self, rotary_dim: int, theta: float) -> tuple[float, float]:
        """The angles between which the ramp rises: those that turn `beta_fast` and `beta_slow` times over the context.

        Raises:
            ValueError: the ramp would fall. transformers, vLLM and SGLang then do the contrary of YaRN: they keep all
                angles where all are slow, and slow all where all are fast.
        """

        def angle_of(turns: float) -> float:
            context = self.original_max_position_embeddings
            return rotary_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = angle_of(self.beta_fast), angle_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        if low > high:
            raise ValueError(
                f"rope_scaling with original_max_position_embeddings={self.original_max_position_embeddings}, "
                f"beta_fast={self.beta_fast:g}, beta_slow={self.beta_slow:g} and rope_theta={theta:g} has its ramp "
                f"fall, from angle {low:g} to {high:g}"
            )
        return low, high


class MtpConfig(_Table):
    """Multi-token-prediction layers after the decoder (arXiv 2412.19437, section 2.2)."""

    depth: int = Field(1, ge=1, description="Layers D; layer k predicts the token k + 1 places ahead.")
    concat_order: Literal["embedding_first", "hidden_first"] = Field(
        "embedding_first", description="Order in which the projection reads its two halves; as checkpoints store it."
    )
    input_state: Literal["post_norm", "pre_norm"] = Field(
        "post_norm", description="Whether the hidden states are taken after or before the decoder's last norm."
    )
    chain_hidden: bool = Field(True, description="Feed layer k the states of layer k - 1, not the decoder's.")


_MLA_KEYS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


class ModelConfig(_Table):
    """A decoder of one of the known families; the defaults are a tiny Ling 2.0 (arXiv 2510.22115, section 2).

    Layer i is dense when `i < first_k_dense_replace`, when it is listed in `mlp_only_layers`, when
    `decoder_sparse_step` skips it, or when there are no experts at all. `rotary_dim`, where given, wins over
    `partial_rotary_factor` (Ling-1T ships only the former). With `attention_type="mla"`, `head_dim` is
    `qk_nope_head_dim + qk_rope_head_dim` and only the latter part is rotated.
    """

    model_type: Literal["bailing_moe_v2", "deepseek_v3", "qwen3", "qwen3_moe", "glm4_moe"] = Field(
        "bailing_moe_v2", description="Family whose names and keys checkpoints are written in."
    )
    vocab_size: int = Field(2048, ge=16, description="Rows of the embedding table.")
    hidden_size: int = Field(128, ge=8, description="Width of the residual stream.")
    num_hidden_layers: int = Field(4, ge=1, description="Decoder blocks.")
    attention_type: Literal["gqa", "mla"] = Field("gqa", description="Grouped-query or multi-head latent attention.")
    num_attention_heads: int = Field(4, ge=1, description="Query heads.")
    num_key_value_heads: int = Field(2, ge=1, description="Key and value heads (grouped-query attention).")
    head_dim: int = Field(32, ge=2, description="Width of one query or key head.")
    q_lora_rank: int | None = Field(None, ge=1, description="MLA: width of the compressed queries; none, no detour.")
    kv_lora_rank: int | None = Field(None, ge=1, description="MLA: width of the compressed keys and values.")
    qk_nope_head_dim: int | None = Field(None, ge=1, description="MLA: dims of a query or key that are not rotated.")
    qk_rope_head_dim: int | None = Field(None, ge=2, description="MLA: rotated dims; their key is shared by all heads.")
    v_head_dim: int | None = Field(None, ge=1, description="MLA: width of one value head.")
    attention_bias: bool = Field(False, description="Biases on the attention's input projections.")
    attention_output_bias: bool = Field(False, description="A bias on the attention's output projection.")
    intermediate_size: int = Field(256, ge=1, description="Width of the dense SwiGLU layers.")
    moe_intermediate_size: int = Field(64, ge=1, description="Width of one expert, routed or shared.")
    num_experts: int = Field(32, ge=0, description="Routed experts per MoE layer; 0 makes every layer dense.")
    num_experts_per_tok: int = Field(2, ge=1, description="Routed experts that each token visits.")
    num_shared_experts: int = Field(1, ge=0, description="Experts that every token visits.")
    n_group: int = Field(4, ge=1, description="Expert groups for group-limited routing.")
    topk_group: int = Field(2, ge=1, description="Groups that stay eligible for a token.")
    first_k_dense_replace: int = Field(1, ge=0, description="Leading layers that are dense instead of MoE.")
    decoder_sparse_step: int = Field(1, ge=1, description="Layer i is MoE only when i + 1 is a multiple of this.")
    mlp_only_layers: tuple[int, ...] = Field((), description="Further layers that are dense, by index.")
    routed_scaling_factor: float = Field(2.5, gt=0, description="Factor on the routed experts' normalised weights.")
    norm_topk_prob: bool = Field(True, description="Normalise the chosen experts' weights to sum to one.")
    score_function: Literal["sigmoid", "softmax"] = Field("sigmoid", description="From router logits to scores.")
    use_expert_bias: bool = Field(True, description="A bias on each expert's score, for the selection only.")
    partial_rotary_factor: float = Field(0.5, gt=0, le=1, description="Share of each head that RoPE rotates.")
    rotary_dim: int | None = Field(None, ge=2, description="Rotated dims per head; wins over the factor.")
    rope_interleave: bool = Field(False, description="MLA: checkpoints store rotated dims as adjacent pairs.")
    rope_theta: float = Field(10000.0, gt=1, description="RoPE base.")
    rope_scaling: YarnConfig | None = None
    max_position_embeddings: int = Field(512, ge=1, description="Longest context, in tokens.")
    rms_norm_eps: float = Field(1e-6, gt=0, description="Epsilon of every RMSNorm.")
    use_qk_norm: bool = Field(True, description="RMSNorm on each query and key head before RoPE.")
    tie_word_embeddings: bool = Field(False, description="Use the embedding table as output head.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of fresh weights.")
    residual: ResidualConfig = ResidualConfig()
    mtp: MtpConfig | None = None

    @model_validator(mode="after")
    def _check_attention(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        given = [key for key in ("q_lora_rank", *_MLA_KEYS) if getattr(self, key) is not None]
        if self.attention_type == "mla":
            self._check_mla(given)
        elif given or self.rope_interleave:
            raise ValueError(f"{', '.join(given) or 'rope_interleave'} needs attention_type='mla'")
        if self.rotary_size % 2 or self.rotary_size > self.head_dim:
            raise ValueError(f"rotary size {self.rotary_size} must be even and at most head_dim={self.head_dim}")
        if self.rope_scaling is not None:
            self.rope_scaling.bounds(self.rotary_size, self.rope_theta)
        return self

    def _check_mla(self, given: list[str]) -> None:
        missing = [key for key in _MLA_KEYS if key not in given]
        if missing:
            raise ValueError(f"attention_type='mla' needs {', '.join(missing)}")
        shape = self.mla
        if self.head_dim != shape.qk_nope_head_dim + shape.qk_rope_head_dim:
            raise ValueError(
                f"head_dim={self.head_dim} must be qk_nope_head_dim + qk_rope_head_dim = "
                f"{shape.qk_nope_head_dim + shape.qk_rope_head_dim}"
            )
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError("with attention_type='mla', num_key_value_heads must equal num_attention_heads")
        if self.use_qk_norm or self.rotary_dim is not None:
            raise ValueError("with attention_type='mla', use_qk_norm must be false and rotary_dim not set")

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        outside = [i for i in self.mlp_only_layers if not 0 <= i < self.num_hidden_layers]
        if outside:
            raise ValueError(f"mlp_only_layers={outside} are not among the {self.num_hidden_layers} layers")
        if not self.num_experts:
            return self
        if self.num_experts % self.n_group:
            raise ValueError(f"num_experts={self.num_experts} is not a multiple of n_group={self.n_group}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
        eligible = self.topk_group * (self.num_experts // self.n_group)
        if self.num_experts_per_tok > eligible:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {eligible} experts of topk_group groups"
            )
        return self

    @property
    def rotary_size(self) -> int:
        """Dims of each head that RoPE rotates."""
        if self.qk_rope_head_dim is not None:
            return self.qk_rope_head_dim
        return self.rotary_dim if self.rotary_dim is not None else int(self.head_dim * self.partial_rotary_factor)

    @property
    def mla(self) -> MlaShape:
        """The sizes of latent attention.

        Raises:
            ValueError: the config has grouped-query attention.
        """
        kv, nope, rope, value = self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim
        if kv is None or nope is None or rope is None or value is None:
            raise ValueError("the config has no latent attention")
        return MlaShape(self.q_lora_rank, kv, nope, rope, value)

    def is_moe_layer(self, layer_idx: int) -> bool:
        if not self.num_experts or layer_idx < self.first_k_dense_replace or layer_idx in self.mlp_only_layers:
            return False
        return (layer_idx + 1) % self.decoder_sparse_step == 0

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """What each decoder block is made of, first block first."""
        return tuple(
            LayerSpec(self.attention_type, "moe" if self.is_moe_layer(i) else "dense")
            for i in range(self.num_hidden_layers)
        )

    @property
    def mtp_layer_spec(self) -> LayerSpec:
        """What the block inside every multi-token-prediction layer is made of: MoE wherever there are experts."""
        return LayerSpec(self.attention_type, "moe" if self.num_experts else "dense")

    def _attention_parameters(self, mixer: str) -> int:
        heads, hidden = self.num_attention_heads, self.hidden_size
        output_bias = hidden if self.attention_output_bias else 0
        if mixer == "gqa":
            rows = (heads + 2 * self.num_key_value_heads) * self.head_dim
            norms = 2 * self.head_dim if self.use_qk_norm else 0
            biases = (rows if self.attention_bias else 0) + output_bias
            return rows * hidden + heads * self.head_dim * hidden + norms + biases
        shape = self.mla
        down = shape.latent_dim
        up = heads * (shape.qk_nope_head_dim + shape.v_head_dim) * shape.kv_lora_rank
        out = heads * shape.v_head_dim * hidden + output_bias
        queries = heads * self.head_dim * (shape.q_lora_rank or hidden)
        if shape.q_lora_rank is not None:
            queries += shape.q_lora_rank * (hidden + 1) + (shape.q_lora_rank if self.attention_bias else 0)
        return queries + down * hidden + (down if self.attention_bias else 0) + shape.kv_lora_rank + up + out

    def _layer_parameters(self, spec: LayerSpec, *, active: bool) -> int:
        total = self._attention_parameters(spec.mixer) + 2 * self.hidden_size
        if spec.ffn == "dense":
            return total + 3 * self.hidden_size * self.intermediate_size
        expert = 3 * self.hidden_size * self.moe_intermediate_size
        routed = self.num_experts_per_tok if active else self.num_experts
        router = self.num_experts * self.hidden_size
        return total + expert * (routed + self.num_shared_experts) + router

    def _mtp_parameters(self, *, active: bool) -> int:
        if self.mtp is None:
            return 0
        hidden = self.hidden_size
        layer = self._layer_parameters(self.mtp_layer_spec, active=active)
        residual = self.residual.num_parameters(hidden, 2)
        return self.mtp.depth * (layer + residual + 2 * hidden * hidden + 3 * hidden)

    def parameter_counts(self) -> ParameterCounts:
        """How many parameters the decoder has, by what they are for."""
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        residual = self.residual.num_parameters(self.hidden_size, 2 * self.num_hidden_layers)
        total, active = (
            sum(self._layer_parameters(spec, active=active) for spec in self.layer_specs)
            + self.hidden_size
            + tables
            + residual
            for active in (False, True)
        )
        mtp, mtp_active = self._mtp_parameters(active=False), self._mtp_parameters(active=True)
        return ParameterCounts(total, active, tables, residual, mtp, mtp_active)

    def num_parameters(self, *, active: bool = False, embeddings: bool = True, mtp: bool = False) -> int:
        """Count of parameters, the router's expert bias (a buffer) left out.

        Args:
            active: count only the experts that one token visits.
            embeddings: count the embedding table and the output head as well.
            mtp: count the multi-token-prediction layers as well, which published sizes leave out.
        """
        counts = self.parameter_counts()
        total = counts.active if active else counts.total
        extra = counts.mtp_active if active else counts.mtp
        return total - (0 if embeddings else counts.embeddings) + (extra if mtp else 0)

    def kv_bytes_per_token(self, dtype_bytes: int = 4) -> int:
        """Bytes of cache that one token takes over all layers: keys and values, or MLA's latent and rotated key."""
        if self.attention_type == "mla":
            return self.num_hidden_layers * self.mla.latent_dim * dtype_bytes
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * dtype_bytes

    def flops_per_token(self, context: int = 0) -> int:
        """Forward FLOPs for one token (two per active non-embedding weight and head weight, plus attention).

        Args:
            context: tokens that it attends to, with MLA as expanded keys and values.
        """
        matmul = self.num_parameters(active=True, embeddings=False) + self.vocab_size * self.hidden_size
        value_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
        per_layer = self.num_attention_heads * (self.head_dim + value_dim)
        return 2 * (matmul + self.num_hidden_layers * per_layer * context)
