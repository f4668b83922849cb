"""Grouped-query attention with per-head QK-norm and partial RoPE; who sees whom is the AttentionState's business.

Shapes: N tokens, D hidden, H query heads, G key-value heads, K head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tafkir.models.layers import Linear, RMSNorm
from tafkir.ops.attention import VarlenLayout, varlen_attention
from tafkir.ops.qkv import split_norm_rope
from tafkir.recipe.model import ModelConfig

__all__ = ["Attention", "AttentionState", "LatentAttentionState", "LatentKeeper", "VarlenCausal"]


class AttentionState(Protocol):
    """What attention needs to know about the batch: document boundaries in training, a cache view in the engine."""

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """Scaled causal attention, [N, H, K]; q and k come after RoPE."""
        ...


@runtime_checkable
class LatentAttentionState(AttentionState, Protocol):
    """A state that keeps MLA's latents instead of keys and values: the absorbed path runs over what it has kept."""

    def attend_latent(self, layer_idx: int, q_NHC: Tensor, latent_NC: Tensor, scale: float) -> Tensor:
        """Keep the new tokens' latents, and attend to all kept ones.

        Args:
            q_NHC: queries in the latent space, [N, H, kv_lora_rank + qk_rope_head_dim], the rotated part last.
            latent_NC: compressed keys and values with the shared rotated key behind them; one "head" for all.
            scale: what scores are multiplied by before the softmax.

        Returns:
            [N, H, kv_lora_rank]: the weights' mean over the compressed part of the latents.
        """
        ...


@runtime_checkable
class LatentKeeper(AttentionState, Protocol):
    """A state that MLA attends to expanded, and that keeps the latents for absorbed attention later."""

    def keep_latents(self, layer_idx: int, latent_NC: Tensor) -> None:
        """Keep the tokens' latents, laid out as `LatentAttentionState.attend_latent` takes them."""
        ...


class VarlenCausal:
    """Causal attention within each document of a flat batch; nothing is cached.

    Args:
        cu_seqlens: document boundaries, first 0, last N.
        device: where the token indices live; that of the batch.
    """

    def __init__(self, cu_seqlens: Sequence[int] | Tensor, device: torch.device | None = None) -> None:
        self.layout = VarlenLayout.build(cu_seqlens, device=device)

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        return varlen_attention(q_NHK, k_NGK, v_NGK, self.layout)


class Attention(nn.Module):
    """One attention sublayer; `qkv_proj` rows are [all Q | all K | all V]."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, rows, bias=config.attention_bias)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else None

    def forward(self, x_ND: Tensor, cos: Tensor, sin: Tensor, attention: AttentionState) -> Tensor:
        qkv = self.qkv_proj(x_ND).view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        q_weight_K = self.q_norm.weight if self.q_norm is not None else None
        k_weight_K = self.k_norm.weight if self.k_norm is not None else None
        q_NHK, k_NGK, v_NGK = split_norm_rope(qkv, self.num_heads, q_weight_K, k_weight_K, self.eps, cos, sin)
        out_NHK = attention.attend(self.layer_idx, q_NHK, k_NGK, v_NGK)
        return self.o_proj(out_NHK.reshape(-1, self.num_heads * self.head_dim))  # type: ignore[no-any-return]
