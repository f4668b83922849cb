"""Longer contexts than the model was trained on: a needle is found with YaRN, and lost without."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder, stretch_context
from tafkir.models.decoder import Decoder
from tafkir.recipe.model import ModelConfig, YarnConfig

CONTEXT = 32
NUM_KEYS, NUM_VALUES = 8, 8
QUERIES = 96
# A small base, so that even the slowest angle leaves its trained range within a few contexts.
CONFIG = ModelConfig(
    model_type="qwen3",
    vocab_size=QUERIES + NUM_KEYS,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=64,
    num_experts=0,
    partial_rotary_factor=1.0,
    rope_theta=100.0,
    max_position_embeddings=CONTEXT,
)


def haystacks(count: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Hay with one needle, a key with its value, anywhere, and the question for that key at the end; the values."""
    ids_BT = 64 + torch.randint(0, 32, (count, length), generator=generator)
    key_B = torch.randint(0, NUM_KEYS, (count,), generator=generator)
    value_B = torch.randint(0, NUM_VALUES, (count,), generator=generator)
    place_B = torch.randint(0, length - 1, (count,), generator=generator)
    ids_BT[torch.arange(count), place_B] = key_B * NUM_VALUES + value_B
    ids_BT[:, -1] = QUERIES + key_B
    return ids_BT, value_B


def answers(decoder: Decoder, ids_BT: torch.Tensor) -> torch.Tensor:
    count, length = ids_BT.shape
    state = VarlenCausal(range(0, count * length + 1, length))
    hidden_ND = decoder(ids_BT.flatten(), torch.arange(length).repeat(count), state).hidden_ND
    return decoder.logits(hidden_ND[length - 1 :: length])


def train() -> Decoder:
    decoder = build_decoder(CONFIG, 0)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        ids_BT, value_B = haystacks(16, CONTEXT, generator)
        optimizer.zero_grad()
        F.cross_entropy(answers(decoder, ids_BT), value_B).backward()
        optimizer.step()
    return decoder


@torch.no_grad()
def accuracy(decoder: Decoder, length: int) -> float:
    ids_BT, value_B = haystacks(100, length, torch.Generator().manual_seed(9))
    return float((answers(decoder, ids_BT).argmax(-1) == value_B).float().mean())


def test_the_needle_is_found_in_a_stretched_context_and_lost_in_a_plain_one() -> None:
    plain = train()
    assert accuracy(plain, CONTEXT) > 0.95
    for factor in (4, 8):
        scaling = YarnConfig(factor=factor, original_max_position_embeddings=CONTEXT)
        stretched = stretch_context(plain, scaling, factor * CONTEXT)
        assert stretched.config.max_position_embeddings == factor * CONTEXT
        assert accuracy(stretched, factor * CONTEXT) > 0.9
        assert accuracy(plain, factor * CONTEXT) < 0.5
        # What fitted before still does.
        assert accuracy(stretched, CONTEXT) > 0.95


def test_stretching_shares_the_weights() -> None:
    plain = build_decoder(CONFIG, 0)
    stretched = stretch_context(plain, YarnConfig(factor=2, original_max_position_embeddings=CONTEXT), 2 * CONTEXT)
    for ours, theirs in zip(plain.parameters(), stretched.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    assert plain.config == CONFIG
