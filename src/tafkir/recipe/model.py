"""The shape of a decoder: one closed, torch-free config in Hugging Face's spellings, and what it costs."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["ModelConfig"]


class ModelConfig(BaseModel):
    """A Ling 2.0 / Ring 2.0 decoder (arXiv 2510.22115, section 2): sparse MoE with a sigmoid group-limited router.

    Layer i is dense when `i < first_k_dense_replace`. `rotary_dim`, where given, wins over
    `partial_rotary_factor` (Ling-1T ships only the former).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: Literal["bailing_moe_v2"] = "bailing_moe_v2"
    vocab_size: int = Field(2048, ge=16, description="Rows of the embedding table.")
    hidden_size: int = Field(128, ge=8, description="Width of the residual stream.")
    num_hidden_layers: int = Field(4, ge=1, description="Decoder blocks.")
    num_attention_heads: int = Field(4, ge=1, description="Query heads.")
    num_key_value_heads: int = Field(2, ge=1, description="Key and value heads (grouped-query attention).")
    head_dim: int = Field(32, ge=2, description="Width of one head.")
    intermediate_size: int = Field(256, ge=1, description="Width of the dense SwiGLU layers.")
    moe_intermediate_size: int = Field(64, ge=1, description="Width of one expert, routed or shared.")
    num_experts: int = Field(32, ge=1, description="Routed experts per MoE layer.")
    num_experts_per_tok: int = Field(2, ge=1, description="Routed experts that each token visits.")
    num_shared_experts: int = Field(1, ge=0, description="Experts that every token visits.")
    n_group: int = Field(4, ge=1, description="Expert groups for group-limited routing.")
    topk_group: int = Field(2, ge=1, description="Groups that stay eligible for a token.")
    first_k_dense_replace: int = Field(1, ge=0, description="Leading layers that are dense instead of MoE.")
    routed_scaling_factor: float = Field(2.5, gt=0, description="Factor on the routed experts' normalised weights.")
    norm_topk_prob: bool = Field(True, description="Normalise the chosen experts' weights to sum to one.")
    score_function: Literal["sigmoid"] = "sigmoid"
    partial_rotary_factor: float = Field(0.5, gt=0, le=1, description="Share of each head that RoPE rotates.")
    rotary_dim: int | None = Field(None, ge=2, description="Rotated dims per head; wins over the factor.")
    rope_theta: float = Field(10000.0, gt=0, description="RoPE base.")
    max_position_embeddings: int = Field(512, ge=1, description="Longest context, in tokens.")
    rms_norm_eps: float = Field(1e-6, gt=0, description="Epsilon of every RMSNorm.")
    use_qk_norm: bool = Field(True, description="RMSNorm on each query and key head before RoPE.")
    tie_word_embeddings: bool = Field(False, description="Use the embedding table as output head.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of fresh weights.")

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.num_experts % self.n_group:
            raise ValueError(f"num_experts={self.num_experts} is not a multiple of n_group={self.n_group}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
        eligible = self.topk_group * (self.num_experts // self.n_group)
        if self.num_experts_per_tok > eligible:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {eligible} experts of topk_group groups"
            )
        if self.rotary_size % 2 or self.rotary_size > self.head_dim:
            raise ValueError(f"rotary size {self.rotary_size} must be even and at most head_dim={self.head_dim}")
        return self

    @property
    def rotary_size(self) -> int:
        """Dims of each head that RoPE rotates."""
        return self.rotary_dim if self.rotary_dim is not None else int(self.head_dim * self.partial_rotary_factor)

    def is_moe_layer(self, layer_idx: int) -> bool:
        return layer_idx >= self.first_k_dense_replace

    def _attention_parameters(self) -> int:
        qkv = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim * self.hidden_size
        out = self.num_attention_heads * self.head_dim * self.hidden_size
        return qkv + out + (2 * self.head_dim if self.use_qk_norm else 0)

    def _layer_parameters(self, layer_idx: int, *, active: bool) -> int:
        total = self._attention_parameters() + 2 * self.hidden_size
        if not self.is_moe_layer(layer_idx):
            return total + 3 * self.hidden_size * self.intermediate_size
        expert = 3 * self.hidden_size * self.moe_intermediate_size
        routed = self.num_experts_per_tok if active else self.num_experts
        router = self.num_experts * self.hidden_size
        return total + expert * (routed + self.num_shared_experts) + router

    def num_parameters(self, *, active: bool = False, embeddings: bool = True) -> int:
        """Count of parameters, the router's expert bias (a buffer) left out.

        Args:
            active: count only the experts that one token visits.
            embeddings: count the embedding table and the output head as well.
        """
        layers = sum(self._layer_parameters(i, active=active) for i in range(self.num_hidden_layers))
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return layers + self.hidden_size + (tables if embeddings else 0)

    def kv_bytes_per_token(self, dtype_bytes: int = 4) -> int:
        """Bytes of key and value cache that one token takes over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * dtype_bytes

    def flops_per_token(self, context: int = 0) -> int:
        """Forward FLOPs for one token (two per active non-embedding weight and head weight, plus attention)."""
        matmul = self.num_parameters(active=True, embeddings=False) + self.vocab_size * self.hidden_size
        attention = 2 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * context
        return 2 * (matmul + attention)
