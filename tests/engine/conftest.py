"""A tiny decoder whose logits are spread enough that tokens differ, and prompts of all lengths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tafkir.engine.engine import Engine
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.recipe.model import ModelConfig
from tests.models.test_mla import build as build_latent

VOCAB = 64
EOS = 3

MakeEngine = Callable[..., Engine]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def build_tiny(seed: int = 0) -> Decoder:
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        head_dim=8,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_experts=8,
        max_position_embeddings=128,
    )
    decoder = build_decoder(config, seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # fresh weights give nearly uniform logits: too easy a test
    return decoder


@pytest.fixture(scope="session")
def shared_decoder() -> Decoder:
    return build_tiny()


@pytest.fixture(scope="session")
def latent_decoder() -> Decoder:
    """Multi-head latent attention, 61 tokens."""
    return build_latent(initializer_range=0.1, max_position_embeddings=128)


@pytest.fixture
def make_engine(shared_decoder: Decoder) -> MakeEngine:
    def make(**options: object) -> Engine:
        return Engine(shared_decoder, **{"eos_ids": (EOS,), "max_batch": 16, **options})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 40, 60]
    return [tuple(torch.randint(4, VOCAB, (n,), generator=generator).tolist()) for n in lengths]
