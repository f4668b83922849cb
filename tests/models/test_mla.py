"""Latent attention: the absorbed path over a latent cache computes what the expanded path computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tafkir.models.attention import LatentAttentionState, VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.models.mla import LatentCacheReference
from tafkir.recipe.model import ModelConfig, YarnConfig

SHAPE: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 61,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "attention_type": "mla",
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 20,
    "q_lora_rank": 18,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "rope_interleave": True,
    "use_qk_norm": False,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "initializer_range": 0.2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as DeepSeek-V3": {},
    "halves, no q_lora": {"rope_interleave": False, "q_lora_rank": None},
    "wide values": {"v_head_dim": 26},
    "yarn": {
        "rope_scaling": YarnConfig(factor=40.0, original_max_position_embeddings=8, mscale=1.0, mscale_all_dim=1.0),
        "attention_bias": True,
        "attention_output_bias": True,
    },
}


def build(**changes: Any) -> Decoder:
    decoder = build_decoder(ModelConfig.model_validate(SHAPE | changes), 3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif "bias" in name:
                parameter.uniform_(-0.3, 0.3, generator=generator)
    return decoder


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_prefill_and_decode_over_latents_equal_the_full_forward(variant: str) -> None:
    decoder = build(**VARIANTS[variant])
    ids_BT = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(1))
    full_ND = decoder(ids_BT.flatten(), torch.arange(13).repeat(2), VarlenCausal([0, 13, 26])).hidden_ND
    full_BTD = full_ND.view(2, 13, -1)

    cache = LatentCacheReference(3, num_sequences=2, kv_lora_rank=16)
    assert isinstance(cache, LatentAttentionState)
    assert not isinstance(VarlenCausal([0, 13]), LatentAttentionState)
    start = 0
    for step in (6, *[1] * 5, 2):  # prefill, decode, and two tokens at once as speculative decoding checks them
        ids = ids_BT[:, start : start + step].flatten()
        positions = torch.arange(start, start + step).repeat(2)
        hidden_ND = decoder(ids, positions, cache).hidden_ND
        expected = full_BTD[:, start : start + step].flatten(0, 1)
        torch.testing.assert_close(hidden_ND, expected, rtol=0, atol=2e-5)
        start += step
    assert start == 13
    assert cache.num_bytes() == 2 * 13 * decoder.config.kv_bytes_per_token(4)


def test_gradients_flow_through_both_paths_alike() -> None:
    decoder = build()
    ids = torch.randint(0, 61, (9,), generator=torch.Generator().manual_seed(1))
    grads = []
    for state in (VarlenCausal([0, 9]), LatentCacheReference(3, 1, 16)):
        decoder.zero_grad()
        decoder(ids, torch.arange(9), state).hidden_ND.square().sum().backward()
        grads.append([p.grad for p in decoder.parameters() if p.grad is not None])
    for expanded, absorbed in zip(*grads, strict=True):
        torch.testing.assert_close(expanded, absorbed, rtol=1e-4, atol=1e-4 * float(expanded.abs().max()))


def test_the_latent_cache_is_small() -> None:
    """576 numbers a token and layer for DeepSeek-V3, where its heads' keys and values would be 40960."""
    shape = {"num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": 192, "kv_lora_rank": 512}
    shape |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    config = ModelConfig.model_validate(SHAPE | shape)
    assert config.kv_bytes_per_token(2) == 3 * 576 * 2


def test_a_latent_cache_refuses_grouped_query_attention() -> None:
    with pytest.raises(TypeError, match="attention_type='mla'"):
        build_decoder(ModelConfig(), 0)(torch.arange(3), torch.arange(3), LatentCacheReference(4, 1, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": None}, "needs kv_lora_rank"),
        ({"head_dim": 32}, "head_dim=32 must be qk_nope_head_dim"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must equal"),
        ({"use_qk_norm": True}, "use_qk_norm must be false"),
        ({"rotary_dim": 4}, "rotary_dim not set"),
        ({"attention_type": "gqa"}, "kv_lora_rank.*needs attention_type='mla'"),
        ({"qk_rope_head_dim": 7, "head_dim": 19}, "rotary size 7 must be even"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate(SHAPE | changes)
