"""Multi-head latent attention (arXiv 2412.19437, section 2.1.1): keys and values from one small latent per token.

Shapes: N tokens, D hidden, H heads, K = P + R dims of a query or key, P not rotated, R rotated, V value dims,
L latent rank, C = L + R what is cached.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tafkir.models.attention import AttentionState, LatentAttentionState, LatentKeeper
from tafkir.models.layers import Linear, RMSNorm
from tafkir.ops.rope import apply_rope_reference, deinterleave, softmax_factor
from tafkir.recipe.model import ModelConfig

__all__ = ["LatentAttention", "LatentCacheReference"]

LATENT_NORM_EPS = 1e-6
"""DeepSeek's code and transformers fix the epsilon of the two inner norms, whatever `rms_norm_eps` says."""


class LatentAttention(nn.Module):
    """One MLA sublayer with two paths that compute the same.

    Expanded: keys and values of every head are computed and any `AttentionState` attends to them; a `LatentKeeper` is
    handed the latents besides. Absorbed: a `LatentAttentionState` keeps the latents alone; queries are taken into the
    latent space (W_kvb's key half is absorbed into them) and the result is taken out of it by the value half.
    """

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.shape, self.num_heads = layer_idx, config.mla, config.num_attention_heads
        self.head_dim, self.interleaved = config.head_dim, config.rope_interleave
        self.softmax_factor = softmax_factor(config.rope_scaling)
        shape, hidden, bias = self.shape, config.hidden_size, config.attention_bias
        if shape.q_lora_rank is None:
            self.q_proj = Linear(hidden, self.num_heads * self.head_dim)
        else:
            self.q_a_proj = Linear(hidden, shape.q_lora_rank, bias=bias)
            self.q_a_norm = RMSNorm(shape.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(shape.q_lora_rank, self.num_heads * self.head_dim)
        self.kv_a_proj = Linear(hidden, shape.latent_dim, bias=bias)
        self.kv_a_norm = RMSNorm(shape.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(shape.kv_lora_rank, self.num_heads * (shape.qk_nope_head_dim + shape.v_head_dim))
        self.o_proj = Linear(self.num_heads * shape.v_head_dim, hidden, bias=config.attention_output_bias)

    def forward(self, x_ND: Tensor, cos: Tensor, sin: Tensor, attention: AttentionState) -> Tensor:
        q_NHP, q_NHR = self._queries(x_ND, cos, sin)
        latent_NL, k_NR = self.project_latents(x_ND, cos, sin)
        if isinstance(attention, LatentAttentionState):
            out_NHV = self._absorbed(q_NHP, q_NHR, latent_NL, k_NR, attention)
        else:
            if isinstance(attention, LatentKeeper):
                attention.keep_latents(self.layer_idx, torch.cat((latent_NL, k_NR), dim=-1))
            out_NHV = self._expanded(q_NHP, q_NHR, latent_NL, k_NR, attention)
        return self.o_proj(out_NHV.flatten(1))  # type: ignore[no-any-return]

    def _rotate(self, x_NHR: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return apply_rope_reference(deinterleave(x_NHR) if self.interleaved else x_NHR, cos, sin)

    def _queries(self, x_ND: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        flat = (
            self.q_proj(x_ND) if self.shape.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x_ND)))
        )
        q_NHK = flat.view(-1, self.num_heads, self.head_dim)
        q_NHP, q_NHR = q_NHK.split([self.shape.qk_nope_head_dim, self.shape.qk_rope_head_dim], dim=-1)
        return q_NHP, self._rotate(q_NHR, cos, sin)

    def project_latents(self, x_ND: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised latent [N, L] and the rotated key that all heads share [N, R]."""
        latent_NL, k_NR = self.kv_a_proj(x_ND).split([self.shape.kv_lora_rank, self.shape.qk_rope_head_dim], dim=-1)
        return self.kv_a_norm(latent_NL), self._rotate(k_NR.unsqueeze(1), cos, sin).squeeze(1)

    def _expanded(
        self, q_NHP: Tensor, q_NHR: Tensor, latent_NL: Tensor, k_NR: Tensor, attention: AttentionState
    ) -> Tensor:
        shape = self.shape
        kv = self.kv_b_proj(latent_NL).view(-1, self.num_heads, shape.qk_nope_head_dim + shape.v_head_dim)
        k_NHP, v_NHV = kv.split([shape.qk_nope_head_dim, shape.v_head_dim], dim=-1)
        k_NHK = torch.cat((k_NHP, k_NR.unsqueeze(1).expand(-1, self.num_heads, -1)), dim=-1)
        q_NHK = torch.cat((q_NHP, q_NHR), dim=-1)
        if self.softmax_factor != 1.0:
            q_NHK = q_NHK * self.softmax_factor
        # Every attention state knows heads of one width; zeros behind the shorter side change no score and no output.
        width = max(self.head_dim, shape.v_head_dim)
        if width != self.head_dim:
            # States scale by 1 / sqrt(width), so take back what the padding would change.
            q_NHK = F.pad(q_NHK * (width / self.head_dim) ** 0.5, (0, width - self.head_dim))
            k_NHK = F.pad(k_NHK, (0, width - self.head_dim))
        out = attention.attend(self.layer_idx, q_NHK, k_NHK, F.pad(v_NHV, (0, width - shape.v_head_dim)))
        return out[..., : shape.v_head_dim]

    def _absorbed(
        self, q_NHP: Tensor, q_NHR: Tensor, latent_NL: Tensor, k_NR: Tensor, attention: LatentAttentionState
    ) -> Tensor:
        shape = self.shape
        kv_b_HXL = self.kv_b_proj.weight.view(self.num_heads, -1, shape.kv_lora_rank)
        key_HPL, value_HVL = kv_b_HXL.split([shape.qk_nope_head_dim, shape.v_head_dim], dim=1)
        q_NHL = torch.einsum("nhp,hpl->nhl", q_NHP, key_HPL)
        scale = self.head_dim**-0.5 * self.softmax_factor
        out_NHL = attention.attend_latent(
            self.layer_idx, torch.cat((q_NHL, q_NHR), dim=-1), torch.cat((latent_NL, k_NR), dim=-1), scale
        )
        return torch.einsum("nhl,hvl->nhv", out_NHL, value_HVL)


class LatentCacheReference:
    """The slow reference of a latent cache: sequences of any length, each call adds the same number of tokens to each.

    Args:
        num_layers: of the decoder.
        num_sequences: how many stand in every flat batch, one after the other.
        kv_lora_rank: the part of a latent that values come from.
    """

    def __init__(self, num_layers: int, num_sequences: int, kv_lora_rank: int) -> None:
        self.num_sequences, self.kv_lora_rank = num_sequences, kv_lora_rank
        self.latents: list[list[Tensor | None]] = [[None] * num_sequences for _ in range(num_layers)]

    def num_bytes(self) -> int:
        """Bytes that are kept, over all layers and sequences."""
        return sum(kept.nbytes for layer in self.latents for kept in layer if kept is not None)

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """Refused: this state keeps latents only."""
        raise TypeError("a latent cache serves decoders with attention_type='mla' only")

    def attend_latent(self, layer_idx: int, q_NHC: Tensor, latent_NC: Tensor, scale: float) -> Tensor:
        """As `LatentAttentionState` says; causal, one sequence after the other, softmax in float32."""
        step = len(q_NHC) // self.num_sequences
        outputs = []
        for i, (start, stop) in enumerate(pairwise(range(0, len(q_NHC) + 1, step))):
            before = self.latents[layer_idx][i]
            kept_SC = latent_NC[start:stop] if before is None else torch.cat((before, latent_NC[start:stop]))
            self.latents[layer_idx][i] = kept_SC
            scores_HTS = torch.einsum("thc,sc->hts", q_NHC[start:stop], kept_SC).float() * scale
            future_TS = torch.ones(step, len(kept_SC), dtype=torch.bool, device=q_NHC.device)
            future_TS = future_TS.triu(len(kept_SC) - step + 1)
            weights_HTS = scores_HTS.masked_fill(future_TS, -torch.inf).softmax(-1).to(q_NHC.dtype)
            outputs.append(torch.einsum("hts,sl->thl", weights_HTS, kept_SC[:, : self.kv_lora_rank]))
        return torch.cat(outputs)
