"""The Ling 2.0 / Ring 2.0 decoder (arXiv 2510.22115, section 2) over a flat batch of documents.

Shapes: N tokens, D hidden, E experts, A active experts per token, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tafkir.models.attention import Attention, AttentionState
from tafkir.models.experts import MoE
from tafkir.models.layers import Embedding, Linear, RMSNorm, SwiGLU
from tafkir.models.mla import LatentAttention
from tafkir.models.mtp import MultiTokenPredictor
from tafkir.models.residual import build_residual
from tafkir.models.router import Router, Routing, balanced_bias, check_replay
from tafkir.ops.rope import rope_table
from tafkir.ops.routing import count_tokens
from tafkir.recipe.model import LayerSpec, ModelConfig

__all__ = ["Decoder", "DecoderLayer", "DecoderOutput", "balance_routers", "build_mtp", "update_expert_bias"]

MIXERS: dict[str, type[Attention | LatentAttention]] = {"gqa": Attention, "mla": LatentAttention}


@dataclass(frozen=True, slots=True)
class DecoderOutput:
    """What a forward pass leaves behind.

    Attributes:
        hidden_ND: hidden states after the final norm.
        pre_norm_ND: the same before the final norm.
        routings: where each token went and from what scores, one entry per MoE layer.
        expert_load: tokens that each expert got, int64 [E], one entry per MoE layer.
    """

    hidden_ND: Tensor
    pre_norm_ND: Tensor
    routings: list[Routing]
    expert_load: list[Tensor]

    @property
    def expert_ids(self) -> list[Tensor]:
        """Chosen experts, int64 [N, A], one entry per MoE layer; what `Decoder.forward` takes to replay them."""
        return [routing.expert_ids_NA for routing in self.routings]


class DecoderLayer(nn.Module):
    """Pre-norm block: attention(norm(u)), then mlp(norm(u)); each reads u from the residual and writes back to it."""

    def __init__(self, config: ModelConfig, layer_idx: int, spec: LayerSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = MIXERS[spec.mixer](config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | SwiGLU = (
            MoE(config) if spec.ffn == "moe" else SwiGLU(config.hidden_size, config.intermediate_size)
        )
        self.attention_residual = build_residual(config, 2 * layer_idx)
        self.mlp_residual = build_residual(config, 2 * layer_idx + 1)

    def forward(
        self,
        state: Any,
        cos: Tensor,
        sin: Tensor,
        attention: AttentionState,
        replayed_expert_ids_NA: Tensor | None = None,
    ) -> tuple[Any, Routing | None]:
        """Returns the new state of the residual stream and, in a MoE layer, where each token went."""
        residual = self.attention_residual
        with residual.saving(state):
            u_ND, ctx = residual.read(state)
            normed_ND = residual.normed(state, u_ND, self.input_layernorm)
            state = residual.write(state, ctx, self.attention(normed_ND, cos, sin, attention))
        residual, routing = self.mlp_residual, None
        with residual.saving(state):
            u_ND, ctx = residual.read(state)
            normed_ND = residual.normed(state, u_ND, self.post_attention_layernorm)
            if isinstance(self.mlp, MoE):
                y_ND, routing = self.mlp(normed_ND, replayed_expert_ids_NA)
            else:
                y_ND = self.mlp(normed_ND)
            return residual.write(state, ctx, y_ND), routing


def build_mtp(config: ModelConfig) -> MultiTokenPredictor | None:
    """The multi-token-prediction layers that the config asks for, their weights uninitialised."""
    if config.mtp is None:
        return None
    first = config.num_hidden_layers
    blocks = (DecoderLayer(config, first + k, config.mtp_layer_spec) for k in range(config.mtp.depth))
    return MultiTokenPredictor(config, blocks)


class Decoder(nn.Module):
    """Token ids to hidden states, and hidden states to logits. Weights are uninitialised: see `build_decoder`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, spec) for i, spec in enumerate(config.layer_specs))
        self.residual = build_residual(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.mtp = build_mtp(config)

    @property
    def head_weight(self) -> Tensor:
        """The output head's weight, [V, D]; the embedding table when they are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def routers(self) -> list[Router]:
        """The routers of the MoE layers, first layer first."""
        return [layer.mlp.router for layer in self.layers if isinstance(layer.mlp, MoE)]

    def forward(
        self,
        input_ids_N: Tensor,
        positions_N: Tensor,
        attention: AttentionState,
        replayed_expert_ids: Sequence[Tensor] | None = None,
    ) -> DecoderOutput:
        """Run the blocks over a flat batch.

        Args:
            input_ids_N: int64 token ids, documents concatenated without padding.
            positions_N: int64 position of each token within its document.
            attention: who sees whom; `VarlenCausal(cu_seqlens)` in training.
            replayed_expert_ids: experts to send the tokens to instead of the routers' own choice, int64 [N, A] for
                each MoE layer, a row of -1 where none were recorded (Rollout Routing Replay, arXiv 2510.11370).

        Raises:
            TrainingError: the replayed experts do not fit the batch or the model.
        """
        config = self.config
        cos, sin = rope_table(positions_N, config.rotary_size, config.rope_theta, config.rope_scaling)
        state = self.residual.enter(self.embed_tokens(input_ids_N))
        replayed = iter(check_replay(replayed_expert_ids, len(input_ids_N), self.routers))
        routings = []
        for layer in self.layers:
            ids_NA = next(replayed, None) if isinstance(layer.mlp, MoE) else None
            state, routing = layer(state, cos, sin, attention, ids_NA)
            if routing is not None:
                routings.append(routing)
        load = [count_tokens(r.expert_ids_NA, config.num_experts) for r in routings]
        pre_norm_ND = self.residual.exit(state)
        return DecoderOutput(self.norm(pre_norm_ND), pre_norm_ND, routings, load)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Next-token logits [N, V] in float32."""
        return F.linear(hidden_ND, self.head_weight).float()


def update_expert_bias(decoder: Decoder, loads: Sequence[Tensor], rate: float) -> None:
    """Nudge every MoE layer's expert bias, where it has one, towards balance, without an auxiliary loss.

    Args:
        loads: tokens per expert, [E], one per MoE layer, summed over the step's micro-batches.
        rate: u of the update; 0 leaves the bias alone.
    """
    balance_routers(decoder.routers, loads, rate)


@torch.no_grad()
def balance_routers(routers: Sequence[Router], loads: Sequence[Tensor], rate: float) -> None:
    """What `update_expert_bias` does, for routers of one's choice."""
    for router, load_E in zip(routers, loads, strict=True):
        if router.expert_bias is not None:
            router.expert_bias.copy_(balanced_bias(router.expert_bias, load_E, rate))
