"""The oracle: transformers' Glm4MoeForCausalLM, which computes the Ling 2.0 block, with our weights under its names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tafkir.models.decoder import Decoder
from tafkir.recipe.model import ModelConfig


def glm_config(config: ModelConfig, **extra: Any) -> Any:
    """The GLM config that computes the same function as ours."""
    transformers = pytest.importorskip("transformers")
    return transformers.Glm4MoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.moe_intermediate_size,
        n_routed_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        n_shared_experts=config.num_shared_experts,
        n_group=config.n_group,
        topk_group=config.topk_group,
        first_k_dense_replace=config.first_k_dense_replace,
        routed_scaling_factor=config.routed_scaling_factor,
        norm_topk_prob=config.norm_topk_prob,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": config.rotary_size / config.head_dim,
        },
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        use_qk_norm=config.use_qk_norm,
        tie_word_embeddings=config.tie_word_embeddings,
        attention_bias=False,
        use_cache=False,
        **extra,
    )


def glm_tensors(decoder: Decoder, *, grads: bool = False) -> dict[str, torch.Tensor]:
    """Our parameters (or their gradients) and expert biases under GLM's names, Q, K and V taken apart."""
    config = decoder.config
    named = {n: p.grad if grads else p.detach() for n, p in decoder.named_parameters()}
    if not grads:
        named |= dict(decoder.named_buffers())
    sizes = [config.num_attention_heads * config.head_dim] + [config.num_key_value_heads * config.head_dim] * 2
    out: dict[str, torch.Tensor] = {}
    for name, tensor in named.items():
        assert tensor is not None, name
        if name == "lm_head.weight":
            out[name] = tensor
            continue
        name = "model." + name.replace(".attention.", ".self_attn.").replace(".router.", ".gate.")
        name = name.replace("expert_bias", "e_score_correction_bias")
        if "qkv_proj" in name:
            for part, piece in zip("qkv", tensor.split(sizes), strict=True):
                out[name.replace("qkv_proj", f"{part}_proj")] = piece
        elif "gate_up_proj.weight" in name:
            for part, piece in zip(("gate", "up"), tensor.chunk(2), strict=True):
                out[name.replace("gate_up_proj", f"{part}_proj")] = piece
        else:
            out[name] = tensor
    if config.tie_word_embeddings and not grads:
        out["lm_head.weight"] = out["model.embed_tokens.weight"]
    return out


@dataclass(frozen=True)
class Oracle:
    """What the tests need of it."""

    def build(self, decoder: Decoder, **extra: Any) -> Any:
        """A GLM model with the decoder's weights, loaded strictly."""
        transformers = pytest.importorskip("transformers")
        model = transformers.Glm4MoeForCausalLM(glm_config(decoder.config, **extra)).float()
        model.load_state_dict({name: tensor.clone() for name, tensor in glm_tensors(decoder).items()}, strict=True)
        return model

    def gradients(self, decoder: Decoder) -> dict[str, torch.Tensor]:
        """Our gradients under GLM's names."""
        return glm_tensors(decoder, grads=True)


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()
