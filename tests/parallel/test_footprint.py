"""Thousands of ranks on one machine: the sharding code itself, on a fake process group and the meta device."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist

from tafkir.models.decoder import Decoder
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.parallel import ParallelSizes
from tafkir.recipe.presets import load_preset
from tafkir.train.parallel.footprint import measure_rank
from tests.parallel.jobs import MODEL


@cache
def count(model: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(param.numel() for param in Decoder(model).parameters())


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("ring-flash-2.0", ParallelSizes(data=128, expert=8, tensor=2)),
        pytest.param("deepseek-v3", ParallelSizes(data=16, expert=64), marks=pytest.mark.slow),
    ],
    ids=["ring-flash-2048", "671b-1024"],
)
def test_huge_models_are_sharded_over_thousands_of_ranks(preset: str, sizes: ParallelSizes) -> None:
    model = load_preset(preset)
    found = measure_rank(model, sizes, rank=sizes.world - 1)
    # Tables are not split over tensor ranks, and the last rank may get less of what does not divide evenly.
    even = count(model) * 4 / sizes.world
    assert 0.95 * even < found.weights < 1.15 * even
    assert found.moments == 2 * found.weights
    assert 0 < found.gathered < count(model) * 4 / 10
    assert not dist.is_initialized()


def test_the_parts_of_all_ranks_add_up_to_the_model() -> None:
    sizes = ParallelSizes(data=2, expert=2)
    held = [measure_rank(MODEL, sizes, rank=rank).weights for rank in range(4)]
    assert sum(held) == 4 * count(MODEL)


def test_one_rank_gathers_nothing_it_does_not_hold() -> None:
    found = measure_rank(MODEL, ParallelSizes(data=2))
    layers = [4 * sum(p.numel() for p in layer.parameters()) for layer in _meta_layers(MODEL)]
    rest = 4 * (2 * MODEL.vocab_size * MODEL.hidden_size + MODEL.hidden_size)
    assert found.gathered == max(layers) + rest


def _meta_layers(model: ModelConfig) -> list[torch.nn.Module]:
    with torch.device("meta"):
        return list(Decoder(model).layers)
